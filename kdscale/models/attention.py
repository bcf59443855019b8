"""The attention that kdscale gives to transformers' models: each document by itself, without a mask.

transformers asks its registry for the attention function that a config names, and makes a mask only for names that it
knows masks for. Ours is not among those, so none is made. A model takes the `documents` of a forward among its keyword
arguments and hands them on to every layer's attention function.

B sequences, S positions, T = B·S, A query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor

from kdscale.errors import CheckpointError
from kdscale.models.attention_backends import KNOWS_SINKS, AttentionKind, Choice, choose
from kdscale.models.documents import Documents, mix_within_documents, recurrent_mixers

_NAME = "kdscale_documents"  # in transformers' registry of attention functions


class Exchange(Protocol):
    """Ranks that share sequences: positions of all heads to all positions of some heads, and back."""

    def heads(self, x_BAPD: Tensor, /) -> Tensor: ...

    def positions(self, x_BASD: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class AttentionRows:
    """What the attention of one layer reads, of all T positions: queries [T, A, D], keys and values [T, G, D]."""

    query_TAD: Tensor
    key_TGD: Tensor
    value_TGD: Tensor
    kind: AttentionKind


def attend_within_documents(model: Any) -> bool:
    """Give `model` this attention for all forwards from now on, if it takes its attention from the registry.

    Its forwards then need `documents`, and it cannot decode with a cache. A model with an attention of its own keeps it
    (False), with the mask that transformers makes of its position ids. Recurrent mixers (documents.py) are kept within
    documents with the attention.
    """
    from transformers import AttentionInterface

    if not _asks_the_registry(model):
        return False
    mix_within_documents(model)
    if _NAME not in AttentionInterface():
        AttentionInterface.register(_NAME, attend)
    model.config._attn_implementation = _NAME
    model.config.get_text_config()._attn_implementation = _NAME
    return True


def _asks_the_registry(model: Any) -> bool:
    """Whether the attention comes from the registry and the layers hand `documents` on to it.

    Models say the first; those with recurrent mixers do not all say it, and are known by their module, which then
    imports the registry.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not getattr(model, "_supports_attention_backend", False) and not (
        recurrent_mixers(model) and hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    ):
        return False
    forwards = {
        inspect.unwrap(type(module).forward).__code__
        for module in model.get_decoder().modules()
        if isinstance(module, GradientCheckpointingLayer)
    }
    return not forwards or any(_hands_keywords_on(forward) for forward in forwards)


@cache
def _hands_keywords_on(code: CodeType) -> bool:
    """Whether a layer's forward uses the keyword arguments that it has no names for; Nemotron's drops them."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    before = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    name = code.co_varnames[before]
    loads = (item.argval for item in dis.get_instructions(code) if item.opname.startswith("LOAD"))
    return any(value == name or (isinstance(value, tuple) and name in value) for value in loads)


def attend_outside_graphs() -> None:
    """Let torch.compile leave this attention out of what it compiles: lengths on the host would become constants."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, torch.compiler.disable(attend, reason="documents have lengths on the host"))


@contextmanager
def documents_apart(model: Any) -> Iterator[None]:
    """`attend_within_documents` for the forwards of the block alone, which need no gradients."""
    configs = [model.config, model.config.get_text_config()]
    before = [config._attn_implementation for config in configs]
    attend_within_documents(model)
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def within_documents(model: Any) -> bool:
    """Whether the model has this attention now."""
    return bool(model.config.get_text_config()._attn_implementation == _NAME)


def to_attention(
    model: Any, position_ids_BS: Tensor, documents: Documents | None, device: torch.device
) -> dict[str, Any]:
    """The keyword arguments of a forward on `device`: none for a model with an attention of its own.

    Without `documents` they are found in the positions, which waits for a device that has those.
    """
    if not within_documents(model):
        return {}
    return {"documents": Documents.of(position_ids_BS).to(device) if documents is None else documents}


def attention_dropout(model: Any) -> float:
    """The share of attention that the model drops in training."""
    config = model.config.get_text_config()
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # of the last: BERT and its like
    return float(next((value for name in names if (value := getattr(config, name, None))), 0.0))


def choice_for(model: Any, device: torch.device) -> Choice | None:
    """Which backend the model's layers will use on `device`; None for a model with an attention of its own."""
    if not within_documents(model):
        return None
    config = model.config.get_text_config()
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return Choice(KNOWS_SINKS, ("others: they know no attention sinks",))
    several = getattr(config, "is_heterogeneous", False)  # Gemma 4's heads are of two sizes
    layers = config.per_layer_config if several else [config]
    head_dim = max(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in layers)
    dropout = attention_dropout(model) if model.training else 0.0
    return choose(device, model.dtype, head_dim, getattr(config, "attn_logit_softcapping", None), bool(dropout))


def attend(
    module: torch.nn.Module,
    query_BASD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    ulysses: Exchange | None = None,
    record: Callable[[torch.nn.Module, AttentionRows], None] | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [B, S, A, D], each query within its document and `sliding_window`.

    In a layer that is not causal (an encoder's) a query also sees what comes after it in its document.

    `s_aux`: attention sinks, the score of one more key of each query head. With `ulysses` the arguments are this rank's
    positions, and `documents` are of whole sequences. `record` is told what the layer reads.
    """
    _check(module, attention_mask, documents, other)
    assert documents is not None
    if (chunk := _chunk(module)) is not None:
        documents = documents.in_chunks(chunk)
    causal = other.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    if ulysses is not None:
        query_BASD, key_BGSD, value_BGSD = (ulysses.heads(x) for x in (query_BASD, key_BGSD, value_BGSD))
        if s_aux is not None and len(s_aux) != query_BASD.shape[1]:
            raise CheckpointError(
                f"{type(module).__name__}: attention sinks",
                expected="all heads on every rank",
                got="sequences shared by ranks",
                hint="set distill.sequence_parallel=1",
            )
    batch, _, length, head_dim = query_BASD.shape
    _check_scale(module, batch, length, documents, ulysses)
    kind = AttentionKind(
        head_dim**-0.5 if scaling is None else scaling, sliding_window, softcap, dropout, causal, s_aux
    )
    chosen = choose(query_BASD.device, query_BASD.dtype, head_dim, softcap, dropout > 0)
    backend = chosen.backend if s_aux is None else KNOWS_SINKS
    rows = AttentionRows(_rows(query_BASD), _rows(key_BGSD), _rows(value_BGSD), kind)
    if record is not None and chunk is not None:
        raise CheckpointError(
            f"{type(module).__name__}: attention in chunks of {chunk} positions", expected="whole documents",
            got="a layer whose attention is to be matched", hint="match other layers",
        )  # fmt: skip
    if record is not None:
        record(module, rows)
    out_TAD = backend.attend(rows.query_TAD, rows.key_TGD, rows.value_TGD, documents, kind)
    out_BSAD = out_TAD.unflatten(0, (batch, length))
    return (out_BSAD if ulysses is None else ulysses.positions(out_BSAD.transpose(1, 2))).contiguous(), None


def _chunk(module: Any) -> int | None:
    """Positions that a layer's attention goes over at a time, from the beginning of a document; None: all of them."""
    config = getattr(module, "config", None)
    size: int | None = getattr(config, "attention_chunk_size", None)
    types = (getattr(config, "layer_types", None) or ()) if size else ()
    return size if types and types[module.layer_idx] == "chunked_attention" else None


def _check_scale(module: Any, batch: int, length: int, documents: Documents, ulysses: Exchange | None) -> None:
    """Refuse rows in which queries were scaled by a place that is not theirs (layers of Llama 4 without positions).

    The scale changes every `floor_scale` positions, counted from the beginning of the row.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return
    if length > module.floor_scale and (len(documents.lengths) > batch or ulysses is not None):
        raise CheckpointError(
            f"{type(module).__name__}: floor_scale",
            expected=f"rows of at most {module.floor_scale} positions, or of one document on one rank",
            got=f"rows of {length} positions",
            hint="lower distill.seq_len and importance.seq_len",
        )


def _rows(x_BASD: Tensor) -> Tensor:
    """[T, A, D]: no copy of what a projection made for one row."""
    return x_BASD.transpose(1, 2).flatten(0, 1)


def _check(module: Any, mask: Tensor | None, documents: Documents | None, other: dict[str, Any]) -> None:
    """Refuse what this attention would silently leave out. Raises CheckpointError."""
    wrong = {
        "a mask of its own": mask is not None,
        "no documents": documents is None,
        "a bias on positions": other.get("position_bias") is not None,
    }
    if any(wrong.values()):
        raise CheckpointError(
            f"{type(module).__name__}: this attention cannot be kept within documents",
            expected="attention with at most a window and a soft cap",
            got=", ".join(name for name, found in wrong.items() if found),
        )
