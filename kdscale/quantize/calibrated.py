"""Quantisation with calibration: a student walked layer by layer over training text, each layer made before the next.

A layer reads what the quantised layers before it give. It runs twice: with its own weights, for the Gram matrices of
what its linear maps read, and with the new ones, for what enters the next layer. Memory: one layer, its Gram matrices
in fp32 and the factor of one of them in fp64.

The student is read in the dtype of the forwards; what is rounded are its weights as they are on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kdscale.config.quantize import Int4Config
from kdscale.families import Family
from kdscale.models.hidden_states import IN_MEMORY, Scratch
from kdscale.models.layer_pass import GramHooks, LayerPass, layer_progress
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.quantize.forms import Quantized
from kdscale.quantize.gptq import gptq
from kdscale.quantize.matrices import Matrix, layer_matrices
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import all_reduce_sum
from kdscale.weights import Checkpoint
from kdscale.weights.integer_grid import IntegerGrid

_PASSES = 2
_SHARES = "error_shares"  # of a layer's maps, in what the pass keeps of the layer


class LayerErrors:
    """What is left of plain rounding's Σ of squared output errors, as a share of it, over the maps of all layers."""

    def __init__(self) -> None:
        self._shares: list[float] = []

    def add(self, shares: Iterable[float]) -> None:
        """Count the maps of a layer."""
        self._shares += shares

    @property
    def share(self) -> float | None:
        """The mean over the maps; None where there was none."""
        return sum(self._shares) / len(self._shares) if self._shares else None


def calibrated_layers(
    student: Checkpoint,
    family: Family,
    settings: Int4Config,
    grid: IntegerGrid,
    batches: Sequence[TokenBatch],
    *,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    scratch: Scratch = IN_MEMORY,
    errors: LayerErrors | None = None,
) -> Iterator[dict[str, Quantized]]:
    """Yield the weights on `grid` of one layer after another, by their names on disk.

    With several ranks `batches` are this rank's share; all ranks go through this, and each gets the weights. A layer is
    finished when the next one is asked for; with a folder in `scratch` a killed pass resumes at the last layer that it
    saved, whose `errors` count too. Raises SelfCheckError when a layer's inputs are not finite.
    """
    errors = errors or LayerErrors()
    stream = LayerStream(student.config, family, student.tensor, dtype=dtype, device=device)
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    with reporter.bar(f"quantise to {settings.label}", total=_PASSES * tokens) as bar:
        walk = LayerPass(stream, batches, scratch, layer_progress(bar, stream.depth))
        for result in walk.results:
            errors.add(result[_SHARES].tolist())
        for layer in walk.layers():
            matrices = layer_matrices(student.config, family, layer.index)
            grams = _gram_matrices(walk, layer, matrices)
            made: dict[str, Quantized] = {}
            shares: list[float] = []
            with torch.inference_mode():
                for matrix in matrices:
                    weight_OI = student.tensor(matrix.name).to(device)
                    solution = gptq(
                        weight_OI, grams[matrix.reads], grid, settings.damping, settings.act_order, matrix.name
                    )
                    made[matrix.name] = solution.quantized
                    parameter = layer.site(matrix.site).get_parameter("weight")
                    parameter.data.copy_(solution.quantized.values())
                    if solution.rounding_error > 0:
                        shares.append(solution.error / solution.rounding_error)
            del grams
            walk.run(layer)
            layer.release()
            yield made
            errors.add(shares)
            walk.finish({_SHARES: torch.tensor(shares, dtype=torch.float64)})
        walk.close()


def _gram_matrices(walk: LayerPass[DecoderLayer], layer: DecoderLayer, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
    """Σ xᵀx over the tokens of all ranks of each thing that the layer's maps read."""
    hooks = GramHooks()
    for reads, site in {matrix.reads: matrix.site for matrix in reversed(matrices)}.items():
        hooks.attach(reads, layer.site(site))  # all maps that read the same are given the same
    walk.show(layer)
    hooks.detach()
    grams = {}
    for matrix in matrices:  # in the same order on all ranks, also on one without a batch
        if matrix.reads not in grams:
            width = layer.site(matrix.site).get_parameter("weight").shape[1]
            empty_II = torch.zeros(width, width, device=walk.source.device)
            grams[matrix.reads] = all_reduce_sum(hooks.grams.pop(matrix.reads, empty_II))
    return grams
