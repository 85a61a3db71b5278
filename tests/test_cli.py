"""The commands on a tiny random model: each reads a folder, writes a folder, and refuses what it should."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from folders import change_json
from home import make

import splitq_jax as sq
from splitq_jax import calib, models
from splitq_jax.calib import FitConfig
from splitq_jax.cli import _interrupt_again, main
from splitq_jax.commands.quantize import FIT_FLAGS, RECIPE_FLAGS
from splitq_jax.errors import InputError
from splitq_jax.flags import descriptions
from splitq_jax.output import output_folder, progress_bar
from splitq_jax.pipeline import Setup, quantized, source
from splitq_jax.recipe import Recipe

SPLIT = ["--split-rate", "0.06", "--split-align", "2"]
FAST = ["--steps", "2", "--samples", "4", *SPLIT]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.slow
def test_from_a_folder_to_an_answer(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", home / "set.jsonl"]
    assert run("convert", home / "model", "--out", home / "flax") == 0
    assert run("calibrate", home / "flax", "--out", home / "stats", "--samples", 4, *SPLIT, *data) == 0
    assert run("quantize", home / "flax", "--out", home / "w4a4", "--stats", home / "stats", *FAST, *data) == 0
    assert "8 layers match decoder/blocks_*/*" in capsys.readouterr().out
    assert not (home / "w4a4.run").exists()
    # the same from Hugging Face's folder, with statistics collected on the way: the same codes
    assert run("quantize", home / "model", "--out", home / "again", *FAST, *data) == 0
    for a, b in zip(*((sq.restore(home / n / "params")[1]["leaves"]).values() for n in ("w4a4", "again")), strict=True):
        assert a == b
    assert run("eval", home / "w4a4", "--reference", home / "model", "--out", home / "report", *data) == 0
    rows = json.loads((home / "report" / "report.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["float", "splitq"] and rows[1]["kl"] > 0
    capsys.readouterr()
    assert run("generate", home / "w4a4", "what is this", "--image", home / "0.png", "--max-new-tokens", 3) == 0
    said = capsys.readouterr().out
    assert 0 < len(said.split()) <= 3
    assert run("generate", home / "w4a4", "what is this", "--image", home / "0.png", "--max-new-tokens", 3, "--stream") == 0
    assert capsys.readouterr().out == said
    on_mesh = ["--mesh", "fsdp=2,tensor=2"]
    assert run("generate", home / "w4a4", "what is this", "--image", home / "0.png", "--max-new-tokens", 3, *on_mesh) == 0
    assert capsys.readouterr().out == said
    assert run("eval", home / "w4a4", "--reference", home / "model", "--out", home / "over_devices", *data, *on_mesh) == 0
    shared = json.loads((home / "over_devices" / "report.json").read_text())["rows"][1]
    assert shared["accuracy"] == rows[1]["accuracy"] and shared["kl"] == pytest.approx(rows[1]["kl"], rel=1e-3)
    capsys.readouterr()
    drawn = ["--max-new-tokens", 9, "--temperature", 2, "--top-p", 0.9, "--kv-bits", 8]
    answers = set()
    for seed in (1, 2, 1):
        assert run("generate", home / "w4a4", "what is this", "--image", home / "0.png", *drawn, "--seed", seed) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 2
    assert run("inspect", home / "w4a4", "--plots", home / "plots") == 0
    shown = capsys.readouterr().out
    assert "decoder/blocks_1/down" in shown and "W4A4" in shown and "44 + 2 + 2" in shown
    assert len(list((home / "plots").glob("*.svg"))) == 8
    model, params = models.load(home / "w4a4")  # a quantized folder loads like any other
    assert model.config.num_layers == 2 and sq.effective_bits(params) > 4


@pytest.mark.slow
def test_nothing_is_said_of_what_was_not_compared(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", home / "set.jsonl"]
    assert run("quantize", home / "model", "--out", tmp_path / "rtn", "--method", "rtn", *FAST, *data) == 0
    capsys.readouterr()
    assert run("eval", tmp_path / "rtn", "--out", tmp_path / "report", *data) == 0
    (row,) = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert row["kl"] is row["agreement"] is None and row["seconds"] > 0
    assert "–" in capsys.readouterr().out


@pytest.mark.slow
def test_blocks_of_other_statistics_are_not_taken_up(home: Path, tmp_path: Path) -> None:
    """They choose the channels, and blocks that were trained for others have the same shapes."""
    setup = Setup.open(home / "model", source(str(home / "set.jsonl"), home))
    batches, recipe = setup.calibration(4, 0), sq.recipes.splitq("w4a4").replace(sites=("decoder/blocks_*/o",))
    runs, found = tmp_path / "run", []
    for skip_first in (True, False):
        found.append(calib.collect(setup.model, setup.params, batches, recipe.split, skip_first=skip_first))
    quantized(setup, found[0], recipe, FitConfig(steps=1), batches, run_folder=runs)
    with pytest.raises(InputError, match="fingerprint"):
        quantized(setup, found[1], recipe, FitConfig(steps=1), batches, run_folder=runs)


@pytest.mark.slow
def test_a_tree_of_several_recipes_is_shown(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, params = models.load(home / "model")
    made = [sq.recipes.rtn(scheme).replace(sites=f"decoder/blocks_{i}/*") for i, scheme in enumerate(("w4a4", "w8a8"))]
    quantized = sq.quantize(sq.quantize(params, {}, made[0]), {}, made[1])
    for name, recipe in (("several", made), ("none", None)):
        sq.save(tmp_path / name / "params", quantized, recipe=recipe, config=model.config)
        models.copy_processor(home / "model", tmp_path / name)
        assert run("inspect", tmp_path / name) == 0
        assert run("eval", tmp_path / name, "--data", home / "set.jsonl") == 0
        said = capsys.readouterr().out
        assert said.count("w4a4 + w8a8") == 2 and ("rtn" if recipe else "quantized") in said


def test_every_flag_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Python 3.13 indents docstrings otherwise, from which the texts are read."""
    for cls, names in ((Recipe, RECIPE_FLAGS), (FitConfig, FIT_FLAGS)):
        said = descriptions(cls)
        assert all(len(said[name]) > 10 for name in names)


def test_a_folder_is_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("first", "second"):
        with output_folder(out, True) as draft:
            (draft / "params").mkdir()
            (draft / "params" / "manifest.json").write_text(content)
            assert content == "first" or (out / "params" / "manifest.json").read_text() == "first"
    assert (out / "params" / "manifest.json").read_text() == "second"
    with pytest.raises(KeyboardInterrupt), output_folder(out, True):
        raise KeyboardInterrupt
    assert (out / "params" / "manifest.json").read_text() == "second" and [f.name for f in tmp_path.iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(out)
    with output_folder(tmp_path / "link", True) as draft:
        (draft / "report.json").write_text("third")
    assert (tmp_path / "link").is_symlink() and (out / "report.json").read_text() == "third"
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text("{}")  # another program's
    with pytest.raises(InputError, match="left alone"), output_folder(tmp_path / "app", True):
        pass


QUANTIZE = ["MODEL", "--out", "OUT", "--data", "SET", *FAST]
REFUSED = {
    "bits 0": (["quantize", "MODEL", "--out", "OUT", "--scheme", "w0a4"], "w0a4"),
    "bits 17": (["quantize", "MODEL", "--out", "OUT", "--scheme", "w4a17"], "w4a17"),
    "no scheme": (["quantize", "MODEL", "--out", "OUT", "--scheme", "int4"], "wXaY"),
    "K >= D": (["quantize", "MODEL", "--out", "OUT", "--data", "SET", "--samples", "4", "--split-rate", "0.5"], "no main group"),
    "groups beside codes": (["quantize", *QUANTIZE, "--group-size", "32"], "group_size=32 with w4a4"),
    "groups of another size": (["quantize", *QUANTIZE, "--scheme", "w4a16", "--group-size", "37"], "groups of 37 channels"),
    "no such model": (["convert", "NONE", "--out", "OUT"], "config.json"),
    "rule that matches nothing": (["quantize", "MODEL", "--out", "OUT", "--data", "SET", "--sites", "head/*"], "head/*"),
    "too many samples": (["calibrate", "MODEL", "--out", "OUT", "--data", "SET", "--samples", "5"], "--samples 5"),
    "no data set": (["calibrate", "MODEL", "--out", "OUT", "--data", "coco"], "coco"),
    "text only": (["calibrate", "MODEL", "--out", "OUT", "--data", "TEXT", "--samples", "1"], "needs an image"),
    "corrupt image": (["calibrate", "MODEL", "--out", "OUT", "--data", "CORRUPT", "--samples", "1"], "corrupt.png"),
    "a URL": (["generate", "MODEL", "what", "--image", "https://example.org/a.png"], "nothing is fetched"),
    "no such temperature": (["generate", "MODEL", "what", "--temperature", "-1"], "temperature -1"),
    "no such share": (["generate", "MODEL", "what", "--temperature", "1", "--top-p", "0"], "top_p 0"),
    "no tokens": (["generate", "MODEL", "what", "--max-new-tokens", "0"], "max_new_tokens 0"),
    "not quantized": (["inspect", "FLAX"], "not quantized"),
    "converted already": (["convert", "FLAX", "--out", "OUT"], "converted or quantized already"),
    "output is a model": (["convert", "MODEL", "--out", "MODEL", "--overwrite"], "which is read"),
    "output is another model": (["convert", "MODEL", "--out", "OTHER", "--overwrite"], "left alone"),
    "output holds the model": (["quantize", "MODEL", "--out", "HERE", "--overwrite", "--data", "SET"], "which is read"),
    "no folder's name": (["convert", "MODEL", "--out", "a\0b"], "no folder's name"),
    "a run folder of another's": (["quantize", *QUANTIZE, "--run-folder", "MODEL"], "holds other files"),
    "a run folder that is a file": (["quantize", *QUANTIZE, "--run-folder", "SET"], "run folder"),
    "no seed": (["calibrate", "MODEL", "--out", "OUT", "--data", "SET", "--samples", "4", "--seed", "-1"], "--seed -1"),
    "no rate": (["calibrate", "MODEL", "--out", "OUT", "--data", "SET", "--samples", "4", "--split-rate", "nan"], "split rate nan"),
    "no statistics": (["quantize", *QUANTIZE, "--stats", "FLAX"], "holds no statistics"),
    "config of another model": (["generate", "EDITED", "what"], "config.text.ropes"),
    "plots over a file": (["inspect", "CODES", "--plots", "SET"], "--plots"),
    "a quantized reference": (["eval", "MODEL", "--data", "SET", "--reference", "CODES"], "is quantized"),
    "endless answer": (["generate", "MODEL", "what", "--max-new-tokens", "99999999999"], "max_new_tokens 99999999999"),
    "long scheme": (["quantize", *QUANTIZE, "--scheme", f"w{'9' * 5000}a4"], "wXaY"),
    "no such size": (["demo", "--size", "foo"], "--size 'foo'"),
    "no demo seed": (["demo", "--seed", "-1"], "--seed -1"),
    "output exists": (["convert", "MODEL", "--out", "FLAX"], "--overwrite"),
    "no mesh axis": (["generate", "MODEL", "what is this", "--mesh", "model=2"], "expected each axis once"),
    "no such mesh": (["eval", "MODEL", "--data", "SET", "--mesh", "fsdp=3,tensor=3"], "there are 8"),
    "no limit": (["eval", "MODEL", "--data", "SET", "--limit", "-1"], "--limit -1"),
}


def prepared(name: str, home: Path, root: Path) -> Path:
    """Return what a word in capitals stands for, made when it is asked for."""
    path = root / name.lower()
    sample = {"question": "what", "answer": "red"}
    if name in ("MODEL", "OTHER"):
        shutil.copytree(home / "model", path)
    elif name == "FLAX":
        assert run("convert", home / "model", "--out", path) == 0
    elif name == "EDITED":
        assert run("convert", home / "model", "--out", path) == 0
        change_json(path / "config.json", lambda config: config["text_config"].update(rope_theta=5.0, rope_parameters=None))
    elif name == "CODES":
        assert run("quantize", home / "model", "--out", path, "--method", "rtn", *FAST, "--data", home / "set.jsonl") == 0
    elif name == "TEXT":
        path = root / "text.jsonl"
        path.write_text(json.dumps(sample))
    elif name == "CORRUPT":
        path = root / "corrupt.jsonl"
        (root / "corrupt.png").write_bytes((home / "0.png").read_bytes()[:60])
        path.write_text(json.dumps(sample | {"image": "corrupt.png"}))
    return {"SET": home / "set.jsonl", "HERE": root}.get(name, path)


PLACES = ("MODEL", "OTHER", "FLAX", "EDITED", "CODES", "TEXT", "CORRUPT", "SET", "OUT", "HERE", "NONE")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing_behind(name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[name]
    paths = {a: str(prepared(a, home, tmp_path)) for a in sorted(set(arguments) & set(PLACES))}
    before = sorted(tmp_path.rglob("*"))
    assert run(*[paths.get(a, a) for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_foreign_folder_is_not_deleted(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.txt").write_text("x")
    quantized = ["--out", tmp_path / "out", "--method", "rtn", *FAST, "--data", home / "set.jsonl"]
    assert run("quantize", home / "model", *quantized) == 0
    assert (tmp_path / "out.run" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_command_that_is_ended_leaves_nothing(number: int, home: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", home / "model", "--out", tmp_path / "out", "--data", home / "set.jsonl", "--samples", "4"]
    heeding = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in the background it is ignored
    program = f"{heeding}; from splitq_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(tmp_path.iterdir()):  # until the hidden folder is there
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    assert "Traceback" not in said and not any(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "swallowed"), [(signal.SIGINT, KeyboardInterrupt()), (signal.SIGTERM, SystemExit(143))])
def test_a_signal_that_a_callback_swallows_comes_again(number: int, swallowed: BaseException) -> None:
    def heed(*_: Any) -> None:
        raise type(swallowed)

    before = signal.signal(number, heed)
    try:
        with pytest.raises(type(swallowed)):
            _interrupt_again(SimpleNamespace(exc_value=swallowed))
            time.sleep(5)
    finally:
        signal.signal(number, before)


def test_unknown_flags_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["quantise"], ["convert", "--nonsense"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_bar_ends_the_threads_that_move_it() -> None:
    bar = progress_bar()
    task = bar.add_task("training", total=2)
    bar.advance(task)
    assert bar.tasks[0].completed == 1
    bar.ended = True
    with pytest.raises(KeyboardInterrupt):
        bar.advance(task)
    assert bar.tasks[0].completed == 1
