"""Products over several devices: each computes its own tokens and output channels, for XLA cannot cut a kernel by itself.

The mesh is the context's (`jax.set_mesh`), its axes are those of `splitq_jax.sharding`: tokens are cut over ``data``, output channels
over ``tensor`` and ``fsdp``. Every device quantizes its tokens, and nothing is summed over devices. Transforms, permutation and ``U``
are small and whole on every device; what lies otherwise is gathered.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from splitq_jax.qtensor import QTensor
from splitq_jax.sharding import mesh_axes, specs

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any


def over_devices(
    function: Callable[..., Any], tokens: Any, w: SplitWeight | QTensor, bias: Float[Array, " N"] | None, columns: bool
) -> Any:
    """Return ``function(tokens, w, bias)``, each device of the context's mesh computing its part.

    Args:
      function: of arrays with fewer tokens and columns it gives those tokens and columns.
      tokens: a tree of arrays whose first axis is the tokens'.
      w: the weight.
      bias: of the output channels, or None.
      columns: whether the results' second axis is the output channels'; else the weight is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # within a shard_map all devices have their parts already
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name: mesh.shape[name] for name, kind in kinds if kind is not AxisType.Manual}
    if all(size == 1 for size in free.values()):
        return function(tokens, w, bias)
    rows = mesh_axes("batch", jax.tree.leaves(tokens)[0].shape[0], free)
    cut = mesh_axes("columns", w.shape[1], free) if columns else None
    path = "x/kernel/groups/0/w" if isinstance(w, QTensor) else "x/kernel"  # a site's main group, or a whole site
    product: Any = jax.shard_map(
        function,
        in_specs=(PartitionSpec(rows), specs(w, free if columns else {}, path), PartitionSpec(cut)),
        out_specs=PartitionSpec(rows, cut) if columns else PartitionSpec(rows),
        axis_names=set(free),
        check_vma=False,
    )(tokens, w, bias)
    return product
