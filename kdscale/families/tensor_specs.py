"""Tensors on disk: what the templates of a family file make with the sizes of one model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdscale.families.schema import COMPONENT_OF, EXPERT, LAYER, Component, TensorTemplate, axis_size


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on disk: `axes[i]` names dimension i of `shape`; `layer` is None for embedding, final norm, head.

    `parameter` is the name in the transformers model of what it is (a part of), `expert` the number of the expert of a
    mixture that it belongs to. A `buffer` is stored with the parameters and is none.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layer: int | None
    role: str
    parameter: str
    expert: int | None = None
    buffer: bool = False

    @property
    def parameters(self) -> int:
        """How many parameters it holds."""
        return 0 if self.buffer else math.prod(self.shape)

    @property
    def component(self) -> Component:
        """Which part of the model this is: embedding, attention, ffn (experts and router too), norm or head."""
        return COMPONENT_OF[self.role]

    @property
    def is_gain(self) -> bool:
        """Whether it is what a norm multiplies by, not what it adds."""
        return self.component == "norm" and not self.role.endswith("_bias")

    @property
    def stacked(self) -> bool:
        """Whether it holds the tensors of all experts of the layer, one after the other."""
        return self.axes[:1] == ("experts",) and not self.role.startswith("router")

    @property
    def of_experts(self) -> bool:
        """Whether it belongs to the experts that tokens are routed to."""
        return self.expert is not None or self.stacked

    @property
    def counts_as_embedding(self) -> bool:
        """Whether this grows with the vocabulary or the context, not with the depth: embeddings and the head."""
        return self.component in ("embedding", "head")


def tensor_spec(
    template: TensorTemplate, sizes: Mapping[str, int], layer: int | None, expert: int | None = None
) -> TensorSpec:
    """The tensor of a template, of one layer and expert where it has those."""
    return TensorSpec(
        shape=tuple(axis_size(axis, sizes) for axis in template.axes),
        axes=template.axes,
        layer=layer,
        role=template.role,
        parameter=_numbered(template.loads_as or template.name, layer, expert),
        expert=expert,
        buffer=template.buffer,
    )


def layer_specs(templates: Sequence[TensorTemplate], sizes: Mapping[str, int], layer: int) -> dict[str, TensorSpec]:
    """One layer's tensors in file order; experts follow one another in the place of the first of their tensors."""
    specs: dict[str, TensorSpec] = {}
    of_experts = [t for t in templates if t.per_expert]
    for template in templates:
        if not template.per_expert:
            specs[_numbered(template.name, layer, None)] = tensor_spec(template, sizes, layer)
        elif template is of_experts[0]:
            for expert in range(sizes["experts"]):
                specs |= {_numbered(t.name, layer, expert): tensor_spec(t, sizes, layer, expert) for t in of_experts}
    return specs


def _numbered(name: str, layer: int | None, expert: int | None) -> str:
    name = name if layer is None else name.replace(LAYER, str(layer))
    return name if expert is None else name.replace(EXPERT, str(expert))
