"""Attention within documents, by whichever library can do it here: the same results, in the order of `BACKENDS`.

    torch varlen   torch.nn.attention.varlen, FlashAttention kernels in torch itself
    flash-attn     the package flash_attn, which knows soft caps too
    flex           torch's flex_attention, compiled, with a mask of blocks: any precision up to fp32
    sdpa           torch's scaled_dot_product_attention, one call for neighbours of equal length: everywhere

None makes a mask of all positions or repeats keys and values to all heads, where torch's kernel can do without.

T positions one row after another, A query heads, G key-value heads, D head size, n documents of L positions each,
Q queries and K keys of a block.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdscale.models.documents import Documents

_MOST_QUERIES = 512  # whose scores are in memory at once, where a soft cap or sinks need them
_FEWEST_QUERIES = 128  # of a block, however narrow the window


@dataclass(frozen=True)
class AttentionKind:
    """What of an attention a backend has to know. `window`: keys that a query sees, itself included; None: all.

    One that is not `causal` (an encoder's) also sees what comes after it, and a window reaches as far on both sides.
    `sinks_A`: the score of one more key of each query head, whose value is 0 (gpt-oss); `sdpa` alone knows it.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    causal: bool = True
    sinks_A: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether shares are a softmax of the scores alone, which torch's kernels know."""
        return self.softcap is None and self.sinks_A is None

    def within(self, length: int) -> int | None:
        """The window, if it hides anything from the last of `length` positions."""
        return self.window if self.window is not None and self.window < length else None


Attend = Callable[[Tensor, Tensor, Tensor, Documents, AttentionKind], Tensor]


@dataclass(frozen=True)
class Backend:
    """`attend`: (query [T, A, D], key and value [T, G, D], documents, kind) → [T, A, D].

    `lacks`: (device, dtype, head size, kind) → why it cannot do that; empty when it can.
    """

    name: str
    lacks: Callable[[torch.device, torch.dtype, int, AttentionKind], str]
    attend: Attend


@dataclass(frozen=True)
class Choice:
    """The backend to use, and why the ones before it are not."""

    backend: Backend
    passed_over: tuple[str, ...]

    def in_words(self) -> str:
        """For the log."""
        why = f" ({'; '.join(self.passed_over)})" if self.passed_over else ""
        return f"attention within documents by {self.backend.name}{why}"


@cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None, dropout: bool) -> Choice:
    """The first backend that can do it, windows or not; on a GPU it must also have run once on a few positions."""
    passed_over = []
    kind = AttentionKind(head_dim**-0.5, window=20, softcap=softcap, dropout=0.1 if dropout else 0.0)
    for backend in BACKENDS:
        reason = backend.lacks(device, dtype, head_dim, kind) or _trial(backend, device, dtype, head_dim, kind)
        if not reason:
            break
        if device.type == "cuda":  # on a CPU there is nothing to choose from
            passed_over.append(f"not {backend.name}: {reason}")
    return Choice(backend, tuple(passed_over))


def _trial(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, kind: AttentionKind) -> str:
    """Why a forward and backward of two documents fails on this GPU; empty when it does not.

    In a thread of its own, which knows nothing of a checkpoint or an inference mode that the first layer may be in.
    """
    if device.type != "cuda" or backend is BACKENDS[-1]:
        return ""

    def attempt() -> None:
        documents = Documents.of(torch.cat([torch.arange(100), torch.arange(28)])[None]).to(device)
        options: Any = {"dtype": dtype, "device": device, "requires_grad": True}
        query, key, value = (torch.zeros(128, heads, head_dim, **options) for heads in (2, 1, 1))
        backend.attend(query, key, value, documents, kind).sum().backward()
        torch.cuda.synchronize(device)

    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(attempt).exception()
    return "" if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# -- FlashAttention kernels --------------------------------------------------------------------------------------------


def _lacks_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return "needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs 16 bits"
    if head_dim > 256 or head_dim % 8:
        return f"has no heads of {head_dim}"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an Ampere GPU or newer"
    return ""


def _lacks_torch_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, kind: AttentionKind) -> str:
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has none"
    if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return f"that of torch {torch.__version__} has no windows or shared heads"
    if kind.softcap is not None or kind.dropout:
        return "has no soft cap and no dropout"
    return _lacks_flash(device, dtype, head_dim)


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, kind: AttentionKind) -> Tensor:
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    bounds, longest = documents.bounds_D1, documents.longest
    out: Tensor = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=kind.scale, window_size=_flash_window(kind, longest),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out


def _flash_window(kind: AttentionKind, longest: int) -> tuple[int, int]:
    """(keys before a query, keys after it); -1: all of them."""
    window = kind.within(longest)
    before = -1 if window is None else window - 1
    return before, (0 if kind.causal else before)


def _lacks_flash_attn(device: torch.device, dtype: torch.dtype, head_dim: int, kind: AttentionKind) -> str:
    try:
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return "is not installed"
    if not {"softcap", "window_size"} <= set(inspect.signature(function).parameters):
        return "is too old: it has no soft cap or no windows"
    if kind.softcap is not None and kind.dropout:
        return "has no soft cap with dropout"
    return _lacks_flash(device, dtype, head_dim)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, documents: Documents, kind: AttentionKind) -> Tensor:
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    bounds, longest = documents.bounds_D1, documents.longest
    out: Tensor = function(
        query, key, value, bounds, bounds, longest, longest, dropout_p=kind.dropout, softmax_scale=kind.scale,
        causal=kind.causal, window_size=_flash_window(kind, longest), softcap=kind.softcap or 0.0,
    )  # fmt: skip
    return out


# -- flex_attention ----------------------------------------------------------------------------------------------------


def _lacks_flex(device: torch.device, dtype: torch.dtype, head_dim: int, kind: AttentionKind) -> str:
    if device.type != "cuda":
        return "needs a GPU for its backward"
    if dtype == torch.float64:
        return "has no float64"
    if kind.dropout:
        return "has no dropout"
    return ""


def _flex(query: Tensor, key: Tensor, value: Tensor, documents: Documents, kind: AttentionKind) -> Tensor:
    window = kind.within(documents.longest)
    mask = documents.once(("flex", window, kind.causal), lambda: block_mask(documents, window, kind.causal))
    cap = None if kind.softcap is None else _score_cap(kind.softcap)
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    shared = query.shape[1] != key.shape[1]
    out: Tensor = _compiled_flex()(*heads, score_mod=cap, block_mask=mask, scale=kind.scale, enable_gqa=shared)
    return out.squeeze(0).transpose(0, 1)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _score_cap(softcap: float) -> Any:
    def cap(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def block_mask(documents: Documents, window: int | None, causal: bool = True) -> Any:
    """flex_attention's mask over blocks of T × T positions; compiled on a GPU, where it is never more than blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    device, total = documents.bounds_D1.device, sum(documents.lengths)
    index_T = torch.arange(total, device=device, dtype=torch.int32)
    document_T = torch.searchsorted(documents.bounds_D1, index_T, right=True)

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document_T[query] == document_T[key]
        if window is not None:
            same = same & ((query - key).abs() < window)
        return same & (key <= query) if causal else same

    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, None, None, total, total, device=device)


# -- scaled_dot_product_attention --------------------------------------------------------------------------------------


def _sdpa(query: Tensor, key: Tensor, value: Tensor, documents: Documents, kind: AttentionKind) -> Tensor:
    """Splits and joins T once each: the gradient of a slice would be T long, for every document."""
    runs = list(documents.runs())
    sizes = [count * length for count, length in runs]
    out = []
    for run, *part in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        run_query, run_key, run_value = (x.unflatten(0, run).transpose(1, 2) for x in part)
        out.append(_of_run(run_query, run_key, run_value, documents, kind).transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _of_run(query: Tensor, key: Tensor, value: Tensor, documents: Documents, kind: AttentionKind) -> Tensor:
    """[n, A, L, D] from [n, A, L, D] and [n, G, L, D]: whole documents, in blocks of queries where a mask is needed."""
    length = query.shape[2]
    window = kind.within(length)
    if window is None and kind.plain:
        return _torch_sdpa(query, key, value, None, kind)
    step = _MOST_QUERIES if window is None else max(_FEWEST_QUERIES, min(window, _MOST_QUERIES))
    out = []
    for first in range(0, length, step):
        last = min(first + step, length)
        oldest = 0 if window is None else max(0, first - window + 1)
        newest = last if kind.causal else length if window is None else min(length, last + window - 1)
        block = query[:, :, first:last], key[:, :, oldest:newest], value[:, :, oldest:newest]
        places = last - first, newest - oldest, first - oldest, window, kind.causal
        seen_QK = documents.once(("seen", *places), lambda: _seen(*places, query.device))  # noqa: B023
        out.append((_torch_sdpa if kind.plain else _scored)(*block, seen_QK, kind))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _seen(queries: int, keys: int, first: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Which keys a block's queries see: its first query is its key number `first`."""
    behind_QK = torch.arange(first, first + queries, device=device)[:, None] - torch.arange(keys, device=device)
    seen_QK = behind_QK >= 0 if causal else torch.ones_like(behind_QK, dtype=torch.bool)
    return seen_QK if window is None else seen_QK & (behind_QK.abs() < window)


def _torch_sdpa(query: Tensor, key: Tensor, value: Tensor, seen_QK: Tensor | None, kind: AttentionKind) -> Tensor:
    """Torch's attention; `seen_QK` None: each query sees the keys up to its own, or all of them."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and query.device.type != "cpu" and query.element_size() > 2:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))  # fp32 kernels of a GPU share no heads
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen_QK, dropout_p=kind.dropout, is_causal=kind.causal and seen_QK is None,
        scale=kind.scale, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _scored(query: Tensor, key: Tensor, value: Tensor, seen_QK: Tensor, kind: AttentionKind) -> Tensor:
    """Soft-capped scores and sinks, which torch's kernels do not know; shares in fp32 at least, as in transformers."""
    documents, heads, queries, size = query.shape
    groups = key.shape[1]
    rows = query.reshape(documents, groups, heads // groups * queries, size)  # heads that share keys, under each other
    scores = (rows @ key.transpose(2, 3)).unflatten(2, (heads // groups, queries)) * kind.scale
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    scores = scores.masked_fill(~seen_QK, -math.inf)
    if kind.sinks_A is not None:
        sinks = kind.sinks_A.to(scores.dtype).view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    shares = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    shares = shares[..., : key.shape[2]]
    shares = F.dropout(shares, kind.dropout)
    return (shares.flatten(2, 3) @ value).reshape(documents, heads, queries, size)


BACKENDS = (
    Backend("torch varlen", _lacks_torch_varlen, _torch_varlen),
    Backend("flash-attn", _lacks_flash_attn, _flash_attn),
    Backend("flex", _lacks_flex, _flex),
    Backend("sdpa", lambda *_: "", _sdpa),
)
KNOWS_SINKS = BACKENDS[-1]
