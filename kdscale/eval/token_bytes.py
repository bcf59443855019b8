"""How many UTF-8 bytes of text each token of a vocabulary stands for: what bits per byte divides by.

Only tokenizers whose tokens are pieces of the text itself have an exact answer: byte-level BPE (GPT-2, Llama 3, Qwen,
SmolLM) and SentencePiece with byte fallback (Llama 2, Mistral, Gemma, Phi-3).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")
_SPACE_MARK = "▁"


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """Bytes of each token id (int64 [ids]); special tokens are 0. None when the tokenizer has no exact answer."""
    kind = _kind(tokenizer)
    if kind is None:
        return None
    special = set(tokenizer.all_special_ids)
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for piece, token in vocabulary.items():
        if token in special or (token in added and added[token].special):
            continue
        if token in added:  # stored as plain text, not in the byte alphabet
            sizes[token] = len(piece.encode())
        elif kind == "byte_level":  # every character of a piece stands for one byte
            sizes[token] = len(piece)
        else:
            sizes[token] = 1 if _BYTE_PIECE.match(piece) else len(piece.replace(_SPACE_MARK, " ").encode())
    return sizes


def _kind(tokenizer: PreTrainedTokenizerBase) -> str | None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = {step.get("type") for step in (decoder, *decoder.get("decoders", ()))}
    if "ByteLevel" in steps:
        return "byte_level"
    return "byte_fallback" if "ByteFallback" in steps else None
