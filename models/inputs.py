"""Questions and images to the model's arrays, with transformers' own processor of the family; no torch."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from splitq_jax.errors import InputError
from splitq_jax.models.convert import read_config
from splitq_jax.models.families import model_of
from splitq_jax.models.pictures import Picture, open_image
from splitq_jax.models.processors import open_processor
from splitq_jax.models.weights import read_json

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # which tokens are images, in the words of Qwen's and Gemma's processors
Batch = dict[str, np.ndarray]
Conversation = list[dict[str, Any]]


class Processor:
    """A folder's tokenizer, chat template and image processor, joined by transformers' own processor of the family.

    Attributes:
      config: the model's.
      whole: transformers' processor.
      tokenizer: its fast tokenizer.
      image_processor: its PIL image processor.
      image_token: what the chat template writes for an image.
      stop_ids: tokens that end an answer.
    """

    def __init__(self, config: Any, whole: Any, stop_ids: Sequence[int] = ()) -> None:
        self.config, self.whole = config, whole
        self.tokenizer, self.image_processor, self.image_token = whole.tokenizer, whole.image_processor, whole.image_token
        end = self.tokenizer.eos_token_id
        self.stop_ids = tuple(dict.fromkeys([*stop_ids, *([] if end is None else [end])]))
        self._exchanged = lru_cache(maxsize=4096)(self._exchange)
        self._expansions: dict[tuple[int, int], str] = {}
        # Gemma's processor turns its image token into others, which are the placeholders
        self.placeholder = getattr(self.tokenizer, "image_token", None) or self.image_token
        found = self.tokenizer.convert_tokens_to_ids(self.placeholder)
        if found not in config.placeholders:
            wanted = ", ".join(map(str, config.placeholders))
            raise InputError(f"tokenizer: {self.placeholder!r} is token {found}; config.json says {wanted}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Processor":
        """Read tokenizer, image processor and chat template of a model folder.

        Raises:
          InputError: a file that is missing or cannot be read; an image processor that is not the family's; an image token that is
            not the config's.
        """
        folder, config = Path(folder), read_config(folder)
        model, kind = model_of(config).config, config["model_type"]
        fixed = {}
        if kind == "llava":  # older folders do not say how many tokens an image takes
            fixed = {
                "patch_size": model.vision.patch_size,
                "num_additional_image_tokens": int(model.vision.is_clip),
                "vision_feature_select_strategy": model.vision_feature_select_strategy,
            }
        return cls(model, open_processor(folder, kind, **fixed), stop_ids(folder))

    def inputs(self, question: str, images: Picture | Sequence[Picture] | None = None) -> Batch:
        """Return a batch of one: ``processor.inputs("What is this?", images=["a.png"])``; see `__call__`."""
        return self([question], [images])

    def __call__(
        self, questions: Sequence[str], images: Sequence[Picture | Sequence[Picture] | None], length: int | None = None
    ) -> Batch:
        """Put questions into the chat template, each after its images, ready for an answer.

        Args:
          questions: one a sample.
          images: one, several or none a sample.
          length: tokens a row; None for the longest.

        Returns:
          ``input_ids`` and ``attention_mask`` (B, L), padded on the left, and what the family's image processor gives where there are
          images (``pixel_values``, ``image_grid_thw``, …): what `VisionLanguageModel.prepare` takes.

        Raises:
          InputError: other numbers of questions and images; a question that has the placeholder in it or is longer than ``length``; what
            `open_image` refuses.
        """
        if isinstance(questions, str):
            raise InputError(f"questions: the string {questions!r}; expected a list of them")
        if len(questions) != len(images) or not questions:
            raise InputError(f"{len(questions)} questions, {len(images)} entries of images; expected as many, and at least one")
        groups = [_as_list(entry) for entry in images]
        return self.chats([_chat(q, len(group)) for q, group in zip(questions, groups, strict=True)], groups, length)

    def chats(self, chats: Sequence[Conversation], images: Sequence[Sequence[Picture]], length: int | None = None) -> Batch:
        """Render conversations, ready for the next answer; for several turns, and for images between texts.

        Args:
          chats: messages in transformers' words, ``{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "…"}]}``.
          images: each conversation's, in order.
          length: tokens a row; None for the longest.

        Returns:
          A batch; see `__call__`.

        Raises:
          InputError: see `__call__`.
        """
        if len(chats) != len(images) or not chats:
            raise InputError(f"{len(chats)} conversations, {len(images)} entries of images; expected as many, and at least one")
        texts = [self._render(chat, len(group)) for chat, group in zip(chats, images, strict=True)]
        batch = self._process(texts, images)
        for text, row in zip(texts, batch["input_ids"], strict=True):
            self._check(row, text)
        longest = max(map(len, batch["input_ids"]))
        width = longest if length is None else length
        if longest > width:
            raise InputError(f"a question takes {longest} tokens with its images; the row has {width}")
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

        def left(rows: list[Any], fill: int, dtype: Any) -> np.ndarray:
            return np.array([[fill] * (width - len(row)) + list(row) for row in rows], dtype)

        ids = batch.pop("input_ids")
        tokens = {"input_ids": left(ids, pad, np.int32), "attention_mask": left([[True] * len(i) for i in ids], False, bool)}
        tokens |= {name: left(batch.pop(name), 0, np.int32) for name in TOKEN_TYPES if name in batch}
        return tokens | batch

    def vision(self, images: Sequence[Picture]) -> Batch:
        """Return what the image processor makes of samples that have one image each.

        Raises:
          InputError: see `open_image`.
        """
        batch = self._process([self.image_token] * len(images), [[image] for image in images])
        return {name: value for name, value in batch.items() if name not in {"input_ids", *TOKEN_TYPES}}

    def exchange(self, question: str, image: Picture, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of a question about one image, ready for the answer, and those with the answer, ended by a stop token.

        Raises:
          InputError: see `__call__`; a template that does not end an answer while the tokenizer has no end token.
        """
        opened = open_image(image)
        if opened.size not in self._expansions:  # how many placeholders an image takes depends on its size alone
            out = self._run([self.image_token], [[opened]], return_text_replacement_offsets=True)
            self._expansions[opened.size] = out["text_replacement_offsets"][0][0]["replacement"]
        return self._exchanged(question, answer, self._expansions[opened.size])

    def _exchange(self, question: str, answer: str, expansion: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        chat = _chat(question, 1)
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        asked, told = (
            self._render(c, 1, ask).replace(self.image_token, expansion) for c, ask in ((chat, True), ([*chat, reply], False))
        )
        before, whole = self._tokens([asked])[0], self._tokens([told])[0]
        if not set(whole[len(before) :]) & set(self.stop_ids):  # LLaVA's own template leaves the end to whoever trains
            if self.tokenizer.eos_token_id is None:
                raise InputError(f"chat template: the answer in {told!r} does not end, and the tokenizer has no end token")
            whole = [*self._tokens([told.rstrip()])[0], self.tokenizer.eos_token_id]
        self._check(before, asked)
        return tuple(before), tuple(whole)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return an answer's text."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _render(self, chat: Conversation, images: int, ask: bool = True) -> str:
        """Return a conversation as text, one image token an image."""
        if self.tokenizer.chat_template is None:
            raise InputError("tokenizer: no chat template; add chat_template.jinja to the model folder")
        own = {self.image_token, self.placeholder, getattr(self.whole, "video_token", None)} - {None}
        for said in (text for message in chat for text in _texts(message["content"])):
            if inside := [token for token in own if token in said]:
                raise InputError(f"question {said!r}: {inside[0]} is put in for you; leave it out and give the images")
        try:
            text: str = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
        except Exception as e:  # Jinja's, or the template's own
            raise InputError(f"chat template: {e}") from None
        if text.count(self.image_token) != images:
            raise InputError(f"chat template: {text.count(self.image_token)} placeholders for {images} images in {text!r}")
        return text

    def _options(self, texts: Sequence[str]) -> dict[str, bool]:
        begun = bool(self.tokenizer.bos_token) and texts[0].startswith(self.tokenizer.bos_token)  # by the template
        return {"add_special_tokens": not begun, "return_token_type_ids": False}

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = self.tokenizer(texts, **self._options(texts))["input_ids"]
        return rows

    def _check(self, ids: Sequence[int], text: str) -> None:
        """Refuse what the embedding has no rows for."""
        size = self.config.text.vocab_size
        if past := [i for i in ids if i >= size and i not in self.config.placeholders]:
            raise InputError(f"question {text!r}: token id {past[0]} is past the model's vocabulary of {size}")
        if not ids:
            raise InputError(f"question {text!r}: no tokens; check the chat template")

    def _process(self, texts: list[str], images: Sequence[Sequence[Picture]]) -> dict[str, Any]:
        """Return rows of tokens as lists, and what the image processor makes of the images as arrays."""
        numbers = iter(range(sum(map(len, images))))
        opened = [[open_image(picture, f"image {next(numbers)}") for picture in group] for group in images]
        out = self._run(texts, opened if any(opened) else None, text_kwargs=self._options(texts))
        del out["attention_mask"]
        return {name: value if name in {"input_ids", *TOKEN_TYPES} else _array(name, value) for name, value in out.items()}

    def _run(self, texts: list[str], images: Any, **options: Any) -> dict[str, Any]:
        try:
            return dict(self.whole(text=texts, images=images, **options))
        except Exception as e:  # transformers checks sizes and counts with exceptions of many kinds
            raise InputError(f"{type(self.whole).__name__}: {e}") from None


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:  # a list of arrays
        raise InputError(
            f"{name}: the images come out in different sizes; set a fixed size in the image processor's file"
        ) from None
    return array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32, copy=False)


def _chat(question: str, images: int) -> Conversation:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


def _texts(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _as_list(entry: Picture | Sequence[Picture] | None) -> list[Picture]:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [entry]  # type: ignore[list-item]


def stop_ids(folder: str | Path) -> tuple[int, ...]:
    """Return the tokens that end an answer, from ``generation_config.json`` or else ``config.json``.

    Raises:
      InputError: entries that are no token ids.
    """
    folder = Path(folder)
    name = "generation_config.json"
    config = read_json(folder / name) if (folder / name).is_file() else {}
    if "eos_token_id" not in config:
        name, config = "config.json", read_json(folder / "config.json")
        if config.get("eos_token_id") is None and isinstance(config.get("text_config"), dict):
            config = config["text_config"]
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"{folder / name}: eos_token_id {found!r}; expected a token id or a list of them")
    return tuple(ids)
