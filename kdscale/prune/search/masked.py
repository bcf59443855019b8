"""The loss of candidate students before any of them is written: all of them advance through the teacher side by side.

Each teacher layer is read once. Every candidate that keeps it takes its slice of that layer in memory, is given the
same regression that apply would solve (from one Gram matrix of the teacher's inputs, shared by all), and moves its own
hidden states on. At the end: cross-entropy, and the KL divergence from the teacher's whole next-token distribution.
In memory: one teacher layer, one candidate's layer, the Gram matrices of a layer, hidden states within a byte budget.

B batch · S sequence · N scored tokens · D hidden · U inputs of a projection · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kdscale.errors import DataError, SelfCheckError
from kdscale.families import Family
from kdscale.files import remove_tree
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.compensation.experts import ExpertInputs, expert_name, refit_experts
from kdscale.prune.compensation.one_stream import (
    COMPENSATED,
    compensated_roles,
    fits_experts,
    kept_outputs,
    projection_site,
)
from kdscale.prune.compensation.regression import GramHooks, RidgeSums
from kdscale.prune.plan import MaskedScore, Plan
from kdscale.prune.slicing import SlicedStudent, SlicedTensor, Slicer
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint

_LOGITS_AT_ONCE = 1 << 25  # values of one chunk of rows


class LabelledBatch(TokenBatch, Protocol):
    """`labels_BS`: the next token, negative where there is none to predict."""

    @property
    def labels_BS(self) -> Tensor: ...  # noqa: N802


def score_masked(
    teacher: Checkpoint,
    family: Family,
    plans: Sequence[Plan],
    batches: Sequence[LabelledBatch],
    *,
    calibration: Sequence[TokenBatch] = (),
    ridge: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    reporter: Reporter | None = None,
    scratch: Scratch = IN_MEMORY,
) -> list[MaskedScore]:
    """Loss and KL of each plan's student on `batches`, in nats a token.

    `calibration` and `ridge` (λ) are what plans that compensate regress on, whichever way they do. Hidden states beyond
    the byte budget of `scratch` lie in its folder, which is gone afterwards. Raises DataError without labels or without
    calibration tokens that a plan needs, SelfCheckError when a loss is not finite.
    """
    device, reporter = device or torch.device("cpu"), reporter or Reporter(quiet=True)
    if not sum(int((batch.labels_BS >= 0).sum()) for batch in batches):
        raise DataError("there are no tokens to score candidates on", expected="at least one label")
    shared = _LayerCache(teacher)
    whole = LayerStream(teacher.config, family, shared.tensor, dtype=dtype, device=device)
    share = replace(scratch, activation_bytes=scratch.activation_bytes // (len(plans) + 2))
    runs = [_Student(shared, family, plan, ridge, dtype, device) for plan in plans]
    if any(run.roles for run in runs) and not sum(batch.input_ids_BS.numel() for batch in calibration):
        raise DataError("compensation needs calibration tokens", hint="or set prune.compensate=none")
    calibrate = list(calibration) if any(run.roles for run in runs) else []
    states = whole.embed(batches, share.subfolder("teacher"))
    calibration_states = whole.embed(calibrate, share.subfolder("calibration"))
    for number, run in enumerate(runs):
        run.states = run.stream.embed(batches, share.subfolder(f"candidate-{number}"))
    layers = whole.dims.layers
    with torch.inference_mode(), reporter.bar("masked candidates", layers, unit="layer") as bar:
        for index in range(layers):
            shared.clear()
            layer = whole.layer(index)
            grams, inputs = _read(layer, family, runs, calibrate, calibration_states, share, device)
            _advance(layer, states, batches, device)
            if inputs is None:
                layer.release()
            for run in runs:
                run.advance(index, grams, inputs, scratch.activation_bytes, batches, device)
            layer.release()
            bar.advance(1, f"layer {index + 1}/{layers}")
        shared.clear()
        found = _losses(whole, runs, states, batches, device)
    if scratch.folder is not None:
        remove_tree(scratch.folder)
    return found


class _LayerCache:
    """The teacher's tensors, each read from disk once a layer however many candidates slice it."""

    def __init__(self, teacher: Checkpoint):
        self.config, self._teacher = teacher.config, teacher
        self._held: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self._teacher.tensor(name)
        return self._held[name]

    def clear(self) -> None:
        self._held.clear()


class _Student:
    """One candidate: its slices, its regression and how far its hidden states are."""

    def __init__(
        self, shared: _LayerCache, family: Family, plan: Plan, ridge: float, dtype: torch.dtype, device: torch.device
    ):
        self.plan, self._shared, self._ridge = plan, shared, ridge
        self.slicer = Slicer(shared.config, family, plan)
        self.roles = compensated_roles(plan, self.slicer)
        self.stream = LayerStream(self.slicer.student_config, family, self._tensor, dtype=dtype, device=device)
        self.states = HiddenStates()
        self._sliced = SlicedStudent(self.slicer, shared.tensor)
        self._solved: dict[str, Tensor] = {}

    def _tensor(self, name: str) -> Tensor:
        origin = self._sliced.origins[name]
        if (solved := self._solved.get(expert_name(origin.spec.role, origin.spec.expert))) is not None:
            # rounded to the dtype on disk, as the student's file would be
            return solved.to(self._shared.tensor(origin.source).dtype)
        return self._sliced.tensor(name)

    def advance(
        self,
        index: int,
        grams: dict[str, Tensor],
        inputs: ExpertInputs | None,
        room: int,
        batches: Sequence[TokenBatch],
        device: torch.device,
    ) -> None:
        """Through the student's version of the teacher's layer `index`, if it has one.

        `inputs`, `room`: what the layer's experts read, and the bytes for fitting them.
        """
        if index not in self.plan.kept.layers:
            return
        position = self.plan.kept.layers.index(index)
        self._solved = {
            tensor.spec.role: self._solve(tensor, grams[tensor.spec.role])
            for tensor in self.slicer.layer(position)
            if tensor.spec.role in grams and tensor.spec.role in self.roles
        }
        if inputs is not None and fits_experts(self.plan, self.slicer):
            sweep = inputs.sweep(self.slicer, position)
            self._solved |= refit_experts(inputs.experts, self.slicer, position, sweep, self._ridge, room)
        layer = self.stream.layer(position)
        self._solved = {}
        _advance(layer, self.states, batches, device)
        layer.release()

    def _solve(self, tensor: SlicedTensor, gram_UU: Tensor) -> Tensor:
        role = tensor.spec.role
        kept = self.slicer.kept(COMPENSATED[role], tensor.position)
        assert kept is not None
        sums = RidgeSums.of_gram(kept, gram_UU)
        weight_DU = kept_outputs(self.slicer, role, self._shared.tensor(tensor.source).to(gram_UU.device))
        on_disk: Tensor = self.slicer.family.output_by_input(
            role, sums.solve(weight_DU, self._ridge, tensor.source).cpu()
        )
        return on_disk


def _read(
    layer: DecoderLayer,
    family: Family,
    runs: Sequence[_Student],
    batches: Sequence[TokenBatch],
    states: HiddenStates,
    scratch: Scratch,
    device: torch.device,
) -> tuple[dict[str, Tensor], ExpertInputs | None]:
    """Σ xᵀx (fp32) of what the compensated projections read in this layer, by role; for the experts of a mixture, whose
    Gram matrices would be many, what they read. Moves `states` on."""
    here = [run for run in runs if layer.index in run.plan.kept.layers]
    roles = sorted({role for run in here for role in run.roles})
    sums, inputs = GramHooks(), None
    if any(fits_experts(run.plan, run.slicer) for run in here):
        roles.remove("down")
        inputs = ExpertInputs(layer, family, scratch, device)
    for role in roles:
        sums.attach(role, layer.site(projection_site(family.sites, role)))
    _advance(layer, states, batches, device)
    sums.detach()
    if inputs is not None:
        inputs.stop()
    return sums.grams, inputs


def _advance(layer: DecoderLayer, states: HiddenStates, batches: Sequence[TokenBatch], device: torch.device) -> None:
    for index, batch in enumerate(batches):
        states[index] = layer(states[index], batch.position_ids_BS.to(device))


def _losses(
    whole: LayerStream,
    runs: Sequence[_Student],
    states: HiddenStates,
    batches: Sequence[LabelledBatch],
    device: torch.device,
) -> list[MaskedScore]:
    """Sums over all labelled tokens, a chunk of rows of logits at a time."""
    theirs = _Output(whole)
    ours = [_Output(run.stream) for run in runs]
    count, teacher_ce = 0, 0.0
    ce, kl = [0.0] * len(runs), [0.0] * len(runs)
    rows = max(1, _LOGITS_AT_ONCE // whole.dims.vocab)
    for index, batch in enumerate(batches):
        labels = batch.labels_BS.flatten().to(device)
        valid = (labels >= 0).nonzero().flatten()
        count += len(valid)
        for chunk in valid.split(rows):
            targets_N1 = labels[chunk].unsqueeze(1)
            log_p_NV = theirs.log_probabilities(states[index], chunk)
            teacher_ce -= float(log_p_NV.gather(1, targets_N1).double().sum())
            for number, run in enumerate(runs):
                log_q_NV = ours[number].log_probabilities(run.states[index], chunk)
                ce[number] -= float(log_q_NV.gather(1, targets_N1).double().sum())
                kl[number] += float((log_p_NV.exp() * (log_p_NV - log_q_NV)).double().sum())
    out = []
    for run, loss, divergence in zip(runs, ce, kl, strict=True):
        if not torch.isfinite(torch.tensor([loss, divergence])).all():
            raise SelfCheckError("a candidate's masked loss is not finite", hint="try importance.dtype=float32")
        out.append(
            MaskedScore(
                loss=loss / count,
                kl=divergence / count,
                teacher_loss=teacher_ce / count,
                tokens=count,
                compensate="ridge" if run.roles else "none",  # whatever apply will use: one pass for all candidates
            )
        )
    return out


class _Output:
    """Final norm and head of one model: hidden states → log-probabilities in fp32."""

    def __init__(self, stream: LayerStream):
        self._head, self._norm = stream.head(), stream.final_norm()

    def log_probabilities(self, state_BSD: Tensor, rows_N: Tensor) -> Tensor:
        hidden_ND = self._norm(state_BSD.flatten(0, 1)[rows_N])
        return torch.log_softmax(self._head(hidden_ND), dim=-1)
