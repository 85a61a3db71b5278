"""Qwen2.5-VL (arXiv 2502.13923), as Hugging Face's ``Qwen2_5_VLForConditionalGeneration``."""

from typing import Any

from splitq_jax.models.qwen import SPELLING, QwenConfig, QwenNames, QwenVL, read
from splitq_jax.models.qwen_vision import QwenVisionConfig


class Qwen25VL(QwenVL):
    """A tower with windows and a gated MLP; video frames lie apart as their time."""

    names = QwenNames("visual", "model", (("gate_proj", "up_proj"), ("down_proj",)), ("ln_q", "mlp.0", "mlp.2"))
    spelling = SPELLING

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Qwen25VL":
        """Return the model of a ``config.json``.

        Raises:
          InputError: another model_type, or parts that are not supported.
        """
        whole, rest = read(config, "qwen2_5_vl", (16, 24, 24))
        c = whole["vision_config"]
        vision = QwenVisionConfig.from_hf(
            c,
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            out_size=c["out_hidden_size"],
            gated=True,
            window_size=c["window_size"],
            full_blocks=tuple(c["fullatt_block_indexes"]),
        )
        return cls(QwenConfig(vision, **rest, tokens_per_second=c["tokens_per_second"]))
