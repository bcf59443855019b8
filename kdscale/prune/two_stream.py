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

from kdscale.config import PruneConfig
from kdscale.dist import is_writer
from kdscale.progress import Reporter
from kdscale.prune.compensate import TargetSums
from kdscale.prune.gaps import ROLE, Repaired
from kdscale.prune.repair import COMPENSATED, compensated_roles
from kdscale.prune.residual import Residuals, Sample
from kdscale.prune.slicing import Slicer
from kdscale.prune.states import IN_MEMORY, LayerPass, Scratch, States
from kdscale.prune.stream import LayerStream, OneLayer, TokenBatch
from kdscale.weights import Checkpoint

# A layer's output counts as its input plus what its two sublayers put out within this share of the change and, for the
# rounding of bf16, of the output.
_PLAIN, _ROUNDING = 2e-2, 1e-2


def two_stream_layers(
    stream: LayerStream,
    slicer: Slicer,
    batches: Sequence[TokenBatch],
    cfg: PruneConfig,
    teacher: Checkpoint,
    reporter: Reporter,
    scratch: Scratch = IN_MEMORY,
    residuals: Residuals | None = None,
    mended: Repaired | None = None,
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
                    solved = pair.fit(
                        walk.states, batches, cfg, residuals, None if mended is None else mended.get(pair.position)
                    )
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

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> States:
        theirs, ours = self._theirs.embedding(), self._ours.embedding()
        states = States(scratch, self.device)
        with torch.inference_mode():
            for batch in batches:
                ids, positions = batch.input_ids_BS.to(self.device), batch.position_ids_BS.to(self.device)
                states.append(torch.cat([theirs(ids, positions), ours(ids, positions)], dim=-1))
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
        self, theirs: OneLayer, ours: OneLayer | None, slicer: Slicer, position: int | None, device: torch.device
    ):
        self.index, self.position = theirs.index, position
        self._theirs, self._ours, self._slicer = theirs, ours, slicer
        self._kept_D = torch.tensor(slicer.plan.kept.hidden, device=device)
        sites = slicer.family.sites
        self._paths = {"o": sites.heads, "down": sites.mlp_output}
        self._seen: dict[tuple[bool, str], tuple[Tensor, Tensor]] = {}
        self._handles = [
            one.site(path).register_forward_hook(self._keeper(mine, role))
            for mine, one in ((False, theirs), (True, ours))
            if one is not None
            for role, path in self._paths.items()
        ]

    def __call__(self, both: Tensor, positions_BS: Tensor) -> Tensor:
        theirs, ours = self._split(both)
        after = ours if self._ours is None else self._ours(ours, positions_BS)
        return torch.cat([self._theirs(theirs, positions_BS), after], dim=-1)

    def release(self) -> None:
        self._theirs.release()
        if self._ours is not None:
            self._ours.release()

    def fit(
        self,
        states: States,
        batches: Sequence[TokenBatch],
        cfg: PruneConfig,
        residuals: Residuals | None,
        mended: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Refit the projections that are cut, in the order in which they add to the stream; not a `mended` down."""
        roles = compensated_roles(self._slicer.plan, self._slicer)
        out: dict[str, Tensor] = {}
        for role in ("o", "down"):
            if role == ROLE and mended is not None:
                assert self._ours is not None
                module = self._ours.site(self._paths[role])
                module.weight.data = mended.to(module.weight)  # type: ignore[arg-type]
            elif role in roles:
                out[role] = self._refit(role, states, batches, cfg, residuals)
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        return out

    def _refit(
        self,
        role: str,
        states: States,
        batches: Sequence[TokenBatch],
        cfg: PruneConfig,
        residuals: Residuals | None,
    ) -> Tensor:
        assert self._ours is not None
        module, transposed = self._ours.site(self._paths[role]), self._slicer.family.transposed(role)
        weight_DK, bias_D = _weight(module, transposed), getattr(module, "bias", None)
        inputs = self._slicer.kept(COMPENSATED[role], self.position)
        assert inputs is not None
        inputs_K = torch.tensor(inputs, device=weight_DK.device)
        sums, sample = TargetSums(weight_DK), Sample(len(batches))
        for index, batch in enumerate(batches):
            before = states[index]
            after = self(before, batch.position_ids_BS.to(before.device))
            theirs, ours = self._split(before)
            beta = cfg.stream_correction if self._is_plain(theirs, self._split(after)[0]) else 0.0
            offset = 0.0 if bias_D is None else bias_D.float()
            sample.see(self._seen[False, role][0])
            sums.add(self._seen[False, role][0][..., inputs_K], self._wanted(role) - offset)
            sums.add(self._seen[True, role][0], self._target(role, theirs, ours, beta) - offset)
        sums.reduce()
        solved_DK = sums.solve(cfg.ridge_lambda, f"{self._paths[role]} of the student's layer {self.position}")
        if residuals is not None:
            whole_DU = _weight(self._theirs.site(self._paths[role]), transposed)[self._kept_D]
            residuals.add(self.index, role, sample, whole_DU, inputs_K, solved_DK)
        on_disk = solved_DK.T.contiguous() if transposed else solved_DK
        module.weight.data = on_disk.to(weight_DK.dtype)
        return on_disk.cpu()

    def _split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = self._slicer.plan.teacher.hidden, self._slicer.plan.student.hidden
        theirs, ours = both.split([teacher, student], dim=-1)
        return theirs, ours

    def _is_plain(self, before: Tensor, after: Tensor) -> bool:
        added = self._output(False, "o") + self._output(False, "down")
        change, output = (after.float() - before.float()).norm(), after.float().norm()
        return bool((before.float() + added - after.float()).norm() <= _PLAIN * change + _ROUNDING * output)

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

    def _keeper(self, mine: bool, role: str) -> Callable[[Any, Any, Any], None]:
        def keep(_module: Any, args: tuple[Tensor, ...], output: Any) -> None:
            self._seen[mine, role] = (args[0], output if isinstance(output, Tensor) else output[0])

        return keep


def _weight(module: nn.Module, transposed: bool) -> Tensor:
    """[outputs, inputs]"""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if transposed else weight
