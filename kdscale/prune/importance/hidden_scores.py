"""The scores of the hidden axis. One order of channels holds for the whole model, so what is collected at the norms of
each layer and at the final norm is summed.

B batch · S sequence · N = B·S tokens · D hidden
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdscale.prune.importance.layer_context import Collector, LayerContext
from kdscale.prune.rotation import rotation_obstacle
from kdscale.runs.importance_scores import ROTATION
from kdscale.runtime.ranks import all_reduce_sum


def norm_activation(layer: LayerContext) -> Collector:
    """[D]: mean over the sequence of |norm output|, L2 norm over the samples, summed over the norms."""
    squares: dict[nn.Module, Tensor] = {}  # by norm, in the order in which the norms run

    def add(norm: nn.Module, _args: object, y_BSD: Tensor) -> None:
        squares_D = y_BSD.float().abs().mean(1).square().sum(0).double()
        squares[norm] = squares.get(norm, torch.zeros_like(squares_D)) + squares_D

    for norm in layer.norms:
        norm.register_forward_hook(add)

    def total() -> Tensor:
        total_D = torch.zeros(layer.dims.hidden, dtype=torch.float64)
        for squares_D in squares.values():
            total_D += all_reduce_sum(squares_D).sqrt().cpu()
        return total_D

    return total


def residual_covariance(layer: LayerContext) -> Collector | None:
    """[D, D]: Σ over tokens and norms of x̂x̂ᵀ, x̂ a norm's input divided by its root mean square; None where the model
    cannot be rotated.

    Divided, because every reader sees it so, and because a plain covariance would be about the few tokens with massive
    activations alone (10³ times the others on Llama-like models). fp32 sums on the device.
    """
    if layer.once("rotation obstacle", lambda: rotation_obstacle(layer.family, layer.config)) is not None:
        return None
    sum_DD = torch.zeros(layer.dims.hidden, layer.dims.hidden, device=layer.device)

    def add(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_ND = args[0].detach().flatten(0, -2).float()
        x_ND = x_ND * x_ND.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        sum_DD.addmm_(x_ND.T, x_ND)

    for norm in layer.norms:
        norm.register_forward_pre_hook(add)
    return lambda: all_reduce_sum(sum_DD).cpu()


def components(covariance_DD: Tensor) -> dict[str, Tensor]:
    """`hidden.pca`: energy [D], falling; `hidden.rotation`: R [D, D] in fp32, whose rows are the components.

    The sign of a row is such that its largest entry is positive.
    """
    energy_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    rows_DD = vectors_DD.T.flip(0)
    largest = rows_DD.abs().argmax(1, keepdim=True)
    rows_DD = rows_DD * rows_DD.gather(1, largest).sign()
    return {"hidden.pca": energy_D.flip(0).clamp_min(0), ROTATION: rows_DD.float().contiguous()}
