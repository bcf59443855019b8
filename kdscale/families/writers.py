"""The projections of a layer that write to the residual stream: their inputs are ranked, silenced and refitted.

Experts may write to a latent instead, from which one more projection writes to the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kdscale.families.family import Family

SHARED_DOWN = "shared_down"
STREAM = "hidden"
# By role, in the order in which they are refitted: each makes up for what is left open by those before it.
_SITE_OF = {
    "o": "heads", "ssm_out": "ssm", "conv_out": "conv", SHARED_DOWN: "shared", "down": "ffn", "latent_out": "latent",
    "layer_input_out": "layer_input",
}  # fmt: skip


class Writer(NamedTuple):
    """One of them: its module's path in the layer, the axis that it reads and the one that it writes; one of each
    expert if `of_experts`."""

    path: str
    axis: str
    of_experts: bool = False
    writes: str = STREAM


def layer_writers(family: Family, config: Mapping[str, Any], layer: int) -> dict[str, Writer]:
    """By role, those that the layer has."""
    sites = family.layer_sites(config, layer)
    specs = {spec.role: spec for spec in family.layer_tensors(config, layer).values()}
    out = {}
    for role, site in _SITE_OF.items():
        if role in specs:
            axes = [axis for axis in specs[role].axes if axis != "experts"]
            writes = STREAM if STREAM in axes else next(axis for axis in axes if axis in family.data.sizes)
            axes.remove(writes)  # once: a short convolution is as wide as the stream that it writes to
            of_experts = specs[role].of_experts
            out[role] = Writer(sites.experts if of_experts else getattr(sites, site), axes[0], of_experts, writes)
    return out
