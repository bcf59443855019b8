"""Small targets and stores of them, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.config.target_store import CodecConfig
from kdscale.models.head import OutputHead
from kdscale.teacher.sampling import draw
from kdscale.teacher.store.codecs import make_codec
from kdscale.teacher.store.format import Block, StoreHeader
from kdscale.teacher.store.writer import ShardWriter
from kdscale.teacher.targets import FullTargets, Targets, TopKTargets
from kdscale_kernels import linear_topk_lse

VOCAB, HIDDEN, LENGTH = 300, 12, 20


def targets_of(settings: CodecConfig, rows: int, seed: int) -> Targets:
    """What a random teacher says, in the part that the codec asks for."""
    gen = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(rows, HIDDEN, generator=gen)
    head, asks = OutputHead(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))), settings.asks
    if asks.full:
        return Targets(rows=rows, full=FullTargets(hidden_NH, head))
    temperature = asks.temperature_at(None)
    if asks.sampled:
        uniforms_ND = torch.rand(rows, asks.sampled, generator=gen, dtype=torch.float64)
        sampled = draw(hidden_NH, head, uniforms_ND, temperature=temperature, vocab_size=VOCAB)
        return Targets(rows=rows, sampled=sampled)
    top = linear_topk_lse(hidden_NH, head.weight_VH, asks.top_k, temperature=temperature)
    return Targets(rows=rows, top_k=TopKTargets(top.ids_NK, top.logits_NK, top.lse_N, temperature, VOCAB))


@pytest.fixture
def make_header() -> Callable[..., StoreHeader]:
    """A header of 3 held-out and 11 training sequences in shards of 5."""

    def make(codec: CodecConfig, **changes: object) -> StoreHeader:
        fields = {
            "codec": codec.model_dump(mode="json"), "vocab_size": VOCAB, "hidden_size": HIDDEN, "seq_len": LENGTH,
            "heldout": 3, "train": 11, "shard_sequences": 5, "share": 1.0, "dtype": "float32",
            "packing": {"seed": 0, "validate_tokens": 60}, "made_from": {"teacher": {"a": "1"}, "tokens": "2"},
        }  # fmt: skip
        return StoreHeader(**{**fields, **changes})

    return make


def block_of(header: StoreHeader, place: int) -> Block:
    """The block of the sequence at a place: a few of its positions, with random targets."""
    kept_S = np.random.default_rng(place).random(LENGTH) < 0.8
    codec = make_codec(header.settings, header.vocab_size, header.hidden_size)
    return Block(kept_S, codec.encode(targets_of(header.settings, int(kept_S.sum()), place)), tokens=1000 + place)


def write_shards(folder: Path, header: StoreHeader, shards: range, blocks: Sequence[Block] = ()) -> None:
    """Write these shards, or what is missing of them; `blocks`: those of all places, if they are there already."""
    for shard in shards:
        writer = ShardWriter(folder, header, shard)
        for place in header.in_shard(shard):
            if place == writer.next:
                writer.append(blocks[place] if blocks else block_of(header, place))
        writer.finish()
