"""easy-VQA (Zhou 2019): all questions of an image packed behind it, with the answers that they should get.

A row, in the words of ChatML; P is the length of the prefix, and a target is what its position should predict:

    tokens     <|im_start|>user <nl> <image> ... <image> | <nl> Is it red? ... assistant <nl>  yes        <|im_end|> | <nl> What ...
    segments   0 ...................................... | 1 ............................ 1          1           | 2 .......
    positions  0 .................................. P-1 | P .......................... P+n      P+n+1           | P .......
    targets    -                                        |                        yes   <|im_end|>   -           | - .......
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from splitq_jax.errors import InputError

Batch = dict[str, np.ndarray]
Processor = Callable[[Sequence[Any]], Float[np.ndarray, "N C H W"]]


@dataclass(frozen=True)
class Prompt:
    """One question as tokens.

    Attributes:
      prefix: what stands before the image.
      question: what stands between the image and the answer.
      answer: the answer and the token that ends it.
    """

    prefix: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A question, its number, its image and its answer."""

    number: int
    image_id: int
    image: Any
    question: str
    answer: str


def examples(records: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Give the records of a data source their numbers (``image``, ``image_id``, ``question``, ``answer``; text may be bytes)."""

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    for number, r in enumerate(records):
        yield Example(number, int(r["image_id"]), r["image"], text(r["question"]), text(r["answer"]))


def prompt(tokenizer: Any, question: str, answer: str, image_token: str) -> Prompt:
    """Render one question with the tokenizer's chat template and split it at the image.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      question: the question.
      answer: its answer.
      image_token: the image's placeholder, one token.

    Raises:
      InputError: the template shows no image or several, or no end of the answer; the answer changes the tokens before it.
    """
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    told = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    begun = bool(tokenizer.bos_token) and asked.startswith(tokenizer.bos_token)  # by the template
    before, whole = (tokenizer(t, add_special_tokens=not begun)["input_ids"] for t in (asked, told))
    image = tokenizer.convert_tokens_to_ids(image_token)
    if before.count(image) != 1:
        raise InputError(f"chat template: {before.count(image)} image placeholders in {asked!r}, expected one")
    p = split(before, whole, [image], [tokenizer.eos_token_id])
    return Prompt(p.prefix[:-1], p.question, p.answer)


def split(asked: Sequence[int], told: Sequence[int], image: Iterable[int], ends: Iterable[int]) -> Prompt:
    """Split an exchange behind its image.

    Args:
      asked: the tokens up to the answer, the image's placeholders among them.
      told: the tokens with the answer.
      image: tokens that are placeholders; the last one ends the prefix.
      ends: tokens that end an answer.

    Raises:
      InputError: no placeholder; an answer that has no end or changes the tokens before it.
    """
    places, ends = set(image), set(ends)
    at = max((i for i, token in enumerate(asked) if token in places), default=None)
    if at is None:
        raise InputError(f"chat template: 0 image placeholders in {list(asked)}, expected at least one")
    if tuple(told[: len(asked)]) != tuple(asked):
        raise InputError(
            f"chat template: the answer changes the tokens of its question: {list(told)} does not begin with {list(asked)}"
        )
    tail = told[len(asked) :]
    end = next((i for i, token in enumerate(tail) if token in ends), None)
    if end is None:
        raise InputError(f"chat template: the answer in {list(told)} does not end with one of {sorted(ends)}")
    return Prompt(tuple(asked[: at + 1]), tuple(asked[at + 1 :]), tuple(tail[: end + 1]))


def packed_batches(
    data: Iterable[Example],
    tokenizer: Any,
    processor: Processor,
    *,
    image_token: str,
    image_length: int,
    batch_size: int = 16,
    lengths: Sequence[int] | int = 1,
) -> list[Batch]:
    """Pack questions behind images that all take the same number of tokens, with a tokenizer alone.

    Args:
      data: the questions.
      tokenizer: a Hugging Face tokenizer with a chat template.
      processor: turns images into pixel values.
      image_token: the image's placeholder.
      image_length: how many placeholders an image takes.
      batch_size: see `pack`.
      lengths: see `pack`.

    Returns:
      See `pack`; pixel values are float32.

    Raises:
      InputError: see `pack`; a template that does not fit (see `prompt`).
    """
    # the questions come from few templates: each is rendered once
    rendered = cache(partial(prompt, tokenizer, image_token=image_token))
    image = (tokenizer.convert_tokens_to_ids(image_token),) * image_length

    def render(example: Example) -> Prompt:
        p = rendered(example.question, example.answer)
        return Prompt((*p.prefix, *image), p.question, p.answer)

    def vision(images: Sequence[Any]) -> Batch:
        return {"pixel_values": np.asarray(processor(images), np.float32)}

    return pack(data, render, vision, batch_size=batch_size, lengths=lengths)


def pack(
    data: Iterable[Example],
    render: Callable[[Example], Prompt],
    vision: Callable[[Sequence[Any]], Batch],
    *,
    batch_size: int = 16,
    lengths: Sequence[int] | int = 1,
) -> list[Batch]:
    """Pack questions behind their images.

    Args:
      data: the questions; those of one image need not stand together.
      render: gives a question's tokens; the prefix ends with the image's last placeholder, however many it takes.
      vision: turns images, one a row, into the arrays that the model takes.
      batch_size: rows a batch. The last batch of a length repeats its first row, without targets.
      lengths: the lengths to pad to: few, as each is compiled for. An image whose questions do not fit the longest is repeated in
        further rows. A number: so many, at equal shares of the rows, rounded up to multiples of 32; no image is repeated.

    Returns:
      Batches of the model's input and ``targets`` and ``question`` (see `splitq_jax.eval.harness.evaluate`).

    Raises:
      InputError: no question; a question too long for the longest row.
    """
    by_image = sorted(data, key=lambda e: e.image_id)
    if not by_image:
        raise InputError("no question; give at least one image with a question and an answer")
    room = sys.maxsize if isinstance(lengths, int) else max(lengths)
    groups = [list(group) for _, group in itertools.groupby(by_image, key=lambda e: e.image_id)]
    filled = [row for group in groups for row in _fill(group, render, room)]
    used = [len(prefix) + sum(len(p.question) + len(p.answer) for _, p in parts) for _, prefix, parts in filled]
    if isinstance(lengths, int):
        shares = np.quantile(used, np.arange(1, lengths + 1) / lengths, method="higher")
        lengths = [-(-int(share) // 32) * 32 for share in shares]
    rows: dict[int, list[tuple[Any, Batch]]] = {n: [] for n in sorted(lengths)}
    for (image, prefix, parts), taken in zip(filled, used, strict=True):
        length = next(n for n in rows if n >= taken)
        rows[length].append((image, _row(prefix, parts, length)))
    return [batch for alike in rows.values() for batch in _batches(alike, vision, batch_size)]


def _fill(
    group: Sequence[Example], render: Callable[[Example], Prompt], room: int
) -> Iterator[tuple[Any, tuple[int, ...], list[tuple[int, Prompt]]]]:
    """Share the questions of an image among as many rows as they need."""
    parts: list[tuple[int, Prompt]] = []
    used = 0
    for example in group:
        p = render(example)
        size, start = len(p.question) + len(p.answer), len(p.prefix)
        if start + size > room:
            raise InputError(f"question {example.number} takes {start + size} tokens with its image, a row has {room}")
        if parts and (used + size > room or parts[0][1].prefix != p.prefix):
            yield group[0].image, parts[0][1].prefix, parts
            parts = []
        used = (used if parts else start) + size
        parts.append((example.number, p))
    yield group[0].image, parts[0][1].prefix, parts


def _row(prefix: tuple[int, ...], parts: Sequence[tuple[int, Prompt]], length: int) -> Batch:
    def line(value: int, dtype: type = np.int32) -> Int[np.ndarray, " L"]:
        return np.full(length, value, dtype)

    row = {"input_ids": line(0), "positions": line(0), "segments": line(0), "targets": line(-1), "question": line(-1)}
    row["attention_mask"] = line(0, np.bool_)
    row["input_ids"][: len(prefix)] = prefix
    row["positions"][: len(prefix)] = np.arange(len(prefix))
    end = len(prefix)
    for segment, (number, p) in enumerate(parts, start=1):
        start, answer = end, end + len(p.question)
        end = answer + len(p.answer)
        row["input_ids"][start:end] = p.question + p.answer
        row["positions"][start:end] = len(prefix) + np.arange(end - start)
        row["segments"][start:end] = segment
        # a position predicts the token that follows it
        row["targets"][answer - 1 : end - 1] = p.answer
        row["question"][answer - 1 : end - 1] = number
    row["attention_mask"][:end] = True
    return row


def _batches(rows: Sequence[tuple[Any, Batch]], vision: Callable[[Sequence[Any]], Batch], batch_size: int) -> Iterator[Batch]:
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        spare = batch_size - len(part)
        blank = part[0][1] | {k: np.full_like(part[0][1][k], -1) for k in ("targets", "question")}
        lines = [row for _, row in part] + [blank] * spare
        batch = {k: np.stack([line[k] for line in lines]) for k in lines[0]}
        yield batch | vision([image for image, _ in part] + [part[0][0]] * spare)
