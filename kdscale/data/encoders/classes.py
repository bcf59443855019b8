"""Rows of which each document has one label: the class that it is of.

The label stands at the document's first position, where what it has learned of the whole text is read. It is the class
where that is known, and UNKNOWN_CLASS elsewhere, for who learns from the teacher alone. All other positions have none.
"""

from __future__ import annotations

import numpy as np

from kdscale.config.distill.masking import EncoderTask, MaskingConfig
from kdscale.data.encoders.masking import masked
from kdscale.data.packing import IGNORED_LABEL, PackedSequence
from kdscale.data.token_store import TokenSplit


def classified(sequence: PackedSequence, split: TokenSplit) -> PackedSequence:
    """The sequence with the classes of its documents as its labels."""
    labels_S = np.full_like(sequence.labels_S, IGNORED_LABEL)
    begins = np.flatnonzero((sequence.position_ids_S == 0) & (sequence.labels_S != IGNORED_LABEL))  # no padding
    labels_S[begins] = [split.class_of(document) for document in sequence.document_ids]
    return sequence._replace(labels_S=labels_S)


def for_task(
    sequence: PackedSequence, split: TokenSplit, task: EncoderTask | None, key: tuple[str, int], seed: int
) -> PackedSequence:
    """An encoder's sequence with the labels of its task; without one the labels are the tokens as they are."""
    if task is None or split.encoder is None:
        return sequence
    if isinstance(task, MaskingConfig):
        return masked(sequence, split.encoder, task, key, seed)
    return classified(sequence, split)
