"""The scores of ffn units, query heads, kv heads, ssm heads and experts in one layer (the rows of
`kdscale.config.criteria`).

Each function is called before the layer runs, asks the context for the sums it needs, and returns the function that
turns them into scores.

B batch · S sequence · N = B·S tokens · D hidden · F ffn · E experts · Q query heads · K kv heads · P = Q/K
H head_dim · G = P·H inputs of a kv group · M ssm heads
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kdscale.families.schema import axis_blocks, block_size
from kdscale.prune.importance.layer_context import Collector, LayerContext, Sublayer
from kdscale.prune.importance.optimal_brain_surgeon import explain_singular, head_removal_costs, removal_costs


def ffn_activation(layer: LayerContext) -> Collector:
    """[F]: mean over the sequence of |x|, L2 norm over the samples. Experts [E, F]: see ExpertSums."""
    if (experts := layer.experts()) is not None:
        return lambda: torch.sqrt(experts.squares_EF)
    squares = layer.sum_over_batches("ffn", "squared means", lambda x_BSF: x_BSF.abs().mean(1).square().sum(0))
    return lambda: squares().sqrt()


def ffn_output_energy(layer: LayerContext) -> Collector:
    """[F] or [E, F]: Σ over tokens of x² · ‖column of the down projection‖²."""
    if (experts := layer.experts()) is not None:
        return lambda: experts.squares_EF * experts.columns_EF
    squares = layer.sum_over_batches("ffn", "squares", lambda x_BSF: x_BSF.square().sum((0, 1)))
    return lambda: squares() * layer.weight("ffn").square().sum(0).double()


def ffn_removal_costs(layer: LayerContext) -> Collector:
    """[F]: see `optimal_brain_surgeon.removal_costs`. Dense models only."""
    gram = layer.gram("ffn")

    def costs() -> Tensor:
        with explain_singular(f"ffn.obs of {layer.name}"):
            return removal_costs(gram(), layer.weight("ffn"), layer.ridge)

    return costs


def heads_activation(layer: LayerContext) -> Collector:
    """[Q]: mean over the sequence of the norm of the head's output, L2 norm over the samples."""
    return _activation(layer, "heads", layer.dims.heads)


def heads_output_energy(layer: LayerContext) -> Collector:
    """[Q]: Σ over tokens of ‖W_head · x_head‖²."""
    group_grams = _group_grams(layer)

    def energies() -> Tensor:
        gram_KGG, weight_KDG = group_grams(), _grouped_weight(layer)
        width = weight_KDG.shape[-1] * layer.dims.kv_heads // layer.dims.heads  # not the same in all layers of Gemma 4
        # ‖W x‖² summed over tokens is the trace of W G Wᵀ; a head's own part is its diagonal block of G.
        blocks = [slice(start, start + width) for start in range(0, gram_KGG.shape[-1], width)]
        energy_PK = [((weight_KDG[..., b] @ gram_KGG[:, b, b]) * weight_KDG[..., b]).sum((1, 2)) for b in blocks]
        return torch.stack(energy_PK, dim=1).flatten()

    return energies


def heads_removal_costs(layer: LayerContext) -> Collector:
    """[Q]: see `optimal_brain_surgeon.head_removal_costs`."""
    gram, dims = layer.gram("heads"), layer.dims

    def costs() -> Tensor:
        with explain_singular(f"heads.obs of {layer.name}"):
            weight = layer.weight("heads")
            return head_removal_costs(gram(), weight, layer.ridge, dims.kv_heads, weight.shape[1] // dims.heads)

    return costs


def kv_heads_output_energy(layer: LayerContext) -> Collector:
    """[K]: Σ over tokens of ‖W_group · x_group‖², of the query heads that read one kv head together."""
    group_grams = _group_grams(layer)

    def energies() -> Tensor:
        weight_KDG = _grouped_weight(layer)
        return ((weight_KDG @ group_grams()) * weight_KDG).sum((1, 2))

    return energies


def ssm_heads_activation(layer: LayerContext) -> Collector:
    """[M]: mean over the sequence of the norm of what the head gives the output projection, L2 norm over the samples.

    That is behind the gate and its norm.
    """
    return _activation(layer, "ssm", layer.dims.ssm_heads)


def ssm_heads_output_energy(layer: LayerContext) -> Collector:
    """[M]: Σ over tokens of ‖W_head · x_head‖²."""
    heads = layer.dims.ssm_heads

    def grams(x_BSU: Tensor) -> Tensor:
        x_MNH = x_BSU.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1)
        return x_MNH.transpose(1, 2) @ x_MNH

    gram = layer.sum_over_batches("ssm", "head grams", grams)

    def energies() -> Tensor:
        weight_MDH = layer.weight("ssm").double().unflatten(-1, (heads, -1)).transpose(0, 1)
        return ((weight_MDH @ gram()) * weight_MDH).sum((1, 2))

    return energies


def experts_output_norm(layer: LayerContext) -> Collector:
    """[E]: Σ over the expert's tokens of routing weight · ‖expert output‖."""
    experts = layer.experts()
    assert experts is not None, "only a mixture of experts has an experts axis"
    return lambda: experts.norms_E


def ssm_channels_output_energy(layer: LayerContext) -> Collector:
    """[P], P ssm_head_dim: Σ over tokens and heads of x² · ‖column of the output projection‖²; heads share channels."""
    squares = layer.sum_over_batches("ssm", "squares", lambda x_BSU: x_BSU.square().sum((0, 1)))

    def energies() -> Tensor:
        energy_U = squares() * layer.weight("ssm").square().sum(0).double()
        return energy_U.unflatten(0, (layer.dims.ssm_heads, -1)).sum(0)

    return energies


def ssm_state_output_energy(layer: LayerContext) -> Collector:
    """[Z], Z ssm_state: the output energy of each group's heads, shared out among the group's channels of B and C.

    At token t a head reads Σ over s ≤ t of (C_t · B_s) x_s, faded by a factor that is the same for all channels. A
    channel's share is that of Σ over tokens of C² times Σ of B², as if the two tokens of a pair were independent.
    """
    dims, of_heads = layer.dims, ssm_heads_output_energy(layer)
    squares = layer.sum_over_batches("ssm_in", "B and C squared", lambda x_BSU: _b_and_c(layer, x_BSU).square().sum(0))

    def energies() -> Tensor:
        b_GZ, c_GZ = squares().unflatten(0, (2, dims.ssm_groups, dims.ssm_state))
        energy_G = of_heads().unflatten(0, (dims.ssm_groups, -1)).sum(1)
        share_GZ = b_GZ * c_GZ
        return (energy_G[:, None] * share_GZ / share_GZ.sum(1, keepdim=True).clamp_min(1e-300)).sum(0)

    return energies


def _b_and_c(layer: LayerContext, projected_BSU: Tensor) -> Tensor:
    """[N, 2 · groups · state]: B and C of a Mamba 2 mixer, from what its first projection puts out."""
    projection, convolution, bias = (layer.spec(role) for role in ("ssm_in", "ssm_conv", "ssm_conv_bias"))
    assert projection is not None and convolution is not None, f"{layer.name} has no mixer"
    if (scale_U := layer.buffer("ssm_scale")) is not None:
        projected_BSU = projected_BSU * scale_U
    rows = _state_rows(layer, convolution.axes[0])
    weight_V1K = layer.tensor(convolution)[rows]
    bias_V = None if bias is None else layer.tensor(bias)[rows]
    x_BVS = projected_BSU[..., _state_rows(layer, projection.axes[0])].transpose(1, 2)
    x_BVS = functional.pad(x_BVS, (weight_V1K.shape[-1] - 1, 0))
    out_BVS = functional.conv1d(x_BVS, weight_V1K, bias_V, groups=len(weight_V1K))
    return functional.silu(out_BVS).transpose(1, 2).flatten(0, 1)


def _state_rows(layer: LayerContext, axis: str) -> slice:
    """Where B and C are along an axis, which has the two blocks next to each other."""
    blocks, sizes = axis_blocks(axis), layer.dims.sizes()
    first = next(number for number, block in enumerate(blocks) if "ssm_state" in block)
    begin = sum(block_size(block, sizes) for block in blocks[:first])
    return slice(begin, begin + sum(block_size(block, sizes) for block in blocks[first : first + 2]))


def _activation(layer: LayerContext, sublayer: Sublayer, heads: int) -> Collector:
    """[heads]: mean over the sequence of the norm of a head's numbers, L2 norm over the samples."""

    def squared_means(x_BSU: Tensor) -> Tensor:
        return x_BSU.unflatten(-1, (heads, -1)).norm(dim=-1).mean(1).square().sum(0)

    squares = layer.sum_over_batches(sublayer, "squared means", squared_means)
    return lambda: squares().sqrt()


def _group_grams(layer: LayerContext) -> Collector:
    """Σ over tokens of xᵀx of each kv group's inputs, [K, G, G]."""

    def gram(x_BSU: Tensor) -> Tensor:
        x_KNG = x_BSU.flatten(0, 1).unflatten(-1, (layer.dims.kv_heads, -1)).transpose(0, 1)
        return x_KNG.transpose(1, 2) @ x_KNG

    return layer.sum_over_batches("heads", "group grams", gram)


def _grouped_weight(layer: LayerContext) -> Tensor:
    """The output projection's columns by kv group, [K, D, G] in fp64."""
    return layer.weight("heads").double().unflatten(-1, (layer.dims.kv_heads, -1)).transpose(0, 1)
