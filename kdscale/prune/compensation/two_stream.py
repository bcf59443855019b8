"""Compensation in both streams: each projection is refitted on what the teacher and what the student read there.

`repair.compensated_layers` fits each layer as if everything before it were the teacher. It is not: errors add up from
layer to layer, and a later layer reads something it was never fitted on. Fitted on the student's stream alone, layers
answer noisy inputs with too little, and the next ones get less still: far worse (docs/explanation/measured-pruning.md).
So both are equations of one regression. Teacher and student run side by side, a layer at a time; for each projection
into the residual stream, attention first, with x_T and x_S what the teacher and the student read at the kept inputs:

    W' = argmin ‖x_T W'ᵀ − y_T‖² + ‖x_S W'ᵀ − (y_T + β(r_T − r_S))‖² + λ‖W' − W_kept‖²

y_T is what the teacher's sublayer adds and r_T − r_S how far the student's residual stream is behind before it: the
asymmetric target of GPTAQ (arXiv 2504.02692) plus a share β of the error so far.

In a mixture the experts' share of the sublayer's target is divided among the kept ones: expert_repair.py.

B batch · S sequence · N = B·S tokens · n tokens of one expert · D' kept hidden channels · K kept inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.config.prune import PruneConfig
from kdscale.files import remove_tree
from kdscale.models.experts import Routing, expert_units, experts_call, routing_among_kept
from kdscale.models.hidden_states import ACTIVATION_BYTES, IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_pass import LayerPass
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.compensation.experts import Equations, kept_units, refit_experts
from kdscale.prune.compensation.layer_gaps import RepairedWeights, is_plain
from kdscale.prune.compensation.one_stream import COMPENSATED, compensated_roles, fits_experts
from kdscale.prune.compensation.recovered_error import InputSample, RecoveredErrors
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_writer
from kdscale.weights import Checkpoint

_EMBEDDED = "embedded"  # the teacher's first states, until they stand beside the student's


def two_stream_layers(
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
    """As `repair.compensated_layers`, of which it is the other kind: (the student's layer, role → weight).

    β is `cfg.stream_correction`. It applies where a layer adds its two sublayers' outputs to its input and nothing else
    (no norm or factor between), and is taken as 0 elsewhere. In memory: a layer of each model, one regression, and the
    hidden states of both within the budget of `scratch`.
    """
    plan = slicer.plan
    both = _BothStreams(stream, slicer, teacher)
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    depth = plan.kept.layers[-1] + 1
    with reporter.bar("compensation", total=tokens) as bar:

        def advance(count: int, layer: int) -> None:
            bar.advance(count / depth, f"layer {layer + 1}/{depth}")

        walk = LayerPass(both, batches, scratch, advance)
        for pair in walk.layers(depth):
            if pair.position is not None:
                with torch.inference_mode():
                    done = None if mended is None else mended.get(pair.position)
                    solved = pair.fit(walk.states, batches, cfg, residuals, done, scratch.activation_bytes)
                if is_writer():
                    yield pair.position, solved
                del solved
            walk.run(pair)
            walk.finish()
        walk.close()


class _BothStreams:
    """Teacher and student as one stream for LayerPass: a token's state is the teacher's D numbers and our D'."""

    def __init__(self, stream: LayerStream, slicer: Slicer, teacher: Checkpoint):
        self.dims, self.device, self._slicer = stream.dims, stream.device, slicer
        self._theirs = stream
        self._ours = LayerStream(
            slicer.student_config,
            slicer.family,
            sliced_source(teacher, slicer),
            dtype=stream.dtype,
            device=stream.device,
        )

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        # one embedding in memory at a time
        aside = replace(scratch.subfolder(_EMBEDDED), activation_bytes=scratch.activation_bytes // 4)
        theirs = self._theirs.embed(batches, aside)
        enter, states = self._ours.embedding(), HiddenStates(scratch, self.device)
        with torch.inference_mode():
            for batch, wide in zip(batches, theirs, strict=True):
                ids, positions = batch.input_ids_BS.to(self.device), batch.position_ids_BS.to(self.device)
                states.append(torch.cat([wide, enter(ids, positions)], dim=-1))
        if aside.folder is not None:
            remove_tree(aside.folder)
        return states

    def layer(self, index: int) -> _LayerPair:
        kept = self._slicer.plan.kept.layers
        position = kept.index(index) if index in kept else None
        ours = None if position is None else self._ours.layer(position)
        return _LayerPair(self._theirs.layer(index), ours, self._slicer, position, self.device)


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
    """One layer of the teacher and, if it is kept, the student's at the same place."""

    def __init__(
        self,
        theirs: DecoderLayer,
        ours: DecoderLayer | None,
        slicer: Slicer,
        position: int | None,
        device: torch.device,
    ):
        self.index, self.position = theirs.index, position
        self._theirs, self._ours, self._slicer = theirs, ours, slicer
        self._kept_D = torch.tensor(slicer.plan.kept.hidden, device=device)
        sites = slicer.family.sites
        self._paths = {"o": sites.heads, "down": sites.mlp_output}
        self._seen: dict[tuple[bool, str], tuple[Tensor, Tensor]] = {}
        self._calls: dict[bool, tuple[Tensor, Routing]] = {}  # of the experts of a mixture
        self._shape: tuple[int, ...] = ()
        self._handles = [
            one.site(path).register_forward_hook(self._keeper(mine, role), with_kwargs=True)
            for mine, one in ((False, theirs), (True, ours))
            if one is not None
            for role, path in self._paths.items()
        ]

    def __call__(self, both: Tensor, positions_BS: Tensor) -> Tensor:
        theirs, ours = self._split(both)
        self._shape = tuple(positions_BS.shape)
        after = ours if self._ours is None else self._ours(ours, positions_BS)
        return torch.cat([self._theirs(theirs, positions_BS), after], dim=-1)

    def release(self) -> None:
        self._theirs.release()
        if self._ours is not None:
            self._ours.release()

    def fit(
        self,
        states: HiddenStates,
        batches: Sequence[TokenBatch],
        cfg: PruneConfig,
        residuals: RecoveredErrors | None,
        mended: Tensor | None = None,
        room: int = ACTIVATION_BYTES,
    ) -> dict[str, Tensor]:
        """Refit the projections that are cut, in the order in which they add to the stream; not a `mended` down.

        `room`: bytes for the sums of the experts of a mixture that are fitted at a time.
        """
        slicer = self._slicer
        roles = compensated_roles(slicer.plan, slicer)
        out: dict[str, Tensor] = {}
        if "o" in roles:
            out["o"] = self._refit("o", states, batches, cfg, residuals)
        if mended is not None:
            assert self._ours is not None
            module: Any = self._ours.site(self._paths["down"])
            module.weight.data = mended.to(module.weight)
        elif fits_experts(slicer.plan, slicer):
            out |= self._refit_experts(states, batches, cfg, residuals, room)
        elif "down" in roles:
            out["down"] = self._refit("down", states, batches, cfg, residuals)
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        self._calls.clear()
        return out

    def _refit(
        self,
        role: str,
        states: HiddenStates,
        batches: Sequence[TokenBatch],
        cfg: PruneConfig,
        residuals: RecoveredErrors | None,
    ) -> Tensor:
        assert self._ours is not None
        module, transposed = self._ours.site(self._paths[role]), self._slicer.family.transposed(role)
        weight_DK, bias_D = _weight(module, transposed), getattr(module, "bias", None)
        inputs = self._slicer.kept(COMPENSATED[role], self.position)
        assert inputs is not None
        inputs_K = torch.tensor(inputs, device=weight_DK.device)
        sums, sample = TargetSums(weight_DK), InputSample(len(batches))
        offset = 0.0 if bias_D is None else bias_D.float()
        for target in self._targets(role, states, batches, cfg.stream_correction):
            sample.see(self._seen[False, role][0])
            sums.add(self._seen[False, role][0][..., inputs_K], self._wanted(role) - offset)
            sums.add(self._seen[True, role][0], target - offset)
        sums.reduce()
        solved_DK = sums.solve(cfg.ridge_lambda, f"{self._paths[role]} of the student's layer {self.position}")
        if residuals is not None:
            whole_DU = _weight(self._theirs.site(self._paths[role]), transposed)[self._kept_D]
            residuals.add(self.index, role, sample, whole_DU, inputs_K, solved_DK)
        on_disk = solved_DK.T.contiguous() if transposed else solved_DK
        module.weight.data = on_disk.to(weight_DK.dtype)
        return on_disk.cpu()

    def _targets(self, role: str, states: HiddenStates, batches: Sequence[TokenBatch], beta: float) -> Iterator[Tensor]:
        """Both layers run on one batch after the other: what the student's projection is to put out, [B, S, D']."""
        for index, batch in enumerate(batches):
            before = states[index]
            after = self(before, batch.position_ids_BS.to(before.device))
            theirs, ours = self._split(before)
            plain = self._is_plain(theirs, self._split(after)[0])
            yield self._target(role, theirs, ours, beta if plain else 0.0)

    def _refit_experts(
        self,
        states: HiddenStates,
        batches: Sequence[TokenBatch],
        cfg: PruneConfig,
        residuals: RecoveredErrors | None,
        room: int,
    ) -> dict[str, Tensor]:
        assert self._ours is not None and self.position is not None
        path = self._slicer.family.sites.experts
        whole: Any = self._theirs.site(path)
        cut: Any = self._ours.site(path)

        def sweep(group: Sequence[int]) -> Iterator[Equations]:
            for target in self._targets("down", states, batches, cfg.stream_correction):
                yield from self._equations(group, whole, cut, target.flatten(0, -2))

        out = refit_experts(whole, self._slicer, self.position, sweep, cfg.ridge_lambda, room, residuals)
        for place, weight_DK in enumerate(out.values()):  # in the order of the student's experts
            cut.down_proj.data[place] = weight_DK.to(cut.down_proj)
        return out

    def _equations(self, group: Sequence[int], whole: Any, cut: Any, target_ND: Tensor) -> Iterator[Equations]:
        """Those of the experts in `group` for the batch that both layers were run on last, from both streams."""
        assert self.position is not None
        slicer = self._slicer
        kept = slicer.plan.kept.experts[self.position]
        (theirs_ND, _), (ours_ND, ours) = self._calls[False], self._calls[True]
        router = self._theirs.site(slicer.family.sites.router)
        in_theirs = routing_among_kept(router, kept, theirs_ND)
        in_ours = Routing(torch.tensor(kept, device=ours_ND.device)[ours.chosen_NT], ours.weights_NT)
        wanted_ND = self._wanted("down").flatten(0, -2)
        for routing, target, mine in ((in_theirs, wanted_ND, False), (in_ours, target_ND, True)):
            mixed_ND = whole.forward(theirs_ND, *routing)[:, self._kept_D].float()  # not through the hooks
            left_ND = (target - mixed_ND) / routing.weights_NT.float().sum(-1, keepdim=True)
            for expert in group:
                token_n, weight_n = routing.of(expert)
                weight_n1 = weight_n[:, None]
                units_nF = expert_units(whole, expert, theirs_ND[token_n]).float() * weight_n1
                output_nD = units_nF @ whole.down_proj[expert][self._kept_D].float().T
                if mine:
                    x_nK = expert_units(cut, kept.index(expert), ours_ND[token_n]).float() * weight_n1
                else:
                    x_nK = units_nF[:, kept_units(slicer, self.position, expert, units_nF.device)]
                yield Equations(expert, x_nK, output_nD + weight_n1 * left_ND[token_n], None if mine else units_nF)

    def _split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = self._slicer.plan.teacher.hidden, self._slicer.plan.student.hidden
        theirs, ours = both.split([teacher, student], dim=-1)
        return theirs, ours

    def _is_plain(self, before: Tensor, after: Tensor) -> bool:
        added = self._output(False, "o") + self._output(False, "down")
        return is_plain(before, added, after)

    def _target(self, role: str, theirs: Tensor, ours: Tensor, beta: float) -> Tensor:
        target = self._wanted(role)
        if beta:
            behind = theirs.float()[..., self._kept_D] - ours.float()
            if role == "down":
                behind += self._output(False, "o")[..., self._kept_D] - self._output(True, "o")
            target = target + beta * behind
        return target

    def _wanted(self, role: str) -> Tensor:
        """y_T on the channels that stay."""
        return self._output(False, role)[..., self._kept_D]

    def _output(self, mine: bool, role: str) -> Tensor:
        return self._seen[mine, role][1].float()

    def _keeper(self, mine: bool, role: str) -> Callable[[Any, Any, Any, Any], None]:
        experts = role == "down" and bool(self._slicer.family.sites.experts)

        def keep(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            out = output if isinstance(output, Tensor) else output[0]
            if experts:  # called with rows of tokens
                self._calls[mine] = experts_call(args, kwargs)
                out = out.unflatten(0, self._shape)
            self._seen[mine, role] = (self._calls[mine][0] if experts else args[0], out)

        return keep


def _weight(module: nn.Module, transposed: bool) -> Tensor:
    """[outputs, inputs]"""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if transposed else weight
