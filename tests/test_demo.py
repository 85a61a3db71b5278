"""The demo VLMs: base and factors give the stated accuracy, and transformers reads the same folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from splitq_jax import demo_model, models
from splitq_jax.calib.easy_vqa import EasyVqa
from splitq_jax.errors import InputError
from splitq_jax.eval import evaluate
from splitq_jax.eval.metrics import wilson
from splitq_jax.models import smollm2
from splitq_jax.pipeline import Setup, inputs

ASSETS = sorted((Path(demo_model.__file__).parent / "assets").glob("*.safetensors"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EasyVqa:
    return EasyVqa(tmp_path_factory.mktemp("data"))


def opened(asset: Path, folder: Path, data: EasyVqa) -> tuple[Setup, dict[str, str]]:
    size, seed = asset.stem.split("_seed")
    demo_model.build(size, folder / "model", seed=int(seed))
    with safe_open(asset, "numpy") as f:
        return Setup.open(folder / "model", data), f.metadata()


def test_trainings_of_both_sizes_are_shipped() -> None:
    assert {"demo_seed0", "demo_seed1", "smolvlm_seed0"} <= {a.stem for a in ASSETS}
    with pytest.raises(InputError, match="not shipped"):
        demo_model.Asset("demo", 99).open()


@pytest.mark.parametrize("asset", ASSETS, ids=lambda a: a.stem)
def test_the_stated_accuracy(asset: Path, tmp_path: Path, data: EasyVqa) -> None:
    setup, stated = opened(asset, tmp_path, data)
    assert float(stated["test"]) >= 0.93
    result = evaluate(setup.model, setup.params, setup.questions("test", 100 if asset.stem.startswith("smolvlm") else 300))
    low, high = wilson(int(result.correct.sum()), result.correct.size, z=3.3)  # 1 in 1,000 by chance
    assert low <= float(stated["test"]) <= high


def test_transformers_reads_the_same_folder(tmp_path: Path, data: EasyVqa) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    setup, _ = opened(ASSETS[0], tmp_path, data)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    records = data.records("test", range(2))[:3]
    batch = setup.processor([r["question"] for r in records], [r["image"] for r in records])
    tensors = {k: torch.tensor(v.astype(np.int64) if v.dtype != np.float32 else v) for k, v in batch.items()}
    with torch.no_grad():
        reference = theirs(**tensors).logits.numpy()
        told = theirs.generate(**tensors, max_new_tokens=6, do_sample=False).numpy()[:, batch["input_ids"].shape[1] :]
    ours = np.asarray(setup.model.apply({"params": setup.params}, **batch))
    shown = batch["attention_mask"]
    np.testing.assert_allclose(ours[shown], reference[shown], atol=1e-4 * np.abs(reference).max())
    said = models.generate(setup.model, setup.params, batch, 6, stop_ids=(2,))
    for tokens, row, record in zip(said, told, records, strict=True):
        assert list(row[: len(tokens)]) == list(tokens)
        assert setup.processor.tokenizer.decode(tokens).strip() == record["answer"]


def test_calibration_draws_images(tmp_path: Path, data: EasyVqa) -> None:
    setup, _ = opened(ASSETS[0], tmp_path, data)
    (batch,) = setup.calibration(6, seed=1)
    again, other = setup.calibration(6, seed=1)[0], setup.calibration(6, seed=2)[0]
    assert all(np.array_equal(batch[k], again[k]) for k in batch)
    assert not np.array_equal(batch["pixel_values"], other["pixel_values"])
    assert batch["pixel_values"].shape == (6, 3, 64, 64) and set(batch) == set(inputs(batch))
    assert ((batch["input_ids"] == setup.model.config.image_token_id).sum(axis=1) == setup.model.config.tokens_per_image).all()
    assert {tuple(p.ravel()[:9]) for p in batch["pixel_values"]}.__len__() > 1
    drawn = [row for batch in setup.calibration(22, seed=0) for row in batch["pixel_values"]]  # no number of whole sixteens
    assert len({image.tobytes() for image in drawn}) == len(drawn) == 22
    with pytest.raises(InputError, match="--samples 3601"):
        setup.calibration(3601, seed=0)


def test_another_base(tmp_path: Path) -> None:
    """A SmolLM2 folder in Hugging Face's format gives the decoder that the GGUF gives."""
    from safetensors.numpy import save_file

    params = smollm2.decoder_params(smollm2.gguf_path(), 1)
    block = params["blocks_0"]
    q, k, v = np.split(block["qkv"]["kernel"].T, [576, 768])
    gate, up = np.split(block["gate_up"]["kernel"].T, 2)
    named = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate, "mlp.up_proj": up}
    named |= {"self_attn.o_proj": block["o"]["kernel"].T, "mlp.down_proj": block["down"]["kernel"].T}
    named |= {"input_layernorm": block["norm_attn"]["scale"], "post_attention_layernorm": block["norm_mlp"]["scale"]}
    tensors = {f"model.layers.0.{n}.weight": w for n, w in named.items()}
    tensors |= {"model.embed_tokens.weight": params["embed"]["embedding"][:-1], "model.norm.weight": params["norm"]["scale"]}
    save_file({n: np.ascontiguousarray(w) for n, w in tensors.items()}, tmp_path / "model.safetensors")
    files = smollm2.tokenizer_files(smollm2.gguf_path())
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(files["tokenizer.json"].decode())
    found = smollm2.decoder_params_hf(tmp_path, 1)
    assert found.keys() == params.keys()
    np.testing.assert_array_equal(found["blocks_0"]["qkv"]["kernel"], block["qkv"]["kernel"])
    np.testing.assert_array_equal(found["embed"]["embedding"], params["embed"]["embedding"])
    assert plain.token_to_id("<image>") == 49152
    with pytest.raises(InputError, match=r"layers\.1\.input_layernorm"):
        smollm2.decoder_params_hf(tmp_path, 2)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        smollm2.tokenizer_files_hf(tmp_path)
