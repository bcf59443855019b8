"""The loss of candidate students before any of them is written: all of them go through the teacher side by side.

Each teacher layer is read once. Every candidate that keeps the layer slices it in memory, solves the regression that
apply would solve (from one Gram matrix of the teacher's inputs, shared by all candidates), and moves its own hidden
states through it. At the end: cross-entropy, and the KL divergence from the teacher's next-token distribution over the
whole vocabulary, and how likely the answers to questions are, if there are any. In memory: one teacher layer, one
candidate's layer, the Gram matrices of a layer, hidden states within a byte budget.

B batch · S sequence · N scored tokens · D hidden · U inputs of a projection · V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdscale.errors import DataError, SelfCheckError
from kdscale.families import Family
from kdscale.families.writers import Writer
from kdscale.files import remove_tree
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_pass import GramHooks
from kdscale.models.layer_stream import DecoderLayer, LayerStream, NextToken, TokenBatch
from kdscale.prune.candidates import MaskedScore
from kdscale.prune.compensation.experts import ExpertInputs, new_weight, refit_experts
from kdscale.prune.compensation.one_stream import compensated, compensates, fits_experts, kept_outputs
from kdscale.prune.compensation.regression import RidgeSums
from kdscale.prune.plan import Plan
from kdscale.prune.search.questions import Questions
from kdscale.prune.slicing import SlicedStudent, SlicedTensor, Slicer
from kdscale.prune.stream_cut import METHOD as REFIT
from kdscale.prune.stream_cut import CutStudent, StreamBasis
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint


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
    questions: Questions | None = None,
    importance: Mapping[str, Any] | None = None,
    acceptance: bool = False,
) -> list[MaskedScore]:
    """Loss and KL of each plan's student on `batches`, in nats per token, and its score on `questions`.

    With `acceptance` also how likely the teacher accepts its tokens (arXiv 2211.17192, theorem 3.5).

    Plans that compensate, in whichever way, are fitted here with one ridge regression on `calibration` with λ `ridge`.
    A hidden axis that is to be cut by `refit` (which needs the `importance` scores) is folded into the directions that
    stay and not refitted, so that it scores worse than it will be.
    Hidden states beyond the byte budget of `scratch` are in its folder, which is removed at the end. Raises DataError
    without labels or without calibration tokens that a plan needs, SelfCheckError when a loss is not finite.
    """
    device, reporter = device or torch.device("cpu"), reporter or Reporter(quiet=True)
    if not sum(int((batch.labels_BS >= 0).sum()) for batch in batches):
        raise DataError("there are no tokens to score candidates on", expected="at least one label")
    shared = _LayerCache(teacher)
    teacher_stream = LayerStream(teacher.config, family, shared.tensor, dtype=dtype, device=device)
    model_scratch = replace(scratch, activation_bytes=scratch.activation_bytes // (len(plans) + 2))
    students = [_Student(shared, family, plan, ridge, dtype, device, importance or {}) for plan in plans]
    if any(student.fits for student in students) and not sum(batch.input_ids_BS.numel() for batch in calibration):
        raise DataError("compensation needs calibration tokens", hint="or set prune.compensate=none")
    calibrate = list(calibration) if any(student.fits for student in students) else []
    texts: list[TokenBatch] = [*batches, *(questions.batches if questions else ())]
    states = teacher_stream.embed(texts, model_scratch.subfolder("teacher"))
    calibration_states = teacher_stream.embed(calibrate, model_scratch.subfolder("calibration"))
    for number, student in enumerate(students):
        student.states = student.stream.embed(texts, model_scratch.subfolder(f"candidate-{number}"))
    layers = teacher_stream.dims.layers
    with torch.inference_mode(), reporter.bar("masked candidates", layers, unit="layer") as bar:
        for index in range(layers):
            shared.clear()
            layer = teacher_stream.layer(index)
            grams, inputs = _teacher_inputs(layer, students, calibrate, calibration_states, model_scratch, device)
            _advance(layer, states, texts, device)
            if inputs is None:  # fitting experts still needs the layer's weights
                layer.release()
            for student in students:
                student.advance(index, grams, inputs, scratch.activation_bytes, texts, device)
            layer.release()
            bar.advance(1, f"layer {index + 1}/{layers}")
        shared.clear()
        models = [(NextToken(teacher_stream), states), *((NextToken(s.stream), s.states) for s in students)]
        scores = _losses(models, students, batches, device, acceptance)
        if questions is not None:
            answered = [_answers(*model, questions, len(batches), device) for model in models]
            scores = [
                score.model_copy(update={"task": task})
                for score, task in zip(scores, questions.compare(answered[0], answered[1:]), strict=True)
            ]
    if scratch.folder is not None:
        remove_tree(scratch.folder)
    return scores


class _LayerCache:
    """The teacher's tensors, each read from disk once per layer, however many candidates slice it."""

    def __init__(self, teacher: Checkpoint):
        self.config, self._teacher = teacher.config, teacher
        self._held: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """The teacher's tensor `name`, as it is on disk."""
        if name not in self._held:
            self._held[name] = self._teacher.tensor(name)
        return self._held[name]

    def clear(self) -> None:
        """Forget the tensors of the layer."""
        self._held.clear()


class _Student:
    """One candidate: its slices, its regression and its hidden states."""

    def __init__(
        self,
        shared: _LayerCache,
        family: Family,
        plan: Plan,
        ridge: float,
        dtype: torch.dtype,
        device: torch.device,
        importance: Mapping[str, Any],
    ):
        self.plan, self._shared, self._ridge = plan, shared, ridge
        self.slicer = Slicer(shared.config, family, plan)
        self.fits = compensates(plan, self.slicer)
        self.stream = LayerStream(self.slicer.student_config, family, self._tensor, dtype=dtype, device=device)
        self.states = HiddenStates()
        self._cut: CutStudent | None = None
        if plan.methods.hidden == REFIT:
            self._cut = CutStudent(self.slicer, shared.tensor, StreamBasis.of(importance, plan.student.hidden))
        self._sliced = self._cut or SlicedStudent(self.slicer, shared.tensor)
        self._solved: dict[str, Tensor] = {}

    def _tensor(self, name: str) -> Tensor:
        origin = self._sliced.origins[name]
        if (solved := new_weight(origin, self._solved, self.slicer)) is not None:
            # rounded to the dtype on disk, as the student's file would be
            return solved.to(self._shared.tensor(origin.source).dtype)
        return self._sliced.tensor(name)

    def advance(
        self,
        index: int,
        grams: dict[str, Tensor],
        inputs: ExpertInputs | None,
        fit_bytes: int,
        batches: Sequence[TokenBatch],
        device: torch.device,
    ) -> None:
        """Send the hidden states through the student's version of the teacher's layer `index`, if it has one.

        `inputs`, `fit_bytes`: what the layer's experts read, and the memory for fitting them.
        """
        if index not in self.plan.kept.layers:
            return
        position = self.plan.kept.layers.index(index)
        roles = compensated(self.plan, self.slicer, position)
        self._solved = {
            tensor.spec.role: self._solve(tensor, grams[tensor.spec.role])
            for tensor in self.slicer.layer(position)
            if tensor.spec.role in grams and tensor.spec.role in roles
        }
        if inputs is not None and fits_experts(self.plan, self.slicer, position):
            sweep = inputs.sweep(self.slicer, position)
            self._solved |= refit_experts(inputs.experts, self.slicer, position, sweep, self._ridge, fit_bytes)
        layer = self.stream.layer(position)
        self._solved = {}
        _advance(layer, self.states, batches, device)
        layer.release()

    def _solve(self, tensor: SlicedTensor, gram_UU: Tensor) -> Tensor:
        role = tensor.spec.role
        assert tensor.position is not None
        kept = self.slicer.kept(self.slicer.writers(tensor.position)[role].axis, tensor.position)
        assert kept is not None
        sums = RidgeSums.of_gram(kept, gram_UU)
        if self._cut is not None:
            weight_DU = self._cut.written(self._shared.tensor(tensor.source), tensor.spec).to(gram_UU.device)
        else:
            weight_DU = kept_outputs(self.slicer, role, self._shared.tensor(tensor.source).to(gram_UU.device))
        on_disk: Tensor = self.slicer.family.output_by_input(
            role, sums.solve(weight_DU, self._ridge, tensor.source).cpu()
        )
        return on_disk


def _teacher_inputs(
    layer: DecoderLayer,
    students: Sequence[_Student],
    batches: Sequence[TokenBatch],
    states: HiddenStates,
    scratch: Scratch,
    device: torch.device,
) -> tuple[dict[str, Tensor], ExpertInputs | None]:
    """What the compensated projections of this layer read: Gram matrices (fp32) by role, and the inputs themselves of a
    mixture's experts, whose Gram matrices would be too many. Moves `states` through the layer."""
    found: dict[str, Writer] = {}
    for student in students:
        if layer.index in student.plan.kept.layers:
            found |= compensated(student.plan, student.slicer, student.plan.kept.layers.index(layer.index))
    sums = GramHooks()
    inputs = ExpertInputs(layer, scratch, device) if any(writer.of_experts for writer in found.values()) else None
    for role in sorted(found):
        if not found[role].of_experts:
            sums.attach(role, layer.site(found[role].path))
    _advance(layer, states, batches, device)
    sums.detach()
    if inputs is not None:
        inputs.stop()
    return sums.grams, inputs


def _advance(layer: DecoderLayer, states: HiddenStates, batches: Sequence[TokenBatch], device: torch.device) -> None:
    for index, batch in enumerate(batches):
        states[index] = layer(states[index], batch.position_ids_BS)


def _losses(
    models: Sequence[tuple[NextToken, HiddenStates]],
    students: Sequence[_Student],
    batches: Sequence[LabelledBatch],
    device: torch.device,
    acceptance: bool,
) -> list[MaskedScore]:
    """Means over all labelled tokens, computed a chunk of rows of logits at a time; `models`: the teacher first."""
    (teacher_output, states), *others = models
    count, teacher_ce = 0, 0.0
    ce, kl, overlap = ([0.0] * len(students) for _ in range(3))
    for index, batch in enumerate(batches):
        labels = batch.labels_BS.flatten().to(device)
        valid = (labels >= 0).nonzero().flatten()
        count += len(valid)
        for chunk in valid.split(teacher_output.rows_at_once):
            targets_N1 = labels[chunk].unsqueeze(1)
            log_p_NV = teacher_output.log_probabilities(states[index], chunk)
            teacher_ce -= float(log_p_NV.gather(1, targets_N1).double().sum())
            for number, (output, student_states) in enumerate(others):
                log_q_NV = output.log_probabilities(student_states[index], chunk)
                ce[number] -= float(log_q_NV.gather(1, targets_N1).double().sum())
                kl[number] += float((log_p_NV.exp() * (log_p_NV - log_q_NV)).double().sum())
                if acceptance:
                    overlap[number] += float(torch.minimum(log_p_NV, log_q_NV).exp().double().sum())
    scores = []
    for student, loss, divergence, accepted in zip(students, ce, kl, overlap, strict=True):
        if not torch.isfinite(torch.tensor([loss, divergence])).all():
            raise SelfCheckError("a candidate's masked loss is not finite", hint="try importance.dtype=float32")
        scores.append(
            MaskedScore(
                loss=loss / count,
                kl=divergence / count,
                teacher_loss=teacher_ce / count,
                tokens=count,
                acceptance=accepted / count if acceptance else None,
                compensate="ridge" if student.fits else "none",  # also for two_stream: one pass for all candidates
            )
        )
    return scores


def _answers(
    output: NextToken, states: HiddenStates, questions: Questions, first: int, device: torch.device
) -> NDArray[np.float64]:
    """The log-likelihood of each answer, in nats; the questions' texts follow `first` other batches."""
    sums = torch.zeros(questions.answers, dtype=torch.float64)
    for index, batch in enumerate(questions.batches, start=first):
        for chunk in torch.arange(len(batch.places_N)).split(output.rows_at_once):
            log_p_NV = output.log_probabilities(states[index], batch.places_N[chunk].to(device))
            values_N1 = log_p_NV.gather(1, batch.labels_N[chunk, None].to(device))
            sums.index_add_(0, batch.answers_N[chunk], values_N1[:, 0].double().cpu())
    if not torch.isfinite(sums).all():
        raise SelfCheckError("a model's answers have no finite likelihood", hint="try importance.dtype=float32")
    values: NDArray[np.float64] = sums.numpy()
    return values
