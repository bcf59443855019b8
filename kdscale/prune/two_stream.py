"""Compensation in both streams: each projection is refitted on what the teacher and what the student read there.

`repair.compensated_layers` fits each layer as if everything before it were the teacher. It is not: errors add up from
layer to layer, and a later layer reads something it was never fitted on. Fitted on the student's stream alone, layers
answer noisy inputs with too little, and the next ones get less still: far worse (docs/pruning.md). So both are
equations of one regression. Teacher and student run side by side, a layer at a time; for each projection into the
residual stream, attention first, with x_T and x_S what the teacher and the student read at the kept inputs:

    W' = argmin ‖x_T W'ᵀ − y_T‖² + ‖x_S W'ᵀ − (y_T + β(r_T − r_S))‖² + λ‖W' − W_kept‖²

y_T is what the teacher's sublayer adds and r_T − r_S how far the student's residual stream is behind before it: the
asymmetric target of GPTAQ (arXiv 2504.02692) plus a share β of the error so far.

B batch · S sequence · D' kept hidden channels · K kept inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.progress import Reporter
from kdscale.prune.compensate import TargetSums
from kdscale.prune.repair import COMPENSATED, compensated_roles
from kdscale.prune.residual import Residuals, Sample
from kdscale.prune.slicing import Slicer
from kdscale.prune.states import States
from kdscale.prune.stream import LayerStream, OneLayer, TokenBatch
from kdscale.weights import Checkpoint

# A layer's output counts as its input plus what its two sublayers put out within this share of the change and, for the
# rounding of bf16, of the output.
_PLAIN, _ROUNDING = 2e-2, 1e-2


def two_stream_layers(
    stream: LayerStream,
    slicer: Slicer,
    batches: Sequence[TokenBatch],
    ridge: float,
    correction: float,
    teacher: Checkpoint,
    reporter: Reporter,
    residuals: Residuals | None = None,
) -> Iterator[dict[str, Tensor]]:
    """For each kept layer, in order: role → weight, fp32 on the CPU. `correction` is β.

    In memory: two layers, and the hidden states of the calibration tokens twice. β applies where a layer adds its two
    sublayers' outputs to its input and nothing else (no norm or factor between); it is taken as 0 elsewhere.
    """
    plan = slicer.plan
    ours = LayerStream(
        slicer.student_config, slicer.family, sliced_source(teacher, slicer), dtype=stream.dtype, device=stream.device
    )
    kept_D = torch.tensor(plan.kept.hidden, device=stream.device)
    theirs_states, our_states = stream.embed(batches), ours.embed(batches)
    last = plan.kept.layers[-1]
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    with reporter.bar("compensation", total=tokens) as bar, torch.inference_mode():
        for layer in stream.layers():
            position = plan.kept.layers.index(layer.index) if layer.index in plan.kept.layers else None
            if position is None:
                for index, batch in enumerate(batches):
                    theirs_states[index] = layer(theirs_states[index], batch.position_ids_BS.to(stream.device))
            else:
                student = ours.layer(position)
                pair = _LayerPair(layer, student, slicer, position, correction, kept_D, batches, residuals)
                yield pair.fit(theirs_states, our_states, ridge)
                student.release()
            bar.advance(tokens / (last + 1), f"layer {layer.index + 1}/{last + 1}")
            if layer.index == last:
                layer.release()
                return


def sliced_source(teacher: Checkpoint, slicer: Slicer) -> Callable[[str], Tensor]:
    """The plainly sliced student, tensor by tensor."""
    where: dict[str, tuple[str, Any, int | None]] = {
        target: (source, spec, None) for source, target, spec in slicer.outer()
    }
    for position in range(slicer.plan.student.layers):
        where |= {target: (source, spec, position) for source, target, spec in slicer.layer(position)}

    def tensor(name: str) -> Tensor:
        source, spec, position = where[name]
        return slicer.slice(teacher.tensor(source), spec, position)

    return tensor


class _LayerPair:
    """One layer of the teacher and the student's at the same place."""

    def __init__(
        self,
        theirs: OneLayer,
        ours: OneLayer,
        slicer: Slicer,
        position: int,
        correction: float,
        kept_D: Tensor,
        batches: Sequence[TokenBatch],
        residuals: Residuals | None,
    ):
        self._theirs, self._ours, self._slicer, self._position = theirs, ours, slicer, position
        self._correction, self._kept_D, self._batches, self._residuals = correction, kept_D, batches, residuals
        sites = slicer.family.sites
        self._paths = {"o": sites.heads, "down": sites.mlp_output}
        self._seen: dict[tuple[bool, str], tuple[Tensor, Tensor]] = {}
        for mine, one in ((False, theirs), (True, ours)):
            for role, path in self._paths.items():
                one.site(path).register_forward_hook(self._keeper(mine, role))

    def fit(self, theirs_states: States, our_states: States, ridge: float) -> dict[str, Tensor]:
        """Refit the projections that are cut, in the order in which they add to the stream; advance both states."""
        out: dict[str, Tensor] = {}
        for role in ("o", "down"):
            if role not in compensated_roles(self._slicer.plan, self._slicer):
                continue
            module, transposed = self._ours.site(self._paths[role]), self._slicer.family.transposed(role)
            weight_DK, bias_D = _weight(module, transposed), getattr(module, "bias", None)
            inputs = self._slicer.kept(COMPENSATED[role], self._position)
            assert inputs is not None
            inputs_K = torch.tensor(inputs, device=weight_DK.device)
            sums, sample = TargetSums(len(inputs), len(weight_DK), weight_DK.device), Sample(len(self._batches))
            for theirs, ours, batch in zip(theirs_states, our_states, self._batches, strict=True):
                self._run(theirs, ours, batch)
                offset = 0.0 if bias_D is None else bias_D.float()
                sample.see(self._seen[False, role][0])
                sums.add(self._seen[False, role][0][..., inputs_K], self._wanted(role) - offset)
                sums.add(self._seen[True, role][0], self._target(role, theirs, ours) - offset)
            solved = sums.solve(weight_DK, ridge, f"{self._paths[role]} of the student's layer {self._position}")
            if self._residuals is not None:
                whole_DU = _weight(self._theirs.site(self._paths[role]), transposed)[self._kept_D]
                self._residuals.add(self._theirs.index, role, sample, whole_DU, inputs_K, solved)
            on_disk = solved.T.contiguous() if transposed else solved
            out[role] = on_disk.cpu()
            module.weight.data = on_disk.to(weight_DK.dtype)
        for index, batch in enumerate(self._batches):
            theirs_states[index], our_states[index] = self._run(theirs_states[index], our_states[index], batch)
        self._seen.clear()
        return out

    def _run(self, theirs: Tensor, ours: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        positions = batch.position_ids_BS.to(theirs.device)
        after = self._theirs(theirs, positions), self._ours(ours, positions)
        if self._correction and not self._is_plain(theirs, after[0]):
            self._correction = 0.0
        return after

    def _is_plain(self, before: Tensor, after: Tensor) -> bool:
        added = self._output(False, "o") + self._output(False, "down")
        change, output = (after.float() - before.float()).norm(), after.float().norm()
        return bool((before.float() + added - after.float()).norm() <= _PLAIN * change + _ROUNDING * output)

    def _target(self, role: str, theirs: Tensor, ours: Tensor) -> Tensor:
        target = self._wanted(role)
        if self._correction:
            behind = theirs.float()[..., self._kept_D] - ours.float()
            if role == "down":
                behind += self._output(False, "o")[..., self._kept_D] - self._output(True, "o")
            target = target + self._correction * behind
        return target

    def _wanted(self, role: str) -> Tensor:
        """y_T on the channels that stay."""
        return self._output(False, role)[..., self._kept_D]

    def _output(self, mine: bool, role: str) -> Tensor:
        return self._seen[mine, role][1].float()

    def _keeper(self, mine: bool, role: str) -> Callable[[Any, Any, Any], None]:
        def keep(_module: Any, args: tuple[Tensor, ...], output: Any) -> None:
            self._seen[mine, role] = (args[0], output if isinstance(output, Tensor) else output[0])

        return keep


def _weight(module: nn.Module, transposed: bool) -> Tensor:
    """[outputs, inputs]"""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if transposed else weight
