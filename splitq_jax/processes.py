"""Several processes that work as one (`jax.distributed`), as on the hosts of a TPU pod: all compute the same, the first one writes.

What one process alone cannot do would leave the others waiting for it for good, so they tell each other.
"""

import hashlib
import pickle
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from splitq_jax.errors import InputError

_T = TypeVar("_T")
SMALL, LARGE = 1 << 16, 1 << 26  # bytes that are sent at a time: few sizes, few compilations
SAID = 1000  # bytes of a message that the others read


def join() -> None:
    """Find the others, as `jax.distributed.initialize` does; before JAX is used for anything else.

    Raises:
      InputError: nothing here says where the others are.
    """
    if jax.distributed.is_initialized():
        return
    # the service would take SIGTERM from the handler that removes what is half written
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: {error}; JAX finds the other processes on TPU pods, under Slurm, Open MPI and Kubernetes: start one a host there"
        ) from None
    by_first(lambda: None)  # connect while all are as far; backends give up when one comes late


def is_first() -> bool:
    """Return whether this process is the one that writes; alone it is."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def by_first(do: Callable[[], _T]) -> _T:
    """Let the first process do something; all wait for it, and return what it returned, by `pickle`.

    Raises:
      InputError: it failed in the first process, which raises what it was.
    """
    if not jax.distributed.is_initialized():
        return do()
    if not is_first():
        value, message = pickle.loads(_sent(None))
        if message is not None:
            raise InputError(message)
        return value  # type: ignore[no-any-return]
    try:
        value = do()
        content = pickle.dumps((value, None))
    except Exception as error:
        _sent(pickle.dumps((None, str(error))))
        raise
    _sent(content)
    return value


def together(do: Callable[[], _T]) -> _T:
    """Do something in every process.

    Raises:
      InputError: it failed in another process; where it did, that is raised.
    """
    if not jax.distributed.is_initialized():
        return do()
    try:
        value = do()
    except Exception as error:
        _told(f"x{error}")
        raise
    for i, said in enumerate(_told("")):
        if said:
            raise InputError(f"process {i} of {jax.process_count()}: {said[1:]}")
    return value


def check_alike(what: str, value: Callable[[], str]) -> None:
    """Compare what should be the same in every process; ``value`` is not called where there is but one.

    Raises:
      InputError: a process has another value than the first.
    """
    if jax.distributed.is_initialized():
        first, *others = _told(hashlib.sha256(value().encode()).hexdigest())
        for i, found in enumerate(others, 1):
            if found != first:
                raise InputError(f"{what}: process {i} has others than the first; give all processes the same files and flags")


def _told(text: str) -> list[str]:
    """Return what each process says, the start of it."""
    from jax.experimental.multihost_utils import process_allgather

    padded = np.frombuffer(text.encode()[:SAID].ljust(SAID, b"\0"), np.uint8)
    said = np.asarray(process_allgather(padded)).astype(np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in said]


def _sent(content: bytes | None) -> bytes:
    """Return what the first process has; the others have None."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    own = b"" if content is None else content
    high, low = broadcast_one_to_all(np.array(divmod(len(own), 1 << 24), np.int32))
    length = (int(high) << 24) + int(low)
    size, parts = SMALL if length <= SMALL else LARGE, []
    for start in range(0, length, size):
        part = np.frombuffer(own[start : start + size].ljust(size, b"\0"), np.uint8)
        parts.append(np.asarray(broadcast_one_to_all(part)).astype(np.uint8).tobytes())
    return b"".join(parts)[:length]
