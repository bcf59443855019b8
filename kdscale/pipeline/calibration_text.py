"""Whether the calibration text stands for the text that is distilled on, and for that which is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kdscale.config.root import Config
from kdscale.data.batches import Batch
from kdscale.data.heldout import eval_batches
from kdscale.data.packing import IGNORED_LABEL
from kdscale.data.token_store import TokenStore
from kdscale.pipeline.calibration import calibration_batches, training_loader
from kdscale.pipeline.text_kinds import LIMIT_NATS, missing_sources, unlikeness

_COMPARED = 64  # sequences of each text


def calibration_notices(config: Config, data: Path) -> list[str]:
    """What to know where the calibration text does not stand for the text that is distilled on or measured on.

    Calibration text is training text, so it differs from it in the parts that sources have: a small sample may miss
    some. Held-out text of sources of its own may be anything, so its words are compared.
    """
    store = TokenStore.open(data)
    calibrating = calibration_batches(config, data)
    out = [*_lacking(config, store, data, calibrating)]
    if config.data.heldout_sources:
        out += _unlike_heldout(store, calibrating, config.importance.seq_len)
    return out


def _lacking(config: Config, store: TokenStore, data: Path, calibrating: Sequence[Batch]) -> list[str]:
    tags = store.split("train").tags
    loader = training_loader(config, config.importance, data)
    reads = min(max(config.distill.tokens // config.importance.seq_len, 1), loader.epoch_sequences)
    training = [loader.stack([number]) for number in loader.spread(range(reads), min(reads, _COMPARED))]
    missing = missing_sources(_by_tag(calibrating, tags), _by_tag(training, tags))
    if not missing:
        return []
    named = ", ".join(f"{name} ({share:.0%} of it, {seen:.1%} of the other)" for name, (share, seen) in missing.items())
    return [
        f"The text that is distilled on has what the calibration text lacks: {named}. Pruning fits what it sees: give "
        "importance.calibration_tokens more, so that every source has a part."
    ]


def _unlike_heldout(store: TokenStore, calibrating: Sequence[Batch], seq_len: int) -> list[str]:
    heldout = store.split("heldout")
    if heldout.encoder is None:
        numbers = np.linspace(0, heldout.documents - 1, min(heldout.documents, _COMPARED)).astype(int).tolist()
        measured = [heldout.document_tokens(number)[:seq_len] for number in numbers]
        rows = [row.numpy() for batch in calibrating for row in batch.input_ids_BS]
    else:  # short documents: rows of them on both sides, each with its ends, and padding left out
        measured = _whole_documents(eval_batches(heldout, seq_len, 1, _COMPARED * seq_len))
        rows = _whole_documents(calibrating)
    words = unlikeness(rows[:: -(-len(rows) // _COMPARED)], measured)
    if not words.differ:
        return []
    return [
        "The held-out text (data.heldout_sources) is of another kind than the calibration text: their words are "
        f"{words.beyond_chance:.3f} nats farther apart than chance, where {LIMIT_NATS} is the limit. Pruning fits what "
        "it sees, and costs more on other text: put some of that kind into data.sources."
    ]


def _whole_documents(batches: Sequence[Batch]) -> list[np.ndarray]:
    """The tokens of each row of an encoder's text, without padding."""
    ids, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids_BS", "labels_BS"))
    return [row[of_row != IGNORED_LABEL].numpy() for row, of_row in zip(ids, labels, strict=True)]


def _by_tag(batches: Sequence[Batch], tags: Sequence[str]) -> dict[str, float]:
    counts = sum(np.bincount(batch.tags_BS.numpy().ravel(), minlength=len(tags)) for batch in batches)
    return dict(zip(tags, np.asarray(counts, float).tolist(), strict=True))
