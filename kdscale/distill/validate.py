"""Held-out loss during training. A teacher's targets are computed once and kept, unless it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kdscale.config.distill.encoder_objectives import task_of
from kdscale.config.distill.settings import DistillConfig
from kdscale.data.batches import Batch
from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.token_store import TokenSplit
from kdscale.distill.objectives.base import Objectives
from kdscale.distill.on_policy.given_pairs import GivenPairs
from kdscale.distill.on_policy.samples import Samples
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.step import to_device
from kdscale.errors import DataError
from kdscale.runtime.device import put_on
from kdscale.runtime.ranks import all_reduce_sum
from kdscale.teacher.source import LabelChoice, MicroBatch, TargetSource
from kdscale.teacher.targets import Targets
from kdscale_launch.watchdog import enter


def held_out_batches(split: TokenSplit, settings: DistillConfig, choose: LabelChoice | None) -> list[Batch]:
    """Held-out text to validate on, with the labels that `choose` takes. Raises DataError where it takes none."""
    batches = eval_batches(
        split,
        settings.seq_len,
        settings.micro_batch,
        settings.validate_tokens,
        task=task_of(settings.objectives, settings.masking),
    )
    chosen = [batch.with_labels_of(choose) for batch in batches]
    if not any(batch.token_count for batch in chosen):
        raise DataError(
            "the held-out text has no position that the teacher says anything of",
            expected="at least one to validate on",
            hint="raise distill.validate_tokens or data.heldout_fraction, so that such text is among it",
        )
    return chosen


class Validator:
    """Measures the student on this rank's share of the held-out batches.

    Data-parallel rank r of D takes the batches r, r + D, ...; all ranks run as many forwards, which ZeRO-3 needs.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        source: TargetSource,
        device: torch.device,
        mesh: Mesh,
        keep: bool = True,
        samples: Samples | GivenPairs | None = None,
    ):
        """`keep`: whether the targets stay the same, and so are computed once. `samples`: what the student writes."""
        own = list(batches[mesh.data_rank :: mesh.data])
        rounds = -(-len(batches) // mesh.data)
        unlabelled = replace(batches[0], labels_BS=torch.full_like(batches[0].labels_BS, IGNORED_LABEL))
        own += [unlabelled] * (rounds - len(own))
        self._batches = [batch.with_label_slice(mesh.sequence_rank, mesh.sequence) for batch in own]
        self._mesh, self._source, self._device, self._keep, self._samples = mesh, source, device, keep, samples
        self._targets: list[Targets] = []

    @torch.no_grad()
    def run(self, engine: Any, before_each: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The objectives' means over the held-out labels, by column, and the number of "tokens". A collective call.

        `before_each` is called before each batch; what it raises ends the validation.
        """
        objectives: Objectives = engine.module.objectives
        written = self._samples.held_out_batches(before_each) if self._samples is not None else []
        engine.eval()
        values = self._sums(engine, self._batches, self._targets_of, before_each)
        means = {**objectives.means(values), "tokens": values[0]}
        if self._samples is not None:
            own = self._sums(engine, written, lambda _, batch: self._source.targets(batch), before_each)
            means |= {
                name: mean for name, mean in objectives.means(own).items() if name.startswith(objectives.own_prefix)
            }
        engine.train()
        return means

    def _sums(
        self,
        engine: Any,
        batches: Sequence[Batch],
        targets: Callable[[int, MicroBatch], Targets],
        before_each: Callable[[], None],
    ) -> list[float]:
        """[*counts, *figures] over all ranks."""
        objectives: Objectives = engine.module.objectives
        begin = len(objectives.counts)
        totals = torch.zeros(begin + objectives.width, dtype=torch.float64, device=self._device)
        for number, batch in enumerate(batches):
            before_each()
            enter("validation")
            micro_batch = to_device(batch, self._device)
            _, figures = engine(micro_batch, targets(number, micro_batch))
            totals[begin:] += figures
        totals[:begin] += put_on(self._device, objectives.counts_of(batches))
        values: list[float] = (all_reduce_sum(totals) / self._mesh.tensor).tolist()  # ranks of a layer have the same
        return values

    def _targets_of(self, number: int, batch: MicroBatch) -> Targets:
        if not self._keep:
            return self._source.targets(batch)
        if number == len(self._targets):
            self._targets.append(self._source.targets(batch))
        return self._targets[number]
