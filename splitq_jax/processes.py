"""Several processes that work as one (`jax.distributed`), as on the hosts of a TPU pod: all compute the same, the first one writes."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from splitq_jax.errors import InputError

_T = TypeVar("_T")


def join() -> None:
    """Find the others, as `jax.distributed.initialize` does; before JAX is used for anything else.

    Raises:
      InputError: nothing here says where the others are.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: {error}; JAX finds the other processes on TPU pods, under Slurm, Open MPI and Kubernetes: start one a host there"
        ) from None


def is_first() -> bool:
    """Return whether this process is the one that writes; alone it is."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def by_first(do: Callable[[], _T]) -> _T:
    """Let the first process do something; all wait for it, and return (by `pickle`) or raise the same.

    Raises:
      InputError: what failed in the first process.
    """
    if not jax.distributed.is_initialized():
        return do()
    outcome: tuple[_T | None, Exception | None] = None, None
    if is_first():
        try:
            outcome = do(), None
        except Exception as error:
            outcome = None, error
    value, failed = outcome
    found = pickle.dumps((value, None if failed is None else str(failed)))
    value, message = pickle.loads(_from_first(found))
    if failed is not None:
        raise failed
    if message is not None:
        raise InputError(message)
    return value  # type: ignore[no-any-return]


def _from_first(content: bytes) -> bytes:
    from jax.experimental.multihost_utils import broadcast_one_to_all

    length = int(broadcast_one_to_all(np.int32(len(content))))
    sent = np.frombuffer(content, np.uint8)[:length]
    sent = np.pad(sent, (0, length - sent.size))  # the others' own content is of another length, and not read
    return np.asarray(broadcast_one_to_all(sent)).astype(np.uint8).tobytes()
