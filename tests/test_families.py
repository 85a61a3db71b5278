"""Every family end to end, on a tiny random model: folder, processor, calibration, quantization of decoder and tower, generation."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from families import build
from processors import FAMILY, picture, placeholders

import splitq_jax as sq
from splitq_jax import calib, models, quantization, recipes
from splitq_jax import eval as evaluation
from splitq_jax.calib import blocks
from splitq_jax.calib.jsonl import Jsonl
from splitq_jax.calib.reconstruction import FitConfig
from splitq_jax.mocd import SplitSize
from splitq_jax.models.families import FAMILIES
from splitq_jax.pipeline import Setup, inputs, quantized

pytestmark = pytest.mark.slow
SIZES = [(23, 19), (40, 9), (8, 30), (16, 16), (9, 9), (30, 30)]
QUESTIONS = ["what is this?", "what?", "and that?", "is this blue?", "no", "what is that?"]
SPLIT = SplitSize(rate=0.06, align=2)
# frames of 8 x 8 or 12 x 12 pixels, and the placeholders that they take
VIDEOS: dict[str, tuple[dict[str, np.ndarray], int]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        ({"pixel_values_videos": np.ones((8, 96), np.float32), "video_grid_thw": np.array([[2, 2, 2]], np.int32)}, 2),
    ),
    "llava_onevision": ({"pixel_values_videos": np.ones((1, 2, 3, 12, 12), np.float32)}, 9),
}


def test_every_family_has_a_builder() -> None:
    assert set(FAMILIES) <= set(FAMILY)


@pytest.fixture(scope="module", params=list(FAMILY))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Setup]:
    kind = request.param
    if kind not in FAMILIES:
        pytest.skip(f"{kind} is not registered")
    root = tmp_path_factory.mktemp(kind)
    lines = []
    for i, (size, question) in enumerate(zip(SIZES, QUESTIONS, strict=True)):
        picture(*size, i).save(root / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": question, "answer": "red" if i % 2 else "blue this"})
    (root / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return kind, Setup.open(build(root / "model", kind), Jsonl(root / "set.jsonl"))


def count(kind: str, ids: np.ndarray) -> np.ndarray:
    return np.isin(ids, placeholders(kind)).sum(axis=-1)


def embedded(setup: Setup, batch: Any) -> Any:
    (hidden,) = blocks.embed(setup.model, setup.params, [batch])
    return hidden.context


def test_end_to_end(family: tuple[str, Setup]) -> None:
    kind, setup = family
    model, params, processor = setup.model, setup.params, setup.processor
    batches = setup.calibration(len(SIZES), seed=0)
    (batch,) = batches
    # text and vision, counted against the processor's placeholders
    context = embedded(setup, batch)
    expected = [
        count(kind, processor.inputs(q, setup.data.records("")[i]["image"])["input_ids"][0]) for i, q in enumerate(QUESTIONS)
    ]
    assert (context.valid & ~context.is_text).sum(axis=1).tolist() == expected
    assert (context.valid & context.is_text).sum() == batch["attention_mask"].sum() - sum(expected)
    if kind not in {"llava", "gemma3"}:
        assert len(set(expected)) > 1  # images of several lengths
    # every site of decoder and tower has statistics
    stats = calib.collect(model, params, batches, SPLIT, vision_tower=True, gram=True)
    decoder = {path.split("/")[2] for path in stats if path.startswith("decoder/blocks_1/")}
    tower = {path.split("/")[-1] for path in stats if path.startswith("vision/blocks_0/")}
    assert decoder == {"qkv", "o", "gate_up", "down"}
    assert tower in ({"qkv", "o", "fc1", "fc2"}, {"qkv", "o", "gate_up", "down"})
    columns = model.config.text.layer_columns
    for path in stats:
        found, (rows, width) = quantization.layer_columns(params, path), quantization.kernels(params)[path].shape
        assert sum(found) == width and stats[path].absmax.shape == (3, rows) and stats[path].gram.shape == (rows, rows)
        assert not path.startswith("decoder/") or found == columns[path.split("/")[-1]]
    recipe = recipes.splitq("w4a4").replace(split=SPLIT, vision="w4a4", cws_rate=0.1, mac_rate=0.1, svd_per="layer")
    made = sq.quantize(params, stats, recipe)
    assert {s.path for s in sq.summarize(made)} == set(stats)
    # questions with several images, with one, without; and images alone
    asked = processor(["what is this?", "no", ""], [[picture(), picture(40, 9, 1)], None, picture(8, 30, 2)])
    answers = models.generate(model, made, asked, 4)
    assert all(len(row) == 4 and (row < model.config.text.vocab_size).all() for row in answers)
    logits, given = (np.asarray(_forward(model, tree, model.prepare(asked))) for tree in (made, params))
    assert [row[0] for row in answers] == logits[:, -1].argmax(axis=-1).tolist()
    mask = asked["attention_mask"]
    assert np.isfinite(logits[mask]).all() and 0 < np.mean((logits - given)[mask] ** 2) < np.mean(given[mask] ** 2)
    # the tower stays as it is
    kept = sq.quantize(params, stats, recipe.replace(vision="float"))
    assert {s.path.split("/")[0] for s in sq.summarize(kept)} == {"decoder"}
    assert jax.tree.all(jax.tree.map(np.array_equal, kept["vision"], params["vision"]))
    if kind == "llava":  # GPTQ reads the tower's Gram matrices, too
        sq.quantize(params, stats, recipes.gptq("w4a4").replace(vision="w4a4"))
    if kind in {"gemma3", "qwen3_vl"}:  # windows; three positions and deepstack: all that a block may read is trained with
        errors = quantized(setup, stats, recipe.replace(vision="float"), FitConfig(steps=1), batches).errors
        assert len(errors) == 2 and np.isfinite([(e.before, e.after) for e in errors]).all()


def _forward(model: Any, params: Any, prepared: Any) -> Any:
    return jax.jit(lambda p, b: model.apply({"params": p}, **b))(params, prepared)


def test_text_and_vision_of_several_images_between_texts(family: tuple[str, Setup]) -> None:
    kind, setup = family
    image, text = {"type": "image"}, {"type": "text", "text": "what is this?"}
    chats = [[{"role": "user", "content": content}] for content in ([text, image, text, image], [text], [image])]
    batch = setup.processor.chats(chats, [[picture(), picture(40, 9, 1)], [], [picture(8, 30, 2)]])
    context = embedded(setup, batch)
    vision = np.isin(batch["input_ids"], placeholders(kind))
    assert (vision.sum(axis=1) > 0).tolist() == [True, False, True]
    np.testing.assert_array_equal(context.is_text, batch["attention_mask"] & ~vision)
    np.testing.assert_array_equal(context.valid, batch["attention_mask"])


def test_text_and_vision_of_a_video(family: tuple[str, Setup]) -> None:
    kind, setup = family
    if kind not in VIDEOS:
        pytest.skip(f"{kind} takes frames as images")
    arrays, taken = VIDEOS[kind]
    text = setup.processor.inputs("what is this?")["input_ids"][0].tolist()
    between = [] if kind != "qwen3_vl" else [text[0]]  # a frame's time
    half = taken // 2
    video = [placeholders(kind)[1]] * half + between + [placeholders(kind)[1]] * (taken - half)
    images = setup.processor.inputs("what?", picture())
    row = images["input_ids"][0].tolist() + text[:3] + video + text[3:]
    batch = {"input_ids": np.array([row], np.int32), **setup.processor.vision([picture()]), **arrays}
    context = embedded(setup, batch)
    assert (~context.is_text).sum() == count(kind, images["input_ids"]).sum() + taken
    np.testing.assert_array_equal(context.is_text, ~np.isin(batch["input_ids"], placeholders(kind)))


class Shared:
    """Records with two questions an image."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def records(self, split: str, images: Any = None) -> list[dict[str, Any]]:
        return [r | {"question": q} for r in self.data.records(split, images) for q in (r["question"], "and that?")]


def test_questions_behind_one_image_are_those_of_rows_alone(family: tuple[str, Setup]) -> None:
    """Packed, padded on the right, with images of several lengths, against a row a question."""
    kind, setup = family
    model, params, processor = setup.model, setup.params, setup.processor
    records = Shared(setup.data).records("")
    batches = setup.batches(records, 4)
    assert all(b["segments"].max() == 2 for b in batches) and [len(b["input_ids"]) for b in batches] == [4, 4]
    result = evaluation.evaluate(model, params, batches)
    assert result.question.tolist() == list(range(len(records)))
    rows = []
    for record in records:
        asked, told = processor.exchange(record["question"], record["image"], record["answer"])
        end = next(i for i, token in enumerate(told) if i >= len(asked) and token in processor.stop_ids)
        rows.append((len(asked), told[: end + 1]))
    width = max(len(told) for _, told in rows)
    alone = {
        "input_ids": np.array([[*told, *[0] * (width - len(told))] for _, told in rows], np.int32),
        "attention_mask": np.array([[True] * len(told) + [False] * (width - len(told)) for _, told in rows]),
        **processor.vision([record["image"] for record in records]),
    }
    log_prob = np.asarray(jax.nn.log_softmax(_forward(model, params, model.prepare(alone))))
    for number, (start, told) in enumerate(rows):
        expected = log_prob[number, np.arange(start - 1, len(told) - 1), list(told[start:])]
        np.testing.assert_allclose(result.log_prob[result.token_question == number], expected, rtol=1e-4, atol=1e-4)
    with_positions = ["positions" in inputs(b) for b in batches]
    assert set(with_positions) == {not kind.startswith("qwen")}


def test_the_folder_of_a_quantized_model_asks_alike(family: tuple[str, Setup], tmp_path: Path) -> None:
    _, setup = family
    models.copy_processor(setup.data.path.parent / "model", tmp_path)
    one, other = setup.processor.inputs("what?", picture()), models.Processor.from_folder(tmp_path).inputs("what?", picture())
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
