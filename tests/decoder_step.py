"""A step of decoding through quantized blocks of a 7B model: shapes alone, for compilers."""

from typing import Any

import jax
from tpu_targets import array, site, sites_of

from splitq_jax.models.cache import KVCache
from splitq_jax.models.generate import State
from splitq_jax.models.llava import Llava, LlavaConfig
from splitq_jax.quantization import kernels, replace_kernels


def decoder_step(layers: int = 2, rows: int = 16, room: int = 1024) -> tuple[Any, Any, State]:
    """Return the model, its bfloat16 parameters with W4A4 sites, and the state before `advance`."""
    config = LlavaConfig.from_hf({"model_type": "llava", "text_config": {"num_hidden_layers": layers}})
    model = Llava(config)
    ids, pixels = array((1, 600), "int32"), array((1, 3, 336, 336), "float32")
    params = jax.eval_shape(lambda i, p: model.init(jax.random.key(0), i, pixel_values=p), ids, pixels)["params"]
    params = jax.tree.map(lambda a: array(a.shape, "bfloat16"), params)
    shapes = {path: leaf.shape for path, leaf in kernels(params).items() if path.startswith("decoder/blocks_")}
    assert sorted(set(shapes.values())) == sorted(sites_of("LLaVA-7B").values())
    params = replace_kernels(params, {path: site(*shape, (4, 4)) for path, shape in shapes.items()})
    text = config.text
    cache = array((rows, room, text.num_kv_heads, text.head_dim), "bfloat16")
    state = State(
        caches=[KVCache(cache, cache)] * layers,
        used=array((rows, room), "bool"),
        tokens=array((rows, room), "int32"),
        at=array((), "int32"),
        turns=array((rows, 1), "int32"),
        ended=array((rows,), "bool"),
        key=jax.eval_shape(lambda: jax.random.key(0)),
    )
    return model, params, state
