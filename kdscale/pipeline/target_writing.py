"""A rank's share of a store of targets: the source of targets is asked, and its answers are encoded and written.

N rows, S positions of a sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kdscale.config.target_store import TargetsConfig
from kdscale.data.batches import Batch, PackedLoader, joined
from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.distill.parallel.dtypes import agreed_dtype
from kdscale.distill.step import to_device
from kdscale.errors import TrainingError
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.pipeline.stage import StageContext
from kdscale.teacher.source import MicroBatch, SourceRequest, TargetSource, open_source
from kdscale.teacher.store.codecs import Codec, make_codec
from kdscale.teacher.store.format import HELDOUT, Block, ShardFiles, StoreHeader, read_header, tokens_checksum
from kdscale.teacher.store.positions import EntropyChoice
from kdscale.teacher.store.writer import ShardWriter


def write_own_shards(
    context: StageContext, settings: TargetsConfig, folder: Path, rank: int, device: torch.device
) -> None:
    """Write every `context.ranks`-th shard of the store in `folder`, from this rank's first on, unless it is there."""
    config, header = context.config, read_header(folder)
    dtype = agreed_dtype(config.distill.dtype, device)
    distill = config.distill.model_copy(update={"teacher_placement": settings.teacher_placement, "teachers": ()})
    request = SourceRequest(
        config.model_copy(update={"distill": distill}), settings.codec.asks, context.model_to_learn_from,
        context.run.path, dtype, device, SequenceSlice(), load_split=None,
        student_dir=context.run.pruned, tags=(),
    )  # fmt: skip
    source = open_source(request).start(header.vocab_size)
    choose: Callable[[MicroBatch], MicroBatch] | None = None
    if settings.positions == "entropy":
        trust = config.teacher.trust_remote_code
        choose = EntropyChoice(context.run.pruned, settings.share, dtype=dtype, device=device, trust=trust)
    writing = TargetWriting(
        folder, header, _Sequences(context, header), source, device, micro_batch=settings.micro_batch, choose=choose
    )
    shards = range(rank, header.shards, context.ranks)
    tokens = {shard: len(header.in_shard(shard)) * header.seq_len for shard in shards}
    done = [shard for shard in shards if ShardFiles(folder, shard).is_finished]
    with context.reporter.bar(
        "Storing targets", sum(tokens.values()), "tok", sum(tokens[shard] for shard in done)
    ) as bar:
        for shard in shards:
            if shard not in done:
                for sequences in writing.shard(shard):
                    bar.advance(sequences * header.seq_len)
    source.close()


@dataclass(frozen=True)
class TargetWriting:
    """Writes shards: `batch_of` gives the sequences at places of the store, `choose` the rows that are kept."""

    folder: Path
    header: StoreHeader
    batch_of: Callable[[range], Batch]
    source: TargetSource
    device: torch.device
    micro_batch: int = 1
    choose: Callable[[MicroBatch], MicroBatch] | None = None

    def shard(self, number: int) -> Iterator[int]:
        """Write what is missing of a shard; yields, after each forward, how many sequences more are there.

        Forwards hold the same sequences whether or not a killed writer left some of them, so that the bytes are the
        same. Raises TrainingError for targets that are not finite.
        """
        places, writer = self.header.in_shard(number), ShardWriter(self.folder, self.header, number)
        for begin in range(places.start, places.stop, self.micro_batch):
            group = range(begin, min(begin + self.micro_batch, places.stop))
            if group.stop > writer.next:
                for place, block in zip(group, self._blocks(self.batch_of(group)), strict=True):
                    if place == writer.next:
                        writer.append(block)
            yield len(group)
        writer.finish()

    @cached_property
    def _codec(self) -> Codec:
        return make_codec(self.header.settings, self.header.vocab_size, self.header.hidden_size)

    def _blocks(self, batch: Batch) -> Iterator[Block]:
        """One block for each sequence of a batch."""
        rows = to_device(batch, self.device)
        rows = rows if self.choose is None else self.choose(rows)
        targets = self.source.targets(rows)
        if not bool(torch.isfinite(targets.probe())):
            listed = ", ".join(f"{split} {number}" for split, number in batch.sequences)
            raise TrainingError(
                "the teacher's targets", expected="finite numbers", got=f"NaN or Inf in the sequences {listed}",
                hint="a bfloat16 teacher may need distill.dtype: float32",
            )  # fmt: skip
        count, length = batch.input_ids_BS.shape
        rows_N = rows.rows_N.cpu().numpy()
        bounds = np.searchsorted(rows_N, np.arange(count + 1) * length)
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            kept_S = np.zeros(length, np.bool_)
            kept_S[rows_N[begin:end] - number * length] = True
            tokens = tokens_checksum(batch.input_ids_BS[number].numpy(), batch.position_ids_BS[number].numpy())
            yield Block(kept_S, self._codec.encode(targets.part(slice(begin, end))), tokens)


class _Sequences:
    """The sequences of a store by their places: the held-out ones, then those of the training in its order."""

    def __init__(self, context: StageContext, header: StoreHeader):
        distill, store = context.config.distill, TokenStore.open(context.run.data)
        self._header, self._heldout = header, heldout_sequences(context)
        self._loader = PackedLoader(store.split("train"), distill.seq_len, 1, 1, context.config.seed)

    def __call__(self, places: range) -> Batch:
        """One batch of the sequences at these places."""
        keys = map(self._header.key, places)
        return joined([self._heldout[n] if split == HELDOUT else self._loader.stack([n]) for split, n in keys])


def heldout_sequences(context: StageContext) -> list[Batch]:
    """The held-out sequences of a validation, one a batch."""
    distill, split = context.config.distill, TokenStore.open(context.run.data).split("heldout")
    return eval_batches(split, distill.seq_len, 1, distill.validate_tokens)
