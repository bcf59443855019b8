"""A model's head over the vocabulary, and the hidden states it reads: what losses and measurements use, not logits.

Some families scale their logits (Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`). Kernels know
no scale, so it is applied to what they read: `final_hidden` is scaled already, and the head's bias with it.

B sequences, S positions, C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kdscale.errors import CheckpointError
from kdscale.families import head_kind, load_family
from kdscale.models.attention import to_attention
from kdscale.models.documents import Documents


@dataclass(frozen=True)
class OutputHead:
    """Scaled hidden states → logits, as the model itself does it: `softcap(h Wᵀ + b)`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        """Rows of the weight."""
        return self.weight_VH.shape[0]

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """fp32 logits [C, V]; the product itself runs in the weight's dtype, as in the model."""
        return self.capped(torch.nn.functional.linear(hidden_CH, self.weight_VH, self.bias_V).float())

    def capped(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Logits after the soft cap, where there is one."""
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)

    def first_rows(self, count: int) -> OutputHead:
        """The head of the first `count` tokens alone."""
        bias_V = None if self.bias_V is None else self.bias_V[:count]
        return OutputHead(self.weight_VH[:count], bias_V, self.softcap)

    def detached(self) -> OutputHead:
        """A head that does not keep the rest of its model in memory (a tied weight is the embedding itself)."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return OutputHead(self.weight_VH.detach(), bias_V, self.softcap)


@dataclass(frozen=True)
class VocabShard:
    """Marks a head that has the vocabulary's rows from `first_id` on; the ranks of `group` have the other rows."""

    first_id: int
    group: Any


def head_of(model: Any) -> OutputHead:
    """The head of a transformers model; call it inside a module's forward, so that ZeRO-3 gathers the weight.

    One that tells classes has a row for each. That of an encoder without a head has no rows. Raises CheckpointError for
    another model without a head.
    """
    linear = model.get_output_embeddings()
    if linear is None and (encoder := encoder_parts(model)) is not None:
        if encoder.head is None:
            return OutputHead(model.get_input_embeddings().weight[:0].detach())
        linear = encoder.head
    if linear is None:
        raise CheckpointError(f"{type(model).__name__} has no output head", expected="a causal language model")
    bias_V, scale = getattr(linear, "bias", None), logit_scale(model)
    if bias_V is not None and scale != 1.0:
        bias_V = bias_V * scale
    return OutputHead(linear.weight, bias_V, getattr(model.config.get_text_config(), "final_logit_softcapping", None))


def logit_scale(model: Any) -> float:
    """What the model multiplies its logits by, before any soft cap."""
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(factor or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0) / float(divisor or 1.0)


def without_head(model: Any) -> Any:
    """The model below its head, also of one that has it under another name than its class says (Llama 4)."""
    base = model.base_model
    if base is not model or model.get_output_embeddings() is None:
        return base
    return next((part for part in model.children() if hasattr(part, "get_input_embeddings")), model)


def final_hidden(
    model: Any,
    input_ids_BS: torch.Tensor,
    position_ids_BS: torch.Tensor | None = None,
    documents: Documents | None = None,
    **more: Any,
) -> torch.Tensor:
    """The hidden states that enter the head, times the scale of its logits, [B, S, H]; of an encoder without a head
    those that leave it. Where classes are told, what the first position of a document has enters for the document.

    Packed documents do not see each other: a model with `attend_within_documents` is told where they are (`documents`,
    else found in the positions), and any other derives a mask from positions that restart, as there is neither an
    attention mask nor a cache. `more` goes on to every layer's attention function.
    """
    places_BS = position_ids_BS
    if places_BS is None:
        places_BS = torch.arange(input_ids_BS.shape[1]).expand_as(input_ids_BS)
    encoder = encoder_parts(model)
    if encoder is not None:
        position_ids_BS = places_BS.to(input_ids_BS.device) + encoder.first_position
    output = without_head(model)(
        input_ids=input_ids_BS, position_ids=position_ids_BS, attention_mask=None, **without_cache(encoder),
        **to_attention(model, places_BS, documents, input_ids_BS.device), **more,
    )  # fmt: skip
    hidden_BSH: torch.Tensor = output.last_hidden_state
    if encoder is not None:
        if encoder.pools_mean:
            hidden_BSH = means_of(hidden_BSH, documents or Documents.of(places_BS).to(hidden_BSH.device))
        return encoder.before_head(hidden_BSH)
    scale = logit_scale(model)
    return hidden_BSH if scale == 1.0 else hidden_BSH * scale


# -- encoders ---------------------------------------------------------------------------------------------------------

# In Sites.transform: functions that a head has in no module.
_FUNCTIONS = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "tanh": torch.tanh}


@dataclass(frozen=True)
class EncoderParts:
    """`first_position`: the number of a document's first position in the model's table of learned positions.

    `transform`: the modules and functions that hidden states go through before the head; none where there is no head.
    `head`: the map to classes, where there is one. `pools_mean`: whether the mean of a document's hidden states goes
    there, in place of its first one.
    """

    first_position: int
    transform: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    head: Any = None
    pools_mean: bool = False

    def of_rows(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """What the head is given of rows that are a document each: [B, H] where classes are told, else all of it."""
        if self.head is None:
            return hidden_BSH
        return hidden_BSH.mean(1) if self.pools_mean else hidden_BSH[:, 0]

    def before_head(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """What enters the head."""
        for step in self.transform:
            hidden_BSH = step(hidden_BSH)
        return hidden_BSH


_PARTS: WeakKeyDictionary[torch.nn.Module, EncoderParts | None] = WeakKeyDictionary()


def encoder_parts(model: Any) -> EncoderParts | None:
    """The parts of an encoder; None for a model that is none. They are looked up once for each model."""
    if model not in _PARTS:
        _PARTS[model] = _find_parts(model)
    return _PARTS[model]


def _find_parts(model: Any) -> EncoderParts | None:
    config = model.config.to_dict()
    if head_kind(config) == "causal_lm":
        return None
    family = load_family(config, type(model).__name__)
    steps = [_FUNCTIONS.get(path) or model.get_submodule(path) for path in family.sites.transform]
    first = family.first_position(config)
    if family.head != "classes" or family.data.class_head is None:
        return EncoderParts(first, steps)
    pooling = family.data.class_head.pooling
    return EncoderParts(
        first, steps, model.get_submodule(family.sites.head), pooling is not None and config.get(pooling) == "mean"
    )


def means_of(hidden_BSH: torch.Tensor, documents: Documents) -> torch.Tensor:
    """At each position the mean, made in fp32 at least, over the positions of its document: [B, S, H]."""
    hidden_TH = hidden_BSH.flatten(0, 1)
    sizes_D = documents.bounds_D1.diff().long()
    of_T = torch.repeat_interleave(
        torch.arange(len(sizes_D), device=sizes_D.device), sizes_D, output_size=len(hidden_TH)
    )
    wide = torch.promote_types(hidden_TH.dtype, torch.float32)
    sums_DH = torch.zeros(len(sizes_D), hidden_TH.shape[1], dtype=wide, device=hidden_TH.device)
    means_DH = sums_DH.index_add(0, of_T, hidden_TH.to(wide)) / sizes_D[:, None]
    return means_DH.index_select(0, of_T).to(hidden_BSH.dtype).view_as(hidden_BSH)


def without_cache(encoder: EncoderParts | None) -> dict[str, Any]:
    """The keyword argument that keeps a decoder from making a cache; an encoder makes none."""
    return {"use_cache": False} if encoder is None else {}


def pooler_parameters(model: Any) -> list[str]:
    """The parameters of an encoder's pooler, which stands beside its hidden states; none of any other model."""
    if encoder_parts(model) is None:
        return []
    config = model.config.to_dict()
    family = load_family(config, type(model).__name__)
    roles = ("pooler", "pooler_bias")
    return [spec.parameter for spec in family.outer_tensors(config).values() if spec.role in roles]
