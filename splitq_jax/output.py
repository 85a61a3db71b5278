"""What commands write and show: a folder that appears whole or not at all, and the progress bar."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from splitq_jax.errors import InputError
from splitq_jax.processes import by_first, is_first

WRITTEN_BY_US = (("params/manifest.json",), ("report.json", "report.html"))  # what marks a folder that may be replaced


def make_console() -> Console:
    """Return the console that commands print to: a terminal's own width, else wide enough that no table is cut short.

    Of several processes the first alone prints.
    """
    found = Console(quiet=not is_first())
    return found if found.is_terminal else Console(width=max(found.width, 160), quiet=found.quiet)


class Bar(Progress):
    """A progress bar by which threads learn that the command is to end: once ``ended``, their next step raises KeyboardInterrupt."""

    ended = False

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Show a step.

        Raises:
          KeyboardInterrupt: the command is to end.
        """
        if self.ended:
            raise KeyboardInterrupt
        super().advance(task_id, advance)


def progress_bar(console: Console | None = None) -> Bar:
    """Return the bar that all commands show."""
    return Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)


def counter(progress: Progress | None, label: str, total: int | None) -> Callable[[], None]:
    """Return what advances a new task by one step; without a bar it does nothing."""
    if progress is None:
        return lambda: None
    return partial(progress.advance, progress.add_task(label, total=total))


@contextlib.contextmanager
def output_folder(out: Path, overwrite: bool, *inputs: Path | None) -> Iterator[Path]:
    """Give the folder that becomes ``out`` (see `drafted`); of several processes the first alone writes there.

    Raises:
      InputError: ``out`` exists, without ``overwrite`` or without being an output of these commands; it holds one of ``inputs``; no folder
        can have its name.
    """
    by_first(partial(_check, out, overwrite, inputs))
    if is_first():
        with drafted(out) as draft:
            yield draft
    else:
        yield out
    by_first(lambda: None)  # nobody goes on before the folder is there


def _check(out: Path, overwrite: bool, inputs: Iterable[Path | None]) -> None:
    if "\0" in str(out) or str(out) != os.fsencode(out).decode(errors="replace"):
        raise InputError(f"--out {str(out)!r}: no folder's name; give one in UTF-8")
    for path in inputs:
        if path is not None and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"--out {out}: holds {path}, which is read; give another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise InputError(f"--out {out}: exists; give another folder or --overwrite")
        if not any(all((out / name).is_file() for name in names) for names in WRITTEN_BY_US):
            raise InputError(f"--out {out}: exists and was not written by splitq, so it is left alone; give another folder")


@contextlib.contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside ``out`` that takes its place when all went well, and vanishes otherwise; until then ``out`` stays.

    Raises:
      InputError: it cannot be written.
    """
    target = out.resolve()
    draft, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.{kind}") for kind in ("partial", "old"))
    try:
        draft.mkdir(parents=True)
        yield draft
        try:
            if target.exists():
                target.rename(old)
            draft.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error}; choose another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
