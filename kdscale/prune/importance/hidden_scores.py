"""The scores of the hidden axis. One order of channels holds for the whole model, so what is collected at the norms of
each layer and at the final norm is summed.

B batch · S sequence · N = B·S tokens · D hidden
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdscale.prune.importance.layer_context import Collector, LayerContext
from kdscale.prune.rotation import rotation_obstacle
from kdscale.prune.stream_cut import refit_obstacle
from kdscale.runs.importance_scores import DIRECTIONS, FINAL_COVARIANCE, ROTATION
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
    covariances = layer.covariances()
    return lambda: torch.stack(covariances()).sum(0).cpu()


def stream_covariances(layer: LayerContext) -> Collector | None:
    """[2, D, D]: the sum over all norms as above, and the final norm's alone. None where the stream is not refitted."""
    if layer.once("refit obstacle", lambda: refit_obstacle(layer.family, layer.config)) is not None:
        return None
    covariances = layer.covariances()

    def total() -> Tensor:
        sum_DD = torch.stack(covariances()).sum(0).cpu()
        return torch.stack([sum_DD, sum_DD if layer.is_final else torch.zeros_like(sum_DD)])

    return total


def components(covariance_DD: Tensor) -> dict[str, Tensor]:
    """`hidden.pca`: energy [D], falling; `hidden.rotation`: R [D, D] in fp32, whose rows are the components.

    The sign of a row is such that its largest entry is positive.
    """
    energy_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    rows_DD = vectors_DD.T.flip(0)
    largest = rows_DD.abs().argmax(1, keepdim=True)
    rows_DD = rows_DD * rows_DD.gather(1, largest).sign()
    return {"hidden.pca": energy_D.flip(0).clamp_min(0), ROTATION: rows_DD.float().contiguous()}


def directions(sums_2DD: Tensor) -> dict[str, Tensor]:
    """`hidden.refit`: energy [D], falling; the components in the same order, in rows; the final norm's covariance.

    No energy counts more than the lower quartile: some models have nine tenths of it in one component (Gemma 3), beside
    which losing any other would look free.
    """
    covariance_DD, final_DD = sums_2DD
    energy_D, rows_DD = components(covariance_DD).values()
    energy_D = energy_D.clamp_max(float(energy_D.quantile(0.25)))
    return {"hidden.refit": energy_D, DIRECTIONS: rows_DD, FINAL_COVARIANCE: final_DD.float().contiguous()}
