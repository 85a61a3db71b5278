"""Generation: greedy answers against transformers' own, what is drawn against its warpers, and what is compiled."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_models_parity import CASES, IMAGE, batch_of, load, reference
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration as HfLlava
from transformers import MistralConfig, SiglipVisionConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from twins import tensors

import splitq_jax as sq
from splitq_jax import calib, models
from splitq_jax.errors import InputError
from splitq_jax.kernels.layout import native
from splitq_jax.mocd import SplitSize
from splitq_jax.models import cache, sampling
from splitq_jax.models.generate import _round_up, advance, prefill
from splitq_jax.models.llava import Llava, LlavaConfig
from splitq_jax.models.sampling import Sampling
from splitq_jax.quantization import kernels

TOKENS = 32
torch.set_num_threads(1)  # more would wait for each other


def told(hf: Any, batch: dict[str, np.ndarray], count: int = TOKENS) -> np.ndarray:
    out = hf.generate(**tensors(batch), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return np.asarray(out[:, batch["input_ids"].shape[1] :])


def windowed() -> Any:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = MistralConfig(
        vocab_size=320,
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=7,
    )
    config = HfConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_select_strategy="full")
    model = HfLlava(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model


def recomputed(model: Any, params: Any, batch: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Greedy tokens of the plain loop over whole forwards; the positions given are continued by one a token."""
    forward = jax.jit(lambda b: jnp.argmax(model.apply({"params": params}, **b)[:, -1], axis=-1))
    ids, mask, positions = (np.asarray(batch[k]) for k in ("input_ids", "attention_mask", "positions"))
    gap = ((0, 0), (count, 0))
    ids, mask = np.pad(ids, gap, constant_values=1), np.pad(mask, gap)
    positions = np.pad(positions, (*gap, *((0, 0),) * (positions.ndim - 2)))
    for _ in range(count):
        token = np.asarray(forward(batch | {"input_ids": ids, "attention_mask": mask, "positions": positions}))
        following = positions[:, -1:] + 1
        ids, mask, positions = (
            np.concatenate([a[:, 1:], b], axis=1).astype(a.dtype)
            for a, b in ((ids, token[:, None]), (mask, np.ones((len(ids), 1), bool)), (positions, following))
        )
    return ids[:, -count:]


# --- greedy


@pytest.mark.parametrize("case", ["clip-gqa-uneven-image", "siglip-seven-to-one-head-dim-llama3", "window"])
def test_greedy_answers(case: str, tmp_path: Path) -> None:
    hf = windowed() if case == "window" else reference(**CASES[case])
    model, params = load(hf, tmp_path / "model")
    assert (model.config.text.window is not None) == (case == "window")
    batch = batch_of(model, [1, 2, 0], [0, 0, 3])
    theirs = told(hf, batch)
    assert len(np.unique(theirs)) > 3
    lists = {name: value.tolist() for name, value in batch.items()}
    np.testing.assert_array_equal(np.stack(models.generate(model, params, lists, TOKENS)), theirs)
    assert [len(row) for row in models.generate(model, params, batch, 1)] == [1, 1, 1]


def test_each_row_ends_alone(tmp_path: Path) -> None:
    model, params = load(reference(), tmp_path / "model")
    batch = batch_of(model, [1, 2, 0], [0, 0, 3])
    whole = np.stack(models.generate(model, params, batch, TOKENS))
    for stops in ({int(whole[0, 4]), int(whole[1, 7])}, {int(t) for t in whole[:, 0]}, set(whole[2, :3].tolist())):
        ends = [next((i for i, token in enumerate(row) if int(token) in stops), TOKENS) for row in whole]
        heard: list[np.ndarray] = []
        streamed = models.generate(model, params, batch, TOKENS, stop_ids=stops, on_token=heard.append)
        stopped = models.generate(model, params, batch, TOKENS, stop_ids=stops)
        assert len(heard) == min(max(ends) + 1, TOKENS)
        for i, (row, end) in enumerate(zip(whole, ends, strict=True)):
            np.testing.assert_array_equal(stopped[i], row[:end])
            np.testing.assert_array_equal(streamed[i], row[:end])
            said = np.array([tokens[i] for tokens in heard])
            np.testing.assert_array_equal(said, np.where(np.arange(len(heard)) < end, row[: len(heard)], -1))


def test_a_placeholder_that_the_model_writes_is_a_token(tmp_path: Path) -> None:
    hf = reference()
    with torch.no_grad():
        hf.lm_head.weight[IMAGE] = hf.lm_head.weight[IMAGE] * 0 + 5 * hf.lm_head.weight.abs().max()
        hf.model.language_model.norm.weight.abs_()
    model, params = load(hf, tmp_path / "model")
    batch = batch_of(model, [1, 0], [0, 0])
    theirs = told(hf, batch, 6)
    assert (theirs[:, :-1] == IMAGE).any()
    np.testing.assert_array_equal(np.stack(models.generate(model, params, batch, 6)), theirs)


def test_three_positions_a_token() -> None:
    text = tiny.CONFIG["text_config"] | {"rope_parameters": {"rope_theta": 100.0, "mrope_section": [2, 1, 1]}}
    model, (_, params) = Llava(LlavaConfig.from_hf(tiny.CONFIG | {"text_config": text})), tiny.model_and_params()
    assert model.config.text.ropes[0].axes == 3
    batch = tiny.batches(1, rows=2)[0]
    batch["attention_mask"] = np.arange(14) >= np.array([[0], [2]])
    batch["input_ids"][1, :2], batch["input_ids"][1, 2:6] = 1, tiny.IMAGE
    batch["positions"] = np.random.default_rng(0).integers(0, 9, (2, 14, 3)).astype(np.int32)
    ours = np.stack(models.generate(model, params, batch, 12))
    np.testing.assert_array_equal(ours, recomputed(model, params, batch, 12))
    flat = batch | {"positions": np.broadcast_to(np.arange(14, dtype=np.int32)[None, :, None], (2, 14, 3))}
    assert (ours != np.stack(models.generate(model, params, flat, 12))).any()


def test_quantized_parameters() -> None:
    """Codes unpacked ahead are the same codes, in the order in which ``down`` reads, and the loop gives the tokens of whole forwards."""
    model, params = tiny.model_and_params()
    recipe = sq.recipes.splitq("w4a4").replace(split=SplitSize(0.06, 2))
    batches = tiny.batches(2)
    quantized = sq.quantize(params, calib.collect(model, params, batches, recipe.split), recipe)
    batch = batches[0] | {"attention_mask": np.ones((4, 14), bool)}
    batch["positions"] = np.broadcast_to(np.arange(14, dtype=np.int32)[None, :, None], (4, 14, 1))
    forward = jax.jit(lambda p: model.apply({"params": p}, **batch))
    ahead = native(quantized)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (native(ahead), ahead)), strict=True))  # done once
    for path, other in kernels(quantized).items():
        one = kernels(ahead)[path]
        if not isinstance(other, sq.SplitWeight):
            continue
        order = np.arange(other.shape[1])
        if path.endswith("gate_up"):
            perm = np.asarray(kernels(quantized)[path.replace("gate_up", "down")].perm)
            order = np.concatenate([perm, perm + len(perm)])
        assert (one.perm is None) == path.endswith("down")
        for a, b in zip(
            (*(g.w for g in one.groups), one.branches.v), (*(g.w for g in other.groups), other.branches.v), strict=True
        ):
            assert a.bits == 8 and len(a.words) == 1 and a.words[0].dtype == jnp.int8
            np.testing.assert_array_equal(a.codes(), np.asarray(b.codes())[:, order])
            np.testing.assert_array_equal(a.decode(), np.asarray(b.decode())[:, order])
    found, wanted = forward(ahead), forward(quantized)  # two programs, whose float32 steps round apart
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    ours = np.stack(models.generate(model, quantized, batch, 12))
    np.testing.assert_array_equal(ours, recomputed(model, quantized, batch, 12))
    assert (ours != np.stack(models.generate(model, params, batch, 12))).any()


# --- compilation


def test_other_lengths_and_numbers_compile_nothing_anew(tmp_path: Path) -> None:
    model, params = load(reference(), tmp_path / "model")

    def run(length: int, count: int, **options: Any) -> None:
        models.generate(model, params, batch_of(model, [1, 0], [0, 2], length=length), count, **options)

    run(8, 20, stop_ids=(1,))
    sampled = {"temperature": 0.7, "top_p": 0.9, "seed": 1}
    run(8, 20, **sampled)
    before = prefill._cache_size(), advance._cache_size()
    run(3, 9, stop_ids=(4, 5, 6))
    run(12, 2)
    run(5, 1, on_token=print)
    run(11, 13, on_token=lambda tokens: None)
    run(9, 25, temperature=1.3, top_p=0.5, seed=7)
    assert (prefill._cache_size(), advance._cache_size()) == before
    run(60, 2)
    assert (prefill._cache_size(), advance._cache_size()) == (before[0] + 1, before[1] + 1)


def test_lengths_are_rounded_up_by_a_quarter_at_most() -> None:
    rounded = [_round_up(n) for n in range(1, 5000)]
    assert all(r >= n and r - n < max(32, n / 4) for n, r in enumerate(rounded, 1))
    assert rounded == sorted(rounded) and len(set(rounded)) < 40
    assert [_round_up(n) for n in (1, 32, 33, 256, 257, 1025)] == [32, 32, 64, 256, 320, 1280]


# --- drawing


def filtered(logits: np.ndarray, count: int | None = None, **options: Any) -> tuple[np.ndarray, bool]:
    """The logits that can be drawn, in the order of the vocabulary."""
    s = Sampling.of(**options)
    scaled = jnp.asarray(logits) / s.temperature
    kept, tokens, whole = s.candidates(scaled, logits.shape[1] if count is None else count)
    out = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(out, np.asarray(tokens), np.asarray(kept), axis=1)
    return out, bool(whole)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.01},
        {"temperature": 2.5, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0.3, "top_k": 1},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 1000, "top_p": 0.5},
    ],
    ids=str,
)
def test_the_candidates_are_those_of_transformers(options: dict[str, Any]) -> None:
    logits = (np.random.default_rng(0).standard_normal((64, 320)) * np.linspace(0.1, 6, 64)[:, None]).astype(np.float32)
    theirs = TemperatureLogitsWarper(options["temperature"])(None, torch.tensor(logits))
    if "top_k" in options:
        theirs = TopKLogitsWarper(options["top_k"])(None, theirs)
    if "top_p" in options:
        theirs = TopPLogitsWarper(options["top_p"])(None, theirs)
    ours, _ = filtered(logits, **options)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)  # -inf is equal to itself alone
    for count in (3, 50, 200):  # a shorter look is whole only if it finds the same
        short, whole = filtered(logits, count, **options)
        same = np.array_equal(np.isfinite(short), np.isfinite(ours))
        assert same or not whole
        assert whole or max(options.get("top_k", 0), np.isfinite(ours).sum(axis=1).max()) >= count


def test_ties_at_the_last_place_of_top_k_are_kept() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    ours, _ = filtered(logits, temperature=1.0, top_k=2)
    assert np.isfinite(ours[0]).tolist() == [False, True, True, True, True, False]
    short, whole = filtered(logits, 3, temperature=1.0, top_k=2)
    assert not whole and np.isfinite(short).sum() == 3


@pytest.mark.parametrize("short", [1024, 4])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.95}], ids=str)
def test_frequencies(options: dict[str, Any], short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SHORT", short)
    logits = np.random.default_rng(3).standard_normal(24).astype(np.float32) * 2
    s, draws = Sampling.of(1.5, **options), 40_000
    wanted = torch.softmax(torch.tensor(filtered(logits[None], temperature=1.5, **options)[0][0]), 0).numpy()
    keys = jax.random.split(jax.random.key(0), 10)
    many = jnp.broadcast_to(jnp.asarray(logits), (draws // 10, 24))
    drawn = np.concatenate([np.asarray(jax.jit(s.draw)(key, many)) for key in keys])
    found = np.bincount(drawn, minlength=24) / draws
    assert not found[wanted == 0].any()
    spread = np.sqrt(wanted * (1 - wanted) / draws)
    assert (np.abs(found - wanted) <= 4.5 * spread).all()  # 1 in 100,000 a token by chance


def test_sampled_answers(tmp_path: Path) -> None:
    model, params = load(reference(), tmp_path / "model")
    batch = batch_of(model, [1, 2, 0], [0, 0, 3])
    greedy = np.stack(models.generate(model, params, batch, 12))

    def say(**options: Any) -> np.ndarray:
        return np.stack(models.generate(model, params, batch, 12, **options))

    np.testing.assert_array_equal(say(temperature=1.0, top_k=1), greedy)
    np.testing.assert_array_equal(say(temperature=1.0, top_p=1e-9, seed=3), greedy)
    once = say(temperature=2.0, top_p=0.95, seed=3)
    np.testing.assert_array_equal(say(temperature=2.0, top_p=0.95, seed=3), once)
    np.testing.assert_array_equal(say(temperature=2.0, top_p=0.95, seed=3, on_token=lambda tokens: None), once)
    assert (say(temperature=2.0, top_p=0.95, seed=4) != once).any() and (once != greedy).any()
    assert (once[:, 1:] != once[:, :-1]).any(axis=1).all()  # each step has a key of its own


# --- the int8 cache


def test_int8_keys_lie_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((2, 5, 3, 8)).astype(np.float32) * scale for scale in (3.0, 0.01))
    k[0, 1, 2] = 0
    box = cache.empty((2, 9, 3, 8), jnp.float32, 8).write(jnp.asarray(k), jnp.asarray(v), 2)
    for told_, true in zip(box.read(), (k, v), strict=True):
        assert told_.shape == (2, 9, 3, 8) and not np.asarray(told_)[:, [0, 1, 7, 8]].any()
        step = np.abs(true).max(axis=-1, keepdims=True) / 127
        error = np.abs(np.asarray(told_)[:, 2:7] - true)
        assert (error <= step / 2 * (1 + 1e-5)).all() and error.max() > step.max() / 4
    assert {leaf.dtype for leaf in (box.k, box.v)} == {jnp.dtype(jnp.int8)}
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(box)) == 2 * 2 * 9 * 3 * (8 + 4)


def test_answers_from_an_int8_cache(tmp_path: Path) -> None:
    """Not the same tokens, whose logits may be close, but logits within the rounding of the cache."""
    model, params = load(reference(), tmp_path / "model")
    batch = batch_of(model, [1, 0], [0, 2])
    length = batch["input_ids"].shape[1]

    @partial(jax.jit, static_argnums=0)
    def from_cache(bits: int) -> Any:
        """Logits of the last token, which alone reads the caches."""
        hidden = model.apply({"params": params}, **batch, method="embed")
        x = hidden.x
        for i in range(2):
            block, box = {"params": params["decoder"][f"blocks_{i}"]}, cache.empty((2, length, 2, 8), jnp.float32, bits)
            before, box = model.block(i).apply(block, x[:, :-1], _part(hidden.context, 0, length - 1), box)
            last, box = model.block(i).apply(block, x[:, -1:], _part(hidden.context, length - 1, length), box, length - 1)
            x = jnp.concatenate([before, last], axis=1)
        return model.apply({"params": params}, x[:, -1], method="unembed")

    logits = {bits: np.asarray(from_cache(bits)) for bits in (16, 8)}
    whole = np.asarray(jax.jit(lambda: model.apply({"params": params}, **batch))())[:, -1]
    np.testing.assert_allclose(logits[16], whole, atol=1e-5 * np.abs(whole).max())
    error = np.abs(logits[8] - whole).max() / np.abs(whole).max()
    assert 1e-5 < error < 0.02, error
    rows = models.generate(model, params, batch, 12, kv_bits=8)
    assert [len(row) for row in rows] == [12, 12]


def _part(context: Any, start: int, stop: int) -> Any:
    seen = stop if start == 0 else context.mask.shape[-1]
    return context.replace(
        positions=context.positions[:, start:stop],
        mask=context.mask[:, :, start:stop, :seen],
        is_text=context.is_text[:, start:stop],
        valid=context.valid[:, start:stop],
    )


# --- what is refused, and where answers end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1e-9}, "temperature 1e-09"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_k": 0, "temperature": 1.0}, "top_k 0"),
        ({"kv_bits": 4}, "kv_bits 4"),
        ({"seed": -1}, "seed -1"),
        ({"stop_ids": ("</s>",)}, "stop_ids"),
    ],
    ids=str,
)
def test_numbers_that_are_refused(options: dict[str, Any], message: str) -> None:
    model, params = tiny.model_and_params()
    batch = {"input_ids": np.array([[1, 2, 3]], np.int32)}
    with pytest.raises(InputError, match=message):
        models.generate(model, params, batch, **{"max_new_tokens": 2, **options})


def test_rows_that_are_refused() -> None:
    model, params = tiny.model_and_params()
    ids = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    wrong = {
        "padding at the end": {"attention_mask": np.array([[True, True, True], [True, True, False]])},
        "segments": {"segments": np.zeros((2, 3), np.int32)},
        r"attention_mask: shape \(2, 2\)": {"attention_mask": np.ones((2, 2), bool)},
        "token id 96": {"input_ids": ids + 92},
        "input_ids": {"input_ids": ids[0]},
        "image placeholders": {"input_ids": np.full((1, 4), tiny.IMAGE, np.int32)},
    }
    for message, change in wrong.items():
        with pytest.raises(InputError, match=message):
            models.generate(model, params, {"input_ids": ids, **change}, 2)


def test_where_answers_end(tmp_path: Path) -> None:
    def written(generation: Any, config: Any) -> tuple[int, ...]:
        for name, value in (("generation_config.json", generation), ("config.json", config)):
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                (tmp_path / name).write_text(json.dumps(value))
        return models.stop_ids(tmp_path)

    assert written({"eos_token_id": [2, 7]}, {"eos_token_id": 5}) == (2, 7)
    assert written({"eos_token_id": 2}, None) == (2,)
    assert written({"pad_token_id": 2}, {"eos_token_id": 5}) == (5,)
    assert written(None, {"text_config": {"eos_token_id": [0, 5]}}) == (0, 5)
    assert written(None, {}) == ()
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id 'x'"):
        written({"eos_token_id": "x"}, {})
