"""Compensation in the teacher's stream (`ridge`): each layer is fitted as if every layer before it were the teacher's.

The teacher is streamed over the calibration tokens once more, and each layer's regressions (regression.py) are solved
before the next layer is read.

U inputs of a projection · D' kept hidden channels · K kept inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kdscale.config.prune import PruneConfig
from kdscale.families.writers import Writer
from kdscale.models.hidden_states import IN_MEMORY, Scratch
from kdscale.models.layer_pass import LayerPass, layer_progress
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.compensation.experts import ExpertInputs, refit_experts
from kdscale.prune.compensation.layer_gaps import REPAIRED_ROLE, RepairedWeights
from kdscale.prune.compensation.recovered_error import InputSample, RecoveredErrors
from kdscale.prune.compensation.regression import RidgeSums
from kdscale.prune.plan import Plan
from kdscale.prune.slicing import Slicer
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_writer
from kdscale.weights import Checkpoint


def compensated(plan: Plan, slicer: Slicer, position: int) -> dict[str, Writer]:
    """The projections of the student's layer that this plan rewrites by regression: those that read a cut axis."""
    if plan.methods.compensate == "none":
        return {}
    return {role: writer for role, writer in slicer.writers(position).items() if slicer.cuts(writer.axis)}


def rewritten(plan: Plan, slicer: Slicer, position: int) -> dict[str, Writer]:
    """The same with those that are refitted because what they read changes: behind a state that is cut, from both
    streams, since the teacher's alone tells nothing of it."""
    out = compensated(plan, slicer, position)
    if plan.methods.compensate != "two_stream" or not slicer.cuts("ssm_state"):
        return out
    return {role: writer for role, writer in slicer.writers(position).items() if role in out or role == "ssm_out"}


def compensates(plan: Plan, slicer: Slicer) -> bool:
    """Whether this plan rewrites any projection by regression."""
    return any(rewritten(plan, slicer, position) for position in range(plan.student.layers))


def fits_experts(plan: Plan, slicer: Slicer, position: int) -> bool:
    """Whether this plan rewrites the down projections of experts in the student's layer `position`."""
    return any(writer.of_experts for writer in compensated(plan, slicer, position).values())


def kept_outputs(slicer: Slicer, role: str, weight: Tensor) -> Tensor:
    """A teacher's projection as it is stored → [D', U], without the rows of channels that go."""
    weight_DU = slicer.family.output_by_input(role, weight)
    hidden = slicer.kept("hidden", None)
    return weight_DU if hidden is None else weight_DU[torch.tensor(hidden, device=weight_DU.device)]


def compensated_layers(
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
    """Yield (the student's layer, role → compensated weight), layer by layer; an expert's role ends with its number.

    Weights are fp32 on the CPU, as they are on disk, and cut to the kept hidden channels. With several ranks `batches`
    are this rank's share; all ranks must go through this, and the one that writes gets the weights. A layer is finished
    when the next one is asked for; with a folder in `scratch` a killed pass resumes at the last layer that it saved.
    `recovered` is measured on the writer's share. Projections that `repaired` has are left out. Raises SelfCheckError
    when a regression is not finite.
    """
    plan = slicer.plan
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    depth = plan.kept.layers[-1] + 1
    with reporter.bar("compensation", total=tokens) as bar:
        walk = LayerPass(stream, batches, scratch, layer_progress(bar, depth))
        for layer in walk.layers(depth):
            if layer.index not in plan.kept.layers:
                walk.run(layer)
                layer.release()
                walk.finish()
                continue
            position = plan.kept.layers.index(layer.index)
            skip = [REPAIRED_ROLE] if repaired is not None and repaired.has(position) else []
            fits = _LayerFits(layer, slicer, position, len(batches), skip, recovered)
            fitted = fits_experts(plan, slicer, position)
            inputs = ExpertInputs(layer, scratch, stream.device) if fitted else None
            walk.run(layer)
            solved: dict[str, Tensor] = {}
            if inputs is not None:
                inputs.stop()
                experts, sweep, room = inputs.experts, inputs.sweep(slicer, position), scratch.activation_bytes
                with torch.inference_mode():
                    solved = refit_experts(experts, slicer, position, sweep, cfg.ridge_lambda, room, recovered)
            layer.release()
            fits.reduce()
            if is_writer():
                with torch.inference_mode():
                    solved |= fits.solve(teacher, cfg.ridge_lambda)
                yield position, solved
            del solved, fits, inputs
            walk.finish()
        walk.close()


class _LayerFits:
    """The regressions of one layer of the teacher: sums over what its projections read, then their new weights.

    `skip`: roles that are not fitted. Down projections of experts are fitted elsewhere (experts.py).
    """

    def __init__(
        self,
        layer: DecoderLayer,
        slicer: Slicer,
        position: int,
        batches: int,
        skip: Sequence[str],
        recovered: RecoveredErrors | None,
    ):
        self._slicer, self._position, self._recovered = slicer, position, recovered
        self._sums: dict[str, RidgeSums] = {}
        self._samples: dict[str, InputSample] = {}
        for role, writer in compensated(slicer.plan, slicer, position).items():
            if role in skip or writer.of_experts:
                continue
            module, kept = layer.site(writer.path), slicer.kept(writer.axis, position)
            assert kept is not None
            inputs = slicer.size(writer.axis)
            sums = self._sums[role] = RidgeSums(kept, inputs, next(module.parameters()).device)
            _on_input(module, sums.add)
            if recovered is not None:
                sample = self._samples[role] = InputSample(batches)
                _on_input(module, sample.add)

    def reduce(self) -> None:
        """Sum over all ranks."""
        for sums in self._sums.values():
            sums.reduce()

    def solve(self, teacher: Checkpoint, ridge: float) -> dict[str, Tensor]:
        """Role → new weight as it is on disk, fp32 on the CPU; the sums are used up."""
        slicer, out = self._slicer, dict[str, Tensor]()
        for source, _, spec, _ in slicer.layer(self._position):
            if (sums := self._sums.get(spec.role)) is None:
                continue
            weight_DU = kept_outputs(slicer, spec.role, teacher.tensor(source).to(sums.kept.device))
            solved_DK = sums.solve(weight_DU, ridge, source).cpu()
            if self._recovered is not None:
                layer, sample = slicer.plan.kept.layers[self._position], self._samples[spec.role]
                self._recovered.add(layer, spec.role, sample, weight_DU, sums.kept, solved_DK)
            out[spec.role] = slicer.family.output_by_input(spec.role, solved_DK).contiguous()
        return out


def _on_input(module: nn.Module, see: Callable[[Tensor], None]) -> None:
    module.register_forward_pre_hook(lambda _module, args: see(args[0]))
