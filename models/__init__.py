"""Vision-language models in Flax, read from Hugging Face's folders."""

from splitq_jax.models.convert import export as export
from splitq_jax.models.convert import load as load
from splitq_jax.models.generate import generate as generate
from splitq_jax.models.generate import stop_ids as stop_ids
from splitq_jax.models.inputs import Processor as Processor
from splitq_jax.models.inputs import copy_processor as copy_processor
from splitq_jax.models.inputs import open_image as open_image
