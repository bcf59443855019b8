"""Compensation in both streams: each projection is refitted on what the teacher and what the student read there.

`ridge` (one_stream.py) fits each layer as if everything before it were the teacher. It is not: errors add up from layer
to layer, and a later layer reads something it was never fitted on. Fitted on the student's stream alone, layers answer
noisy inputs with too little, and the next ones get less still: far worse (docs/explanation/measured-pruning.md). So
both are equations of one regression. Teacher and student run side by side, a layer at a time; for each projection into
the residual stream, attention first, with x_T and x_S what the teacher and the student read at the kept inputs:

    W' = argmin ‖x_T W'ᵀ − y_T‖² + ‖x_S W'ᵀ − (y_T + β(r_T − r_S))‖² + λ‖W' − W_kept‖²

y_T is what the teacher's sublayer adds and r_T − r_S how far the student's residual stream is behind before it: the
asymmetric target of GPTAQ (arXiv 2504.02692) plus a share β of the error so far.

What reads the stream (q, k, v, gate, up) is refitted first, to the student's stream (readers.py).

In a mixture the experts' part of the sublayer's target is divided among the kept ones (experts.py).

B batch · S sequence · N = B·S tokens · n tokens of one expert · D hidden · D' kept hidden · U inputs · K kept inputs
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdscale.config.prune import PruneConfig
from kdscale.families.schema import COMPONENT_OF
from kdscale.families.writers import STREAM
from kdscale.files import remove_tree
from kdscale.models.experts import (
    Routing,
    down_weight,
    expert_units,
    experts_call,
    routing_among_kept,
    weighed,
    weight_sums,
)
from kdscale.models.hidden_states import ACTIVATION_BYTES, IN_MEMORY, BesideStream, HiddenStates, Scratch
from kdscale.models.layer_pass import LayerPass, layer_progress
from kdscale.models.layer_stream import DecoderLayer, EnoughSeenError, LayerStream, TokenBatch
from kdscale.prune.compensation.experts import Equations, kept_units, refit_experts, written_rows
from kdscale.prune.compensation.layer_gaps import REPAIRED_ROLE, RepairedWeights, only_adds_sublayers
from kdscale.prune.compensation.one_stream import rewritten
from kdscale.prune.compensation.post_norm import post_norm_path
from kdscale.prune.compensation.readers import RIDGE, ReaderMap, mapped, module_path, refitted_readers, token_weights
from kdscale.prune.compensation.recovered_error import InputSample, RecoveredErrors
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.slicing import NORM_BEFORE, SlicedStudent, Slicer
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_writer
from kdscale.weights import Checkpoint

_EMBEDDED = "embedded"  # folder of the teacher's first states, until they stand beside the student's
_TEACHER, _STUDENT = "teacher", "student"


def two_stream_layers(
    stream: LayerStream,
    slicer: Slicer,
    batches: Sequence[TokenBatch],
    cfg: PruneConfig,
    teacher: Checkpoint,
    reporter: Reporter,
    scratch: Scratch = IN_MEMORY,
    recovered: RecoveredErrors | None = None,
    repaired: RepairedWeights | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (the student's layer, role → compensated weight), on the same terms as `one_stream.compensated_layers`.

    β is `cfg.stream_correction`. It applies where a layer adds its two sublayers' outputs to its input and nothing else
    (no norm or factor between), and is taken as 0 elsewhere. In memory: a layer of each model, one regression, and the
    hidden states of both within the budget of `scratch`.
    """
    plan = slicer.plan
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    depth = plan.kept.layers[-1] + 1
    with reporter.bar("compensation", total=tokens) as bar:
        source = _BothModels(stream, slicer, teacher)
        walk = LayerPass(source, batches, scratch, layer_progress(bar, depth))
        for layer in walk.layers(depth):
            if layer.position is not None:
                with torch.inference_mode():
                    mended = None if repaired is None else repaired.get(layer.position)
                    task = _Task(walk.states, batches, cfg, recovered, scratch.activation_bytes)
                    solved = layer.fit(task, mended)
                if is_writer():
                    yield layer.position, solved
                del solved, task
            walk.run(layer)
            walk.finish()
        walk.close()


def embedded_pairs(
    teacher: LayerStream, student: LayerStream, batches: Sequence[TokenBatch], scratch: Scratch
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch embedded by both models, with one embedding in memory at a time."""
    aside = replace(scratch.subfolder(_EMBEDDED), activation_bytes=scratch.activation_bytes // 4)
    yield from zip(teacher.embed(batches, aside), student.embedded(batches), strict=True)
    if aside.folder is not None:
        remove_tree(aside.folder)


class _BothModels:
    """Teacher and student as one LayerSource: a token's state is the teacher's E numbers and the student's E'."""

    def __init__(self, stream: LayerStream, slicer: Slicer, teacher: Checkpoint):
        self.depth, self.device, self._slicer = stream.depth, stream.device, slicer
        self._teacher = stream
        self._student = LayerStream(
            slicer.student_config,
            slicer.family,
            SlicedStudent(slicer, teacher.tensor).tensor,
            dtype=stream.dtype,
            device=stream.device,
        )

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        states = HiddenStates(scratch, self.device)
        for pair in embedded_pairs(self._teacher, self._student, batches, scratch):
            with torch.inference_mode():
                states.append(torch.cat(pair, dim=-1))
        return states

    def layer(self, index: int) -> _BothLayers:
        kept = self._slicer.plan.kept.layers
        position = kept.index(index) if index in kept else None
        student = None if position is None else self._student.layer(position)
        beside = (self._teacher.beside, self._student.beside)
        return _BothLayers(self._teacher.layer(index), student, self._slicer, position, self.device, beside)


@dataclass(frozen=True)
class _Task:
    """What a layer is fitted on. `room`: bytes for the sums of the experts that are fitted at a time."""

    states: HiddenStates  # that enter the layer
    batches: Sequence[TokenBatch]
    cfg: PruneConfig
    recovered: RecoveredErrors | None
    room: int = ACTIVATION_BYTES


class _BothLayers:
    """One layer of the teacher and, if it is kept, the student's at the same place (`position`)."""

    def __init__(
        self,
        teacher: DecoderLayer,
        student: DecoderLayer | None,
        slicer: Slicer,
        position: int | None,
        device: torch.device,
        beside: tuple[BesideStream, BesideStream],
    ):
        self.index, self.position, self._beside = teacher.index, position, beside
        self._teacher, self._student, self._slicer = teacher, student, slicer
        self._kept_D = torch.tensor(slicer.plan.kept.hidden, device=device)
        self._writers = {} if position is None else slicer.writers(position)
        paths = {role: writer.path for role, writer in self._writers.items()}
        self._readers: dict[str, dict[str, str]] = {}  # by the norm that they read: role → path of the module
        if position is not None:
            prefix = slicer.family.layer_prefix(teacher.index)
            sites = {t.spec.role: module_path(t.spec, prefix) for t in slicer.layer(position) if not t.spec.of_experts}
            for norm, roles in refitted_readers(slicer, position).items():
                paths[norm], self._readers[norm] = sites[norm], {role: sites[role] for role in roles}
        self._seen: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # (model, role) → what it read and put out
        self._calls: dict[str, tuple[Tensor, Routing]] = {}  # of the experts of a mixture, by model
        self._routed: Tensor | None = None  # what the teacher's router read, where that is not what its experts read
        self._unseen: set[str] | None = None  # roles that `_look` still waits for; None: the layer runs to its end
        self._only_adds: bool | None = None  # whether β applies; None: nobody has looked yet
        self._batch_shape: tuple[int, ...] = ()
        self._handles = [
            layer.site(path).register_forward_hook(self._recorder(model, role), with_kwargs=True)
            for model, layer in ((_TEACHER, teacher), (_STUDENT, student))
            if layer is not None
            for role, path in paths.items()
        ]
        if teacher.sites.router_reads_more:
            self._handles.append(teacher.site(teacher.sites.router).register_forward_pre_hook(self._see_routed))

    def __call__(self, both: Tensor, positions_BS: Tensor) -> Tensor:
        teacher, student = self._split(both)
        self._batch_shape = tuple(positions_BS.shape)
        after = student if self._student is None else self._student(student, positions_BS)
        return torch.cat([self._teacher(teacher, positions_BS), after], dim=-1)

    def release(self) -> None:
        self._teacher.release()
        if self._student is not None:
            self._student.release()

    def fit(self, task: _Task, repaired: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Refit the projections that are cut, in the order in which they add to the stream.

        Returns role → weight as it is on disk, fp32 on the CPU; the student's layer has the new weights from then on.
        `repaired`: the down projection and the norm behind it by role, if they were refitted elsewhere.
        """
        slicer = self._slicer
        assert self._student is not None and self.position is not None
        cut, out, refitted = rewritten(slicer.plan, slicer, self.position), dict[str, Tensor](), set[str]()
        for role, writer in self._writers.items():
            if (component := COMPONENT_OF[role]) not in refitted:
                out |= self._refit_readers(component, task)
                refitted.add(component)
            if role in cut and not (role == REPAIRED_ROLE and repaired):
                out |= self._refit_experts(task) if writer.of_experts else {role: self._refit(role, task)}
        for role, weight in (repaired or {}).items():
            path = self._writers[role].path if role in self._writers else post_norm_path(slicer.family, REPAIRED_ROLE)
            module: Any = self._student.site(path)
            module.weight.data = weight.to(module.weight)
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        self._calls.clear()
        return out

    def _look(self, before: Tensor, positions_BS: Tensor, roles: Sequence[str]) -> None:
        """Run both layers for the sake of their hooks, each until it has computed the projections of `roles`."""
        self._batch_shape = tuple(positions_BS.shape)
        for layer, state in zip((self._teacher, self._student), self._split(before), strict=True):
            assert layer is not None
            self._unseen = set(roles)
            layer.look(state, positions_BS)
        self._unseen = None

    def _refit_readers(self, component: str, task: _Task) -> dict[str, Tensor]:
        """Fold into all that reads the norm before `component` the map from the student's norm to the teacher's."""
        norm = NORM_BEFORE.get(component, "")
        if norm not in self._readers:
            return {}
        assert self._student is not None
        sums = ReaderMap(torch.eye(len(self._kept_D), device=self._kept_D.device))
        for index, batch in enumerate(task.batches):
            self._look(task.states[index], batch.position_ids_BS, [norm])
            meant, seen = self._output(_TEACHER, norm), self._output(_STUDENT, norm)
            weight = token_weights(batch.position_ids_BS, meant.device)
            sums.add(meant * weight, meant * weight)
            sums.add(seen * weight, meant * weight)
        map_DD = sums.solve(RIDGE * task.cfg.ridge_lambda, f"{norm} of the student's layer {self.position}")
        out = {}
        for role, path in self._readers[norm].items():
            module: Any = self._student.site(path)
            out[role] = mapped(module.weight, map_DD)
            module.weight.data = out[role].to(module.weight)
        return {role: weight.cpu() for role, weight in out.items()}

    def _refit(self, role: str, task: _Task) -> Tensor:
        assert self._student is not None
        path = self._writers[role].path
        family, module = self._slicer.family, self._student.site(path)
        weight_DK, bias_D = family.output_by_input(role, module.weight), getattr(module, "bias", None)
        axis = self._writers[role].axis
        inputs_K = self._slicer.indices(axis, self.position, weight_DK.device)
        sums, sample = TargetSums(weight_DK), InputSample(len(task.batches))
        offset = 0.0 if bias_D is None else bias_D.float()
        for target in self._targets(role, task):
            sample.add(self._seen[_TEACHER, role][0])
            sums.add(self._seen[_TEACHER, role][0][..., inputs_K], self._teacher_output(role) - offset)
            sums.add(self._seen[_STUDENT, role][0], target - offset)
        sums.reduce()
        solved_DK = sums.solve(task.cfg.ridge_lambda, f"{path} of the student's layer {self.position}")
        if task.recovered is not None and self._slicer.cuts(axis):
            teacher_module = self._teacher.site(path)
            weight_DU = family.output_by_input(role, teacher_module.weight)[self._kept_D]
            task.recovered.add(self.index, role, sample, weight_DU, inputs_K, solved_DK)
        on_disk: Tensor = family.output_by_input(role, solved_DK).contiguous()
        module.weight.data = on_disk.to(weight_DK.dtype)
        return on_disk.cpu()

    def _targets(self, role: str, task: _Task) -> Iterator[Tensor]:
        """Run both layers batch after batch; yields what the student's projection is to put out: [B, S, D'].

        The layers run no further than the projection and those that are refitted before it.
        """
        if self._only_adds is None and task.batches:
            self._only_adds = self._finds_only_sums(task)
        roles = [*itertools.takewhile(lambda name: name != role, self._writers), role]
        for index, batch in enumerate(task.batches):
            before = task.states[index]
            self._look(before, batch.position_ids_BS, roles)
            yield self._target(role, *self._streams(before), task.cfg.stream_correction if self._only_adds else 0.0)

    def _finds_only_sums(self, task: _Task) -> bool:
        """Whether the teacher's layer adds the outputs of its sublayers to its input and nothing else."""
        positions_BS = task.batches[0].position_ids_BS
        self._batch_shape = tuple(positions_BS.shape)
        after = self._beside[0].stream(self._teacher(self._split(task.states[0])[0], positions_BS))
        before, _ = self._streams(task.states[0])
        added = torch.stack([self._output(_TEACHER, role) for role in self._into_stream()]).sum(0)
        return only_adds_sublayers(before, added, after)

    def _target(self, role: str, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
        target = self._teacher_output(role)
        if beta and self._writers[role].writes == STREAM:
            behind = teacher.float()[..., self._kept_D] - student.float()
            for before in itertools.takewhile(lambda name: name != role, self._into_stream()):
                behind += self._teacher_output(before) - self._output(_STUDENT, before)
            target = target + beta * behind
        return target

    def _refit_experts(self, task: _Task) -> dict[str, Tensor]:
        assert self._student is not None and self.position is not None
        path = self._writers["down"].path
        teacher_experts: Any = self._teacher.site(path)
        student_experts: Any = self._student.site(path)

        def sweep(group: Sequence[int]) -> Iterator[Equations]:
            for target in self._targets("down", task):
                yield from self._equations(group, teacher_experts, student_experts, target.flatten(0, -2))

        ridge = task.cfg.ridge_lambda
        out = refit_experts(teacher_experts, self._slicer, self.position, sweep, ridge, task.room, task.recovered)
        for number, weight_DK in enumerate(out.values()):  # in the order of the student's experts
            down_weight(student_experts, number).data.copy_(weight_DK)
        return out

    def _equations(
        self, group: Sequence[int], teacher_experts: Any, student_experts: Any, target_ND: Tensor
    ) -> Iterator[Equations]:
        """Those of the experts in `group` for the batch that both layers were run on last, from both streams."""
        assert self.position is not None
        slicer = self._slicer
        kept = slicer.plan.kept.experts[self.position]
        (teacher_ND, _), (student_ND, student_routing) = self._calls[_TEACHER], self._calls[_STUDENT]
        in_teacher = routing_among_kept(self._teacher, kept, teacher_ND if self._routed is None else self._routed)
        numbers = torch.tensor(kept, device=student_ND.device)
        in_student = Routing(numbers[student_routing.chosen_NT], student_routing.weights_NT)
        rows_D = written_rows(slicer, self.position, student_ND.device)
        output_ND = self._teacher_output("down").flatten(0, -2)
        for routing, target, model in ((in_teacher, output_ND, _TEACHER), (in_student, target_ND, _STUDENT)):
            mixed_ND = teacher_experts.forward(teacher_ND, *routing)[:, rows_D].float()  # not through the hooks
            left_ND = (target - mixed_ND) / weight_sums(teacher_experts, routing)
            for expert in group:
                token_n, read_nD, weight_n = weighed(teacher_experts, teacher_ND, routing, expert)
                weight_n1 = weight_n[:, None]
                units_nF = expert_units(teacher_experts, expert, read_nD).float() * weight_n1
                output_nD = units_nF @ down_weight(teacher_experts, expert)[rows_D].float().T
                target_nD = output_nD + weight_n1 * left_ND[token_n]
                if model == _TEACHER:
                    x_nK = units_nF[:, kept_units(slicer, self.position, expert, units_nF.device)]
                    yield Equations(expert, x_nK, target_nD, units_nF)
                else:
                    _, read_nD, _ = weighed(student_experts, student_ND, routing, expert)
                    units_nK = expert_units(student_experts, kept.index(expert), read_nD)
                    yield Equations(expert, units_nK.float() * weight_n1, target_nD, None)

    def _see_routed(self, _router: Any, args: tuple[Tensor, ...]) -> None:
        self._routed = args[0]

    def _split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = both.split([each.size for each in self._beside], dim=-1)
        return teacher, student

    def _streams(self, both: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = (each.stream(state) for each, state in zip(self._beside, self._split(both), strict=True))
        return teacher, student

    def _teacher_output(self, role: str) -> Tensor:
        """y_T on the channels that stay."""
        output = self._output(_TEACHER, role)
        return output[..., self._kept_D] if self._writers[role].writes == STREAM else output

    def _into_stream(self) -> list[str]:
        return [role for role, writer in self._writers.items() if writer.writes == STREAM]

    def _output(self, model: str, role: str) -> Tensor:
        return self._seen[model, role][1].float()

    def _recorder(self, model: str, role: str) -> Callable[[Any, Any, Any, Any], None]:
        experts = role in self._writers and self._writers[role].of_experts

        def record(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            out = output if isinstance(output, Tensor) else output[0]
            if experts:
                self._calls[model] = experts_call(args, kwargs)
            if out.dim() == 2:  # some mixtures compute with rows of tokens
                out = out.unflatten(0, self._batch_shape)
            self._seen[model, role] = (self._calls[model][0] if experts else args[0], out)
            if self._unseen is not None:
                self._unseen.discard(role)
                if not self._unseen:
                    raise EnoughSeenError

        return record
