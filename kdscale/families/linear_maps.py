"""Which tensors are the weights of linear maps within layers: what quantised forms round and adapters are added to.

Embeddings, head, norms, biases and routers are none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kdscale.errors import ConfigError
from kdscale.families.family import Family
from kdscale.families.tensor_specs import TensorSpec

# Roles of linear maps → what they read, for all that read the same: its name, and the axis that it is wide.
READS = {
    **dict.fromkeys(("q", "k", "v", "qkv", "q_a", "kv_a"), ("attention", "hidden")),
    **dict.fromkeys(("gate", "up", "gate_up", "shared_gate", "shared_up", "shared_gate_up"), ("mlp", "hidden")),
    "o": ("heads", "heads*head_dim"),
    "down": ("ffn", "ffn"),
}
READ_AXES = tuple(dict.fromkeys(axis for _, axis in READS.values()))


def is_linear_map(spec: TensorSpec) -> bool:
    """Whether a tensor is the weight of a linear map within a layer."""
    return spec.layer is not None and spec.role in READS


class AdaptedMap(NamedTuple):
    """A linear map with an adapter; `transposed`: its weight is stored [inputs, outputs]."""

    outputs: int
    inputs: int
    transposed: bool

    def parameters(self, rank: int) -> int:
        """Of an adapter of this rank."""
        return rank * (self.outputs + self.inputs)


def adapted_maps(family: Family, config: Mapping[str, Any], targets: Sequence[str]) -> dict[str, AdaptedMap]:
    """The linear maps that adapters are added to, by the names of their modules in the transformers model.

    `targets` are last parts of these names; none: all maps, but for those of a mixture's experts, which are stacked.
    Raises ConfigError for a target that is no such map.
    """
    transposed = family.transposed("down")
    found: dict[str, AdaptedMap] = {}
    for spec in family.tensors(dict(config)).values():
        if not is_linear_map(spec) or spec.expert is not None:
            continue
        module = spec.parameter.removesuffix(".weight")
        rows, columns = spec.shape
        if module in found:  # joined from several tensors
            rows += found[module].inputs if transposed else found[module].outputs
        found[module] = AdaptedMap(columns, rows, True) if transposed else AdaptedMap(rows, columns, False)
    kinds = list(dict.fromkeys(module.rpartition(".")[2] for module in found))
    if unknown := [target for target in targets if target not in kinds]:
        raise ConfigError(
            "distill.lora.targets",
            expected=f"linear maps of the layers ({', '.join(kinds)})",
            got=", ".join(unknown),
            hint="embeddings, a head (tied to them or not), norms and stacked experts get no adapters",
        )
    return {module: shape for module, shape in found.items() if not targets or module.rpartition(".")[2] in targets}
