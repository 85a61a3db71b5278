"""Vision-language models in Flax, read from Hugging Face's folders."""

from splitq_jax.models.convert import deferred as deferred
from splitq_jax.models.convert import export as export
from splitq_jax.models.convert import is_converted as is_converted
from splitq_jax.models.convert import load as load
from splitq_jax.models.generate import generate as generate
from splitq_jax.models.inputs import Processor as Processor
from splitq_jax.models.inputs import stop_ids as stop_ids
from splitq_jax.models.pictures import open_image as open_image
from splitq_jax.models.processors import copy_processor as copy_processor
