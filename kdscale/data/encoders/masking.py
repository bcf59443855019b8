"""Tokens hidden from an encoder, which it is to tell (masked language modelling): BERT, arXiv 1810.04805, section 3.1.

Which tokens, and what stands in their place, is a pure function of (seed, split, number of the sequence, position): the
same for teacher and student and after a resume, and another one whenever a text comes again (dynamic masking, RoBERTa,
arXiv 1907.11692). Special tokens are never chosen. All other labels of the sequence become IGNORED_LABEL.

Dimension letters: S positions.
"""

from __future__ import annotations

import hashlib

import numpy as np

from kdscale.config.distill.masking import EncoderTask, MaskingConfig
from kdscale.data.mixing import GOLDEN, mix64
from kdscale.data.packing import IGNORED_LABEL, PackedSequence
from kdscale.data.token_store import EncoderTokens
from kdscale.errors import ConfigError

_CHOSEN, _KIND, _TOKEN = range(3)  # what a draw decides


def check_task(tokens: EncoderTokens | None, task: EncoderTask | None) -> None:
    """Raises ConfigError where tokens are to be hidden and there is no token that stands for them."""
    if isinstance(task, MaskingConfig) and (tokens is None or tokens.mask_id is None):
        raise ConfigError(
            "distill.masking", expected="an encoder whose tokenizer has a mask token",
            got="a decoder, which reads the text as it is" if tokens is None else "a tokenizer without one",
            hint="leave distill.masking out",
        )  # fmt: skip


def masked(
    sequence: PackedSequence, tokens: EncoderTokens, masking: MaskingConfig, key: tuple[str, int], seed: int
) -> PackedSequence:
    """The sequence with some of its tokens hidden; `key` is its split and number. At least one token is chosen."""
    assert tokens.mask_id is not None
    ids_S, labels_S = sequence.input_ids_S, sequence.labels_S
    can_S = (labels_S != IGNORED_LABEL) & ~np.isin(ids_S, np.asarray(tokens.special_ids, np.int64))
    draws_S = _uniform(key, seed, _CHOSEN, ids_S.size)
    chosen_S = can_S & (draws_S < masking.share)
    if can_S.any() and not chosen_S.any():
        chosen_S[np.where(can_S, draws_S, np.inf).argmin()] = True
    kind_S = _uniform(key, seed, _KIND, ids_S.size)
    random_S = (_uniform(key, seed, _TOKEN, ids_S.size) * tokens.vocab).astype(np.int64)
    hidden_S = np.where(kind_S < masking.random, random_S, tokens.mask_id)
    hidden_S = np.where(kind_S >= 1.0 - masking.same, ids_S, hidden_S)
    return sequence._replace(
        input_ids_S=np.where(chosen_S, hidden_S, ids_S), labels_S=np.where(chosen_S, labels_S, IGNORED_LABEL)
    )


def _uniform(key: tuple[str, int], seed: int, what: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), one a position, the same in every version."""
    text = f"{seed}/{key[0]}/{key[1]}/{what}".encode()
    start = np.uint64(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        return mix64(start + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN) / 2.0**64
