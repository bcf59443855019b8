"""What GGUF calls a tensor of a family, and the order of rotary rows in it: for the reader and for the writer.

Source: the names in ggml-org/llama.cpp's `gguf` package (get_tensor_name_map gives the same, a test says so) and the
permutation of its converter for models whose rotary embedding turns neighbours.

Dimension letters: Q rows of a projection, H hidden.
"""

from __future__ import annotations

import numpy as np

_BIAS = "_bias"
STEM_OF: dict[str, str] = {
    "embed": "token_embd",
    "position_embed": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "qkv": "attn_qkv",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn_post_norm": "post_ffw_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "gate_up": "ffn_up",  # one tensor, the gate's rows first
    "down": "ffn_down",
    "router": "ffn_gate_inp",
}
_EXPERTS = "_exps"  # of a tensor that holds one role of all experts of a layer


def gguf_name(role: str, layer: int | None, of_experts: bool = False) -> str | None:
    """The name of the tensor of a role (kdscale.families.schema), None for a role that GGUF files do not have.

    `of_experts`: the role is one of each expert's, and the tensor holds that of all.
    """
    stem, suffix = STEM_OF.get(role.removesuffix(_BIAS)), "bias" if role.endswith(_BIAS) else "weight"
    if stem is None:
        return None
    stem += _EXPERTS if of_experts else ""
    return f"{stem}.{suffix}" if layer is None else f"blk.{layer}.{stem}.{suffix}"


def halves_from_pairs(weight_QH: np.ndarray, heads: int) -> np.ndarray:
    """Rotary rows from ggml's order (x0 y0 x1 y1 ...) to transformers' (x0 x1 ... y0 y1 ...), head by head.

    A bias has no second dimension.
    """
    rows = weight_QH.shape[0]
    return weight_QH.reshape(heads, rows // heads // 2, 2, -1).transpose(0, 2, 1, 3).reshape(weight_QH.shape)


def pairs_from_halves(weight_QH: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves_from_pairs`."""
    rows = weight_QH.shape[0]
    return weight_QH.reshape(heads, 2, rows // heads // 2, -1).transpose(0, 2, 1, 3).reshape(weight_QH.shape)
