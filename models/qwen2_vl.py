"""Qwen2-VL (arXiv 2409.12191), as Hugging Face's ``Qwen2VLForConditionalGeneration``."""

from typing import Any

from splitq_jax.models.qwen import SPELLING, QwenConfig, QwenNames, QwenVL, read
from splitq_jax.models.qwen_vision import QwenVisionConfig


class Qwen2VL(QwenVL):
    """A tower of plain blocks; video frames count one temporal position each."""

    names = QwenNames("visual", "model", (("fc1",), ("fc2",)), ("ln_q", "mlp.0", "mlp.2"))
    spelling = SPELLING

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Qwen2VL":
        """Return the model of a ``config.json``.

        Raises:
          InputError: another model_type, or parts that are not supported.
        """
        whole, rest = read(config, "qwen2_vl", (16, 24, 24))
        c = whole["vision_config"]
        vision = QwenVisionConfig.from_hf(
            c, hidden_size=c["embed_dim"], intermediate_size=int(c["embed_dim"] * c["mlp_ratio"]), out_size=c["hidden_size"]
        )
        return cls(QwenConfig(vision, **rest))
