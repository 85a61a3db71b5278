"""The command line: ``splitq convert | calibrate | quantize | eval | generate | inspect | demo``.

Nothing heavy is imported before a command is chosen, so ``splitq --help`` answers at once.
"""

import _thread
import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from splitq_jax.errors import InputError

COMMANDS = {
    "demo": "build a small real VLM, quantize it with SplitQ and the baselines, compare them on easy-VQA",
    "convert": "convert a Hugging Face folder to Flax parameters",
    "calibrate": "collect statistics of the layers' inputs",
    "quantize": "quantize a model: statistics, channel splitting, block-wise training, packed codes",
    "eval": "answer the questions of a data set with a float or a quantized model",
    "generate": "answer a question about images",
    "inspect": "show a quantized model layer by layer: bits, groups, ranks, bytes, error, split channels",
}

USAGES = {  # what comes before the flags
    "convert": "MODEL --out OUT",
    "calibrate": "MODEL --out OUT",
    "quantize": "MODEL --out OUT",
    "eval": "MODEL",
    "generate": "MODEL QUESTION",
    "inspect": "MODEL",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for input that is refused, 130 when interrupted, 143 when terminated."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half written is removed on the way
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _interrupt_again
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("splitq: interrupted", file=sys.stderr)
        return 130


def _interrupt_again(unraisable: Any) -> None:
    """Send a signal again that fell into a callback of the garbage collector, such as JAX has one: it would be printed and forgotten."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(type(unraisable.exc_value))
    if number is not None:
        threading.Timer(0.05, _thread.interrupt_main, [number]).start()
    else:
        sys.__unraisablehook__(unraisable)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="splitq",
        description="Post-training quantization of vision-language models in JAX (SplitQ, arXiv 2605.19929, and its baselines).",
        epilog="Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"splitq {version('splitq-jax')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    for name, text in COMMANDS.items():
        # argparse's own names all flags, before every error
        usage = f"splitq {name} {USAGES[name]} [flags]" if name in USAGES else f"splitq {name} [flags]"
        command = commands.add_parser(name, usage=usage, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            import_module(f"splitq_jax.commands.{name}").add_flags(command)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"splitq {options.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
