"""The pass that repairs what slicing removes: the teacher streamed again, each layer's regression solved in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.models.hidden_states import IN_MEMORY, Scratch
from kdscale.models.layer_pass import LayerPass
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.compensation.experts import ridge_experts
from kdscale.prune.compensation.layer_gaps import ROLE, RepairedWeights
from kdscale.prune.compensation.recovered_error import InputSample, RecoveredErrors
from kdscale.prune.compensation.regression import RidgeSums
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_writer
from kdscale.weights import Checkpoint

# The input axis of the two projections that write to the residual stream, by role: what compensation rewrites.
COMPENSATED = {"down": "ffn", "o": "heads*head_dim"}


def compensated_roles(plan: Plan, slicer: Slicer) -> list[str]:
    """Which projections this plan rewrites by regression: those with an input axis that is cut."""
    if plan.methods.compensate == "none":
        return []
    return [role for role, axis in COMPENSATED.items() if slicer.kept(axis, 0) is not None]


def fits_experts(plan: Plan, slicer: Slicer) -> bool:
    """Whether the down projections that this plan compensates are those of the experts of a mixture."""
    return bool(slicer.family.sites.experts) and "down" in compensated_roles(plan, slicer)


def compensated_layers(
    stream: LayerStream,
    slicer: Slicer,
    batches: Sequence[TokenBatch],
    cfg: PruneConfig,
    teacher: Checkpoint,
    reporter: Reporter,
    scratch: Scratch = IN_MEMORY,
    residuals: RecoveredErrors | None = None,
    mended: RepairedWeights | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(the student's layer, role → compensated weight: fp32 on the CPU, cut to the kept hidden rows), layer by layer.
    A role of the experts of a mixture is followed by the expert's number (expert_repair.py).

    With several ranks `batches` are this rank's share; all of them must go through this, and the one that writes gets
    the weights. A layer counts as done when the next one is asked for. With a folder in `scratch` a killed pass goes on
    at the first layer that was not: the layers before it do not come again.
    `residuals` are measured on the writer's share. Projections that `mended` has (gaps.py) are left out.
    """
    plan = slicer.plan
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    depth = plan.kept.layers[-1] + 1
    with reporter.bar("compensation", total=tokens) as bar:

        def advance(count: int, layer: int) -> None:
            bar.advance(count / depth, f"layer {layer + 1}/{depth}")

        walk = LayerPass(stream, batches, scratch, advance)
        for layer in walk.layers(depth):
            position = plan.kept.layers.index(layer.index) if layer.index in plan.kept.layers else None
            skip = [ROLE] if position is not None and mended is not None and mended.has(position) else []
            sums = _attach(layer, slicer, position, stream.device, skip) if position is not None else {}
            samples = _sample(layer, slicer, sums, len(batches)) if residuals is not None else {}
            experts: dict[str, Tensor] = {}
            if position is not None and fits_experts(plan, slicer):
                experts = ridge_experts(
                    layer,
                    slicer,
                    position,
                    partial(walk.run, layer),
                    cfg.ridge_lambda,
                    stream.device,
                    scratch,
                    residuals,
                )
            else:
                walk.run(layer)
            layer.release()
            for one in sums.values():
                one.reduce()
            if position is not None and is_writer():
                with torch.inference_mode():
                    solved = experts | _solve(
                        slicer, position, sums, cfg.ridge_lambda, teacher, stream.device, (residuals, samples)
                    )
                sums.clear()
                yield position, solved
                del solved
            sums.clear()
            walk.finish()
        walk.close()


def _attach(
    layer: DecoderLayer, slicer: Slicer, position: int, device: torch.device, skip: Sequence[str]
) -> dict[str, RidgeSums]:
    sites = slicer.family.sites
    out: dict[str, RidgeSums] = {}
    for role in compensated_roles(slicer.plan, slicer):
        if role in skip or (role == "down" and not sites.ffn):
            continue  # mended already; the experts of a mixture: expert_repair.py
        axis = COMPENSATED[role]
        kept = slicer.kept(axis, position)
        assert kept is not None
        out[role] = sums = RidgeSums(kept, slicer.plan.teacher.dims().axis_size(axis), device)
        path = sites.ffn if role == "down" else sites.heads
        layer.site(path).register_forward_pre_hook(_adder(sums))
    return out


def _sample(layer: DecoderLayer, slicer: Slicer, sums: dict[str, RidgeSums], batches: int) -> dict[str, InputSample]:
    """A few rows of what each compensated projection reads, for the report's residuals."""
    out = {role: InputSample(batches) for role in sums}
    for role, sample in out.items():
        path = slicer.family.sites.ffn if role == "down" else slicer.family.sites.heads
        layer.site(path).register_forward_pre_hook(lambda _module, args, seen=sample: seen.see(args[0]))
    return out


def _adder(sums: RidgeSums) -> Any:
    def add(_module: Any, args: tuple[Tensor, ...]) -> None:
        sums.add(args[0])

    return add


def _solve(
    slicer: Slicer,
    position: int,
    sums: dict[str, RidgeSums],
    ridge: float,
    teacher: Checkpoint,
    device: torch.device,
    record: tuple[RecoveredErrors | None, dict[str, InputSample]] = (None, {}),
) -> dict[str, Tensor]:
    residuals, samples = record
    hidden = slicer.kept("hidden", None)
    out: dict[str, Tensor] = {}
    for source, _, spec in slicer.layer(position):
        if spec.role not in sums:
            continue
        transposed = slicer.family.transposed(spec.role)
        weight_DU = teacher.tensor(source).to(device)
        weight_DU = weight_DU.T if transposed else weight_DU
        if hidden is not None:  # rows of channels that go need no regression
            weight_DU = weight_DU[torch.tensor(hidden, device=device)]
        solved_DK = sums[spec.role].solve(weight_DU, ridge, source).cpu()
        if residuals is not None:
            layer, kept = slicer.plan.kept.layers[position], sums[spec.role].kept
            residuals.add(layer, spec.role, samples[spec.role], weight_DU, kept, solved_DK)
        out[spec.role] = solved_DK.T.contiguous() if transposed else solved_DK
    return out
