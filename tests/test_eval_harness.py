"""The harness against greedy generation, question by question, on a small model that follows the protocol."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct

from splitq_jax.errors import InputError
from splitq_jax.eval.easy_vqa import Example, Prompt, examples, packed_batches, prompt
from splitq_jax.eval.harness import evaluate

VOCABULARY, IMAGE, END, IMAGE_LENGTH = 23, 20, 21, 4


@dataclass(frozen=True)
class Config:
    num_layers: int = 2
    width: int = 16


@struct.dataclass
class Context:
    positions: Any
    mask: Any
    is_text: Any
    valid: Any

    def add_deepstack(self, i: int, x: Any) -> Any:
        return x


@struct.dataclass
class Hidden:
    x: Any
    context: Any


@struct.dataclass
class Scaled:
    """A typed kernel."""

    codes: Any
    scale: Any
    bits: int = struct.field(pytree_node=False)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Any, context: Context) -> Any:
        d = self.config.width
        kernel = (
            self.param("kernel", nn.initializers.normal(0.4), (d, 3 * d))
            if self.is_initializing()
            else self.get_variable("params", "kernel")
        )
        if isinstance(kernel, Scaled):
            kernel = kernel.codes.astype(jnp.float32) * kernel.scale
        q, k, v = jnp.split(x @ kernel, 3, axis=-1)
        score = jnp.einsum("bqd,bkd->bqk", q, k) / d**0.5
        attention = jax.nn.softmax(jnp.where(context.mask[:, 0], score, -1e9))
        return x + jnp.tanh(attention @ v)


class Fake(nn.Module):
    config: Config

    def setup(self) -> None:
        self.table = self.param("table", nn.initializers.normal(1.0), (VOCABULARY, self.config.width))
        self.head = self.param("head", nn.initializers.normal(1.0), (self.config.width, VOCABULARY))

    def block(self, i: int = 0) -> Block:
        return Block(self.config, parent=None)

    def prepare(self, batch: Any) -> Any:
        return dict(batch)

    def embed(self, input_ids: Any, pixel_values: Any, attention_mask: Any, positions: Any, segments: Any) -> Hidden:
        length = input_ids.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = causal[None] & same & attention_mask[:, None, :]
        is_image = input_ids == IMAGE
        picture = jnp.mean(pixel_values, axis=(1, 2, 3))[:, None, None]
        x = jnp.where(is_image[..., None], picture, self.table[input_ids]) + jnp.sin(positions)[..., None]
        return Hidden(x, Context(positions, mask[:, None], ~is_image & attention_mask, attention_mask))

    def unembed(self, x: Any) -> Any:
        return x @ self.head


class Tokenizer:
    """A token a character; ``^`` begins, ``@`` is the image, ``$`` ends."""

    letters = "abcdefghijklmnop?:^\n@$ "
    eos_token, eos_token_id, bos_token = "$", 21, None

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.letters.index(token)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.letters.index(c) for c in text]}

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool = False) -> str:
        shown = lambda m: "".join("@\n" if c["type"] == "image" else c["text"] for c in m["content"])  # noqa: E731
        text = "".join(f"^{'ab'[m['role'] == 'assistant']}:{shown(m)}$\n" for m in messages)
        return text + "^b:" * add_generation_prompt


def processor(images: Any) -> np.ndarray:
    return np.stack([np.full((3, 2, 2), i, np.float32) for i in images])


def data(count: int = 23, images: int = 4, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    word = lambda n: "".join(rng.choice(list("abcdefghij"), n))  # noqa: E731
    return [
        Example(100 + 3 * i, i % images, (i % images) / 3, word(rng.integers(1, 9)) + "?", word(rng.integers(1, 4)))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> Fake:
    return Fake(Config())


def parameters(model: Fake, batch: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    inputs = {k: v for k, v in batch.items() if k not in ("targets", "question")}
    keys = jax.random.split(jax.random.key(seed), 3)
    params = model.init(keys[0], **inputs, method="embed")["params"]
    hidden = model.apply({"params": params}, **inputs, method="embed")
    blocks = {f"blocks_{i}": model.block().init(keys[1 + i], hidden.x, hidden.context)["params"] for i in range(2)}
    return {**params, "decoder": blocks}


@partial(jax.jit, static_argnames="model")
def forward(model: Fake, params: Any, *inputs: Any) -> Any:
    hidden = model.apply({"params": params}, *inputs, method="embed")
    x = hidden.x
    for i in range(2):
        x = model.block().apply({"params": params["decoder"][f"blocks_{i}"]}, x, hidden.context)
    return model.apply({"params": params}, x, method="unembed")


def logits(model: Fake, params: Any, ids: list[int], picture: float) -> np.ndarray:
    """One question, alone, without packing, segments or the harness."""
    length = 64  # one compilation
    line = np.zeros((1, length), np.int32)
    line[0, : len(ids)] = ids
    mask, positions = np.arange(length)[None] < len(ids), np.arange(length, dtype=np.int32)[None]
    return np.asarray(forward(model, params, line, processor([picture]), mask, positions, 0 * line))[0, : len(ids)]


def generate(model: Fake, params: Any, start: list[int], picture: float, count: int) -> list[int]:
    ids = list(start)
    for _ in range(count):
        ids.append(int(np.argmax(logits(model, params, ids, picture)[-1])))
    return ids[len(start) :]


def start_of(p: Prompt) -> list[int]:
    return [*p.prefix, *[IMAGE] * IMAGE_LENGTH, *p.question]


def batches_of(examples: list[Example], **options: Any) -> list[dict[str, np.ndarray]]:
    options = {"batch_size": 3, "lengths": (48, 80)} | options
    return packed_batches(examples, Tokenizer(), processor, image_token="@", image_length=IMAGE_LENGTH, **options)


def planted(model: Fake, params: Any, examples: list[Example]) -> list[Example]:
    """Give a question the answer that the model generates, where that is one, so that right answers occur."""
    changed = []
    for e in examples:
        start = start_of(prompt(Tokenizer(), e.question, "", "@"))
        said = generate(model, params, start, e.image, 4)
        word = said[: said.index(END)] if END in said else []
        text = "".join(Tokenizer.letters[t] for t in word)
        changed.append(Example(e.number, e.image_id, e.image, e.question, text if text.isalpha() else e.answer))
    return changed


def test_packed_scores_are_those_of_each_question_alone(model: Fake) -> None:
    params, other = (parameters(model, batches_of(data())[0], seed) for seed in (2, 1))
    questions = planted(model, params, data(count=60))
    batches = batches_of(questions)
    reference = evaluate(model, params, batches)
    result = evaluate(model, other, batches, reference)
    assert result.question.tolist() == [e.number for e in questions]
    assert 0 < reference.correct.sum() < len(questions)
    assert reference.correct.sum() < reference.first_correct.sum()
    assert not reference.kl.any() and reference.agrees.all() and reference.agreement == 1
    for i, e in enumerate(questions):
        p = prompt(Tokenizer(), e.question, e.answer, "@")
        start, answer = start_of(p), list(p.answer)
        generated = generate(model, params, start, e.image, len(answer))
        log_p, log_q = (
            jax.nn.log_softmax(logits(model, tree, start + answer[:-1], e.image)[len(start) - 1 :]) for tree in (params, other)
        )
        assert reference.correct[i] == (generated == answer), e
        assert reference.first_correct[i] == (generated[0] == answer[0])
        tokens = result.token_question == e.number
        np.testing.assert_array_equal(result.predicted[tokens], log_q.argmax(-1))
        np.testing.assert_allclose(result.log_prob[tokens], log_q[np.arange(len(answer)), answer], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.kl[tokens], np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), rtol=1e-3, atol=1e-5)
        assert result.agrees[i] == np.array_equal(log_p.argmax(-1), log_q.argmax(-1))
    assert reference.accuracy == reference.correct.mean()
    assert reference.interval[0] < reference.accuracy < reference.interval[1] and reference.first_accuracy > reference.accuracy
    assert result.mean_kl == pytest.approx(result.kl.mean()) and result.perplexity > 1


def test_the_result_does_not_depend_on_the_packing(model: Fake) -> None:
    params = parameters(model, batches_of(data())[0], 0)
    results = [
        evaluate(model, params, batches_of(data(), batch_size=size, lengths=lengths))
        for size, lengths in ((3, (48, 80)), (1, (128,)), (16, (40, 256)))
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].question, other.question)
        np.testing.assert_array_equal(results[0].correct, other.correct)
        assert other.perplexity == pytest.approx(results[0].perplexity, rel=1e-5)


def test_typed_leaves_are_just_parameters(model: Fake) -> None:
    batches = batches_of(data())
    params = parameters(model, batches[0], 0)
    quantized = dict(params["decoder"])
    for name, block in params["decoder"].items():
        scale = jnp.max(jnp.abs(block["kernel"]), axis=0, keepdims=True) / 127
        quantized[name] = {"kernel": Scaled(jnp.round(block["kernel"] / scale).astype(jnp.int8), scale, 8)}
    result = evaluate(model, {**params, "decoder": quantized}, batches, evaluate(model, params, batches))
    assert 0 < result.mean_kl < 0.01


def test_blocks_share_one_executable(model: Fake) -> None:
    from splitq_jax.eval import harness

    batches = batches_of(data(), lengths=(88,))
    harness._block.clear_cache()
    for seed in range(3):
        evaluate(model, parameters(model, batches[0], seed), batches)
    assert harness._block._cache_size() == 1
    evaluate(Fake(Config()), parameters(model, batches[0], 0), batches)
    assert harness._block._cache_size() == 1


def test_bad_batches_are_refused(model: Fake) -> None:
    batches = batches_of(data())
    params = parameters(model, batches[0], 0)
    reference = evaluate(model, params, batches)
    with pytest.raises(InputError, match="no question"):
        evaluate(model, params, [])
    with pytest.raises(InputError, match="expected targets as well"):
        evaluate(model, params, [{k: v for k, v in batches[0].items() if k != "targets"}])
    with pytest.raises(InputError, match="other questions"):
        evaluate(model, params, batches_of(data(count=7)), reference)
    with pytest.raises(InputError, match="the reference has"):
        evaluate(model, params, batches[:1], reference)
    with pytest.raises(InputError, match="question 100 has its answer in two places"):
        evaluate(model, params, [batches[0] | {"question": np.full_like(batches[0]["question"], 100)}, *batches])
    broken = {**params, "table": params["table"].at[0, 0].set(jnp.nan)}
    with pytest.raises(InputError, match="not finite"):
        evaluate(model, broken, batches)


def test_a_row_by_hand() -> None:
    (batch,) = batches_of([Example(7, 0, 0.0, "c?", "d"), Example(9, 0, 0.0, "e", "fg")], lengths=(40,), batch_size=2)
    t = Tokenizer.letters.index
    # ^a: @@@@ | \n c ? $ \n ^ b : d $ | \n e $ \n ^ b : f g $
    ids = [t(c) for c in "^a:@@@@\nc?$\n^b:d$\ne$\n^b:fg$"]
    assert batch["input_ids"][0, : len(ids)].tolist() == ids
    assert batch["attention_mask"][0].tolist() == [True] * len(ids) + [False] * (40 - len(ids))
    assert batch["segments"][0, : len(ids)].tolist() == [0] * 7 + [1] * 10 + [2] * 10
    assert batch["positions"][0, : len(ids)].tolist() == [*range(7), *range(7, 17), *range(7, 17)]
    expected = np.full(40, -1)
    expected[[14, 15]] = t("d"), t("$")
    expected[[23, 24, 25]] = t("f"), t("g"), t("$")
    assert batch["targets"][0].tolist() == expected.tolist()
    assert batch["question"][0].tolist() == np.select([expected < 0, np.arange(40) < 17], [-1, 7], 9).tolist()
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["pixel_values"].dtype == np.float32
    assert (batch["targets"][1] == -1).all() and (batch["question"][1] == -1).all()  # fills the batch
    assert {k: v.dtype.name for k, v in batch.items() if k != "pixel_values"} == {
        **dict.fromkeys(("input_ids", "positions", "segments", "targets", "question"), "int32"),
        "attention_mask": "bool",
    }


def test_every_question_is_packed_once() -> None:
    questions = data(count=61, images=7)
    batches = batches_of(questions, lengths=(40, 64), batch_size=4)
    assert {b["input_ids"].shape for b in batches} <= {(4, 40), (4, 64)}
    seen = np.concatenate([np.unique(r[r >= 0]) for b in batches for r in b["question"]])
    assert sorted(seen.tolist()) == [e.number for e in questions]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="no question"):
        batches_of([])
    with pytest.raises(InputError, match="question 5 takes 41 tokens"):
        batches_of([Example(5, 0, 0.0, "a" * 26, "b")], lengths=(40,))


class Odd(Tokenizer):
    def __init__(self, template: Any) -> None:
        self.apply_chat_template = template  # type: ignore[method-assign]


def test_templates_that_do_not_fit_are_refused() -> None:
    whole = Tokenizer().apply_chat_template
    assert prompt(Tokenizer(), "a?", "b", "@") == Prompt((18, 0, 17), (19, 0, 16, 21, 19, 18, 1, 17), (1, 21))
    for template, message in (
        (lambda m, **k: whole(m, **k).replace("@", ""), "0 image placeholders"),
        (lambda m, **k: whole(m, **k) * 2, "2 image placeholders"),
        (lambda m, **k: ("" if k.get("add_generation_prompt") else "b") + whole(m, **k), "does not begin with"),
        (lambda m, **k: whole(m, **k).rstrip("$\n"), "does not end with"),
    ):
        with pytest.raises(InputError, match=message):
            prompt(Odd(template), "a?", "b", "@")


def test_records_are_numbered_and_decoded() -> None:
    found = list(examples([{"image": 1, "image_id": np.int64(4), "question": b"a?", "answer": "b"}] * 2))
    assert found == [Example(0, 4, 1, "a?", "b"), Example(1, 4, 1, "a?", "b")]
