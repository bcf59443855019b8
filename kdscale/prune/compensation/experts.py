"""Compensation inside the experts of a mixture: each expert's down projection is refitted on the tokens that it gets.

An expert's output counts w times for a token whose routing weight is w, so its equations are weighted by it: with a
the units of expert e that stay and y_e its whole output, as the teacher has them at the same token,

    W'_e = argmin Σ ‖w a W'ᵀ − w (y_e + r)‖² + λ‖W' − W_kept‖²

over the tokens that the *student's* router sends to it: the one with the kept experts' rows, since a token whose
expert goes is served by others. With `ridge` r = 0 and everything is read in the teacher's stream. With `two_stream`
the student's stream gives equations too, and r is what the kept experts together leave open of the sublayer's target y:
r = (y − Σ w y_e) / Σ w, the same for all experts of a token.

Memory: the experts' inputs are recorded within the byte budget of the pass, and experts are fitted in groups whose sums
fit into it. An expert without tokens keeps its sliced weight; so does any, in the directions that its tokens lack.

N tokens · n tokens of one expert · T experts a token · D hidden · D' kept hidden · F ffn of one expert · K kept units
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale.models.experts import down_weight, expert_units, experts_call, routing_among_kept, weighed
from kdscale.models.hidden_states import HiddenStates, Scratch
from kdscale.models.layer_stream import DecoderLayer
from kdscale.prune.compensation.recovered_error import RecoveredErrors
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.slicing import SlicedTensor, Slicer
from kdscale.runtime.ranks import all_reduce_sum

_FOLDER, _ROUTED = "experts", "routed"
_SAMPLED_ROWS = 64  # of each expert's inputs, for the errors in the report


class Equations(NamedTuple):
    """What the regression of one expert is given: `x_nK` times its new weight is to be `target_nD`.

    `units_nF`: all units of the teacher's expert, of which `x_nK` are those that stay; None where `x_nK` are the
    student's own.
    """

    expert: int
    x_nK: Tensor
    target_nD: Tensor
    units_nF: Tensor | None


# Yields the equations of some experts (by the teacher's numbers), one batch of calibration tokens after the other.
Sweep = Callable[[Sequence[int]], Iterator[Equations]]


def expert_name(role: str, expert: int | None) -> str:
    """The key of a compensated weight: the role, with the teacher's number of the expert that it belongs to."""
    return role if expert is None else f"{role}.{expert}"


def new_weight(tensor: SlicedTensor, weights: Mapping[str, Tensor], slicer: Slicer) -> Tensor | None:
    """What `weights`, by role and expert, have for a tensor of the student, as it is on disk; None: nothing."""
    role, position = tensor.spec.role, tensor.position
    if not tensor.spec.stacked or position is None:
        return weights.get(expert_name(role, tensor.spec.expert))
    names = [expert_name(role, expert) for expert in slicer.plan.kept.experts[position]]
    if names[0] not in weights:
        return None
    stack = torch.stack([weights[name] for name in names])
    return stack.transpose(1, 2).contiguous() if tensor.spec.axes[-1] == "hidden" else stack


def written_rows(slicer: Slicer, position: int, device: torch.device) -> Tensor:
    """Of what the experts of the student's layer `position` put out in the teacher: the rows that stay."""
    return slicer.indices(slicer.writers(position)["down"].writes, position, device)


class ExpertInputs:
    """Records what a layer's experts read while the layer is run, within a quarter of the pass's bytes (and as much
    again of what the router reads, where that is something else)."""

    def __init__(self, layer: DecoderLayer, scratch: Scratch, device: torch.device):
        self.experts: Any = layer.site(layer.sites.experts)
        self._layer = layer
        quarter = replace(scratch.subfolder(_FOLDER), activation_bytes=scratch.activation_bytes // 4)
        self._inputs = HiddenStates(quarter, device)
        self._handles = [self.experts.register_forward_pre_hook(self._record, with_kwargs=True)]
        self._routed = self._inputs  # what the router reads
        if layer.sites.router_reads_more:
            aside = replace(scratch.subfolder(_ROUTED), activation_bytes=scratch.activation_bytes // 4)
            self._routed = HiddenStates(aside, device)
            router = layer.site(layer.sites.router)
            self._handles.append(router.register_forward_pre_hook(lambda _, args: self._routed.append(args[0])))

    def _record(self, _module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._inputs.append(experts_call(args, kwargs)[0])

    def stop(self) -> None:
        """Record no more."""
        for handle in self._handles:
            handle.remove()

    def sweep(self, slicer: Slicer, position: int) -> Sweep:
        """The equations of one student's experts, in the teacher's stream; `position` is the student's layer."""
        kept, experts = slicer.plan.kept.experts[position], self.experts
        rows_D = written_rows(slicer, position, experts.down_proj.device)

        def equations(group: Sequence[int]) -> Iterator[Equations]:
            for hidden_ND, routed_ND in zip(self._inputs, self._routed, strict=True):
                routing = routing_among_kept(self._layer, kept, routed_ND)
                for expert in group:
                    _, read_nD, weight_n = weighed(experts, hidden_ND, routing, expert)
                    units_nF = expert_units(experts, expert, read_nD).float() * weight_n[:, None]
                    target_nD = units_nF @ down_weight(experts, expert)[rows_D].float().T
                    units = kept_units(slicer, position, expert, units_nF.device)
                    yield Equations(expert, units_nF[:, units], target_nD, units_nF)

        return equations


def refit_experts(
    experts: Any,
    slicer: Slicer,
    position: int,
    sweep: Sweep,
    ridge: float,
    room: int,
    recovered: RecoveredErrors | None = None,
) -> dict[str, Tensor]:
    """Fit the kept experts of the student's layer `position` on the equations that `sweep` gives.

    Returns `down.<the teacher's expert>` → its weight [D', K], fp32 on the CPU. `experts`: the teacher's module. All
    ranks must go through this. `room`: bytes for the sums of the experts that are fitted in one sweep (at least one
    is). Raises SelfCheckError when a regression is not finite.
    """
    plan = slicer.plan
    kept, width = plan.kept.experts[position], plan.student.ffn
    layer = plan.kept.layers[position]
    rows_D = written_rows(slicer, position, experts.down_proj.device)
    expert_bytes = 4 * width * (width + 2 * len(rows_D))  # XᵀX, XᵀE and the prior
    step = max(1, room // expert_bytes)
    errors = _ExpertErrors(experts, slicer, position)
    out: dict[str, Tensor] = {}
    for begin in range(0, len(kept), step):
        group = kept[begin : begin + step]
        sums = {
            expert: TargetSums(
                down_weight(experts, expert)[rows_D][:, kept_units(slicer, position, expert, rows_D.device)]
            )
            for expert in group
        }
        for equations in sweep(group):
            sums[equations.expert].add(equations.x_nK, equations.target_nD)
            errors.add(equations)
        for expert in group:
            regression = sums.pop(expert)
            regression.reduce()
            solved_DK = regression.solve(ridge, f"expert {expert} of the teacher's layer {layer}")
            errors.measure(expert, solved_DK)
            out[expert_name("down", expert)] = solved_DK.cpu()
    figures = errors.figures()
    if recovered is not None:
        recovered.record(layer, "down", figures)
    return out


def kept_units(slicer: Slicer, position: int, expert: int, device: torch.device) -> Tensor:
    """The ffn units that stay in one of the teacher's experts, at the student's layer `position`."""
    return torch.tensor(slicer.plan.kept.ffn_of(position, expert), device=device)


class _ExpertErrors:
    """How much of the experts' outputs the cut loses and the regression wins back, on a few tokens of each.

    As recovered_error.py measures it for one projection, over the weighted outputs of all kept experts. Also counts the
    experts that had fewer tokens than kept units, so that the sliced weight decides where no token was.
    """

    def __init__(self, experts: Any, slicer: Slicer, position: int):
        self._experts, self._slicer, self._position = experts, slicer, position
        self._rows: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = dict.fromkeys(slicer.plan.kept.experts[position], 0)
        self._squares = torch.zeros(3, dtype=torch.float64)  # of the error before and after, of the whole output

    def add(self, equations: Equations) -> None:
        """Count a batch of the teacher's equations and keep some of its rows; the student's are passed over."""
        if equations.units_nF is None:
            return
        self._tokens[equations.expert] += len(equations.units_nF)
        rows = self._rows.get(equations.expert, equations.units_nF[:0])
        self._rows[equations.expert] = torch.cat([rows, equations.units_nF[: _SAMPLED_ROWS - len(rows)]])

    def measure(self, expert: int, solved_DK: Tensor) -> None:
        """Add one expert's errors, with its sliced and with its new weight; its rows are dropped."""
        x_nF = self._rows.pop(expert, None)
        if x_nF is None:
            return
        rows_D = written_rows(self._slicer, self._position, x_nF.device)
        units = kept_units(self._slicer, self._position, expert, x_nF.device)
        weight_DF = down_weight(self._experts, expert)[rows_D].float()
        output_nD = x_nF @ weight_DF.T
        before_nD, after_nD = (x_nF[:, units] @ w.T for w in (weight_DF[:, units], solved_DK.to(x_nF.device)))
        differences = (before_nD - output_nD, after_nD - output_nD, output_nD)
        self._squares += torch.stack([values.double().square().sum() for values in differences]).cpu()

    def figures(self) -> dict[str, object]:
        """A row of RecoveredErrors for all experts together; a collective call."""
        before, after, output = self._squares.sqrt().tolist()
        output = output or 1.0
        plan = self._slicer.plan
        tokens_e = all_reduce_sum(torch.tensor(list(self._tokens.values()), device=self._experts.down_proj.device))
        return {
            "before": before / output,
            "after": after / output,
            "kept": plan.student.ffn,
            "of": plan.teacher.ffn,
            "experts": len(self._tokens),
            "short_of_tokens": int((tokens_e < plan.student.ffn).sum()),
        }
