"""Qwen3-VL (arXiv 2511.21631), as Hugging Face's ``Qwen3VLForConditionalGeneration``."""

from typing import Any

from splitq_jax.models.names import Spelling
from splitq_jax.models.qwen import QwenConfig, QwenNames, QwenVL, read
from splitq_jax.models.qwen_vision import QwenVisionConfig


class Qwen3VL(QwenVL):
    """A tower with learned positions, some of whose blocks feed the first decoder blocks (deepstack); each video frame is a picture."""

    names = QwenNames(
        "model.visual", "model.language_model", (("linear_fc1",), ("linear_fc2",)), ("norm", "linear_fc1", "linear_fc2")
    )
    spelling = Spelling()
    split_videos = True

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Qwen3VL":
        """Return the model of a ``config.json``.

        Raises:
          InputError: another model_type, or parts that are not supported.
        """
        whole, rest = read(config, "qwen3_vl", (24, 20, 20))
        c = whole["vision_config"]
        vision = QwenVisionConfig.from_hf(
            c,
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            out_size=c["out_hidden_size"],
            num_positions=c["num_position_embeddings"],
            deepstack=tuple(c["deepstack_visual_indexes"]),
        )
        return cls(QwenConfig(vision, **rest))
