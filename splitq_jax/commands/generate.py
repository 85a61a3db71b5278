"""``splitq generate``: an answer to a question about images."""

import argparse
from typing import Any

import numpy as np

from splitq_jax import models
from splitq_jax.commands.common import add_mesh, add_model, answer_to, mesh_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq generate``."""
    add_model(parser)
    add_mesh(parser)
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--image", action="append", default=[], help="an image file; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="a bound on the answer (default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 draws as the model says (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this share (default: 1)"
    )
    parser.add_argument("--top-k", type=int, default=None, help="draw from the so many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--kv-bits", type=int, default=16, choices=(8, 16), help="of kept keys and values; 16: unrounded (default: 16)"
    )
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the answer to a question."""
    processor = models.Processor.from_folder(options.model)
    images = [models.open_image(path) for path in options.image]
    model, params = models.load(options.model, mesh=mesh_of(options), follow_links=options.follow_links)
    numbers = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed", "kv_bits")}
    shown = _Shown(processor.tokenizer) if options.stream else None
    numbers["on_token"] = shown
    answer = answer_to(model, params, processor, options.question, images, options.max_new_tokens, **numbers)
    print(answer if shown is None else shown.rest(answer))


class _Shown:
    """Prints an answer token by token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, ""
        self.tokens: list[int] = []

    def __call__(self, tokens: np.ndarray) -> None:
        """Take the next token and print what is certain by now: half a character may wait for its other half."""
        self.tokens += [int(t) for t in tokens if t >= 0]
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True).lstrip()
        if text.startswith(self.text) and text == text.rstrip() and not text.endswith("\ufffd"):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def rest(self, answer: str) -> str:
        """Return what is not printed yet."""
        return answer[len(self.text) :] if answer.startswith(self.text) else f"\n{answer}"
