"""What a GGUF file says of a model's sizes, rotary embedding and windows; and what llama.cpp cannot compute of it.

Written against ggml/docs/gguf.md and llama.cpp's readers of the architectures that the family files name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdscale.families import Dims, Family
from kdscale.families.schema import Gguf
from kdscale.families.windows import attention_windows
from kdscale.models.loading import explain_library_errors

Value = int | float | str | bool


@dataclass
class Description:
    """A model in GGUF's terms.

    `values`: metadata, keys without the architecture. `vectors`: tensors that follow from the config. `query_factor`:
    what queries must be multiplied by, so that llama.cpp's attention has the model's scale. `problems`: each a reason
    why llama.cpp would compute another model. `notes` are for the user.
    """

    values: dict[str, Value] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    query_factor: float = 1.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def describe(folder: Path, family: Family, raw: dict[str, Any]) -> Description:
    """Describe the model in `folder`, whose config.json is `raw`. Raises CheckpointError where transformers refuses it.

    Fields that config.json lacks have the defaults of transformers' own config class.
    """
    from transformers import AutoConfig

    with explain_library_errors(folder, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    table, dims, out = family.data.gguf, family.dims(raw), Description()
    assert table is not None
    out.values |= {
        "vocab_size": dims.vocab,
        "context_length": int(config.max_position_embeddings),
        "embedding_length": dims.hidden,
        "block_count": dims.layers,
        "feed_forward_length": dims.ffn,
        "attention.head_count": dims.heads,
        "attention.head_count_kv": dims.kv_heads,
        "attention.key_length": dims.head_dim,
        "attention.value_length": dims.head_dim,
    }
    if dims.experts:
        out.values |= {"expert_count": dims.experts, "expert_used_count": family.experts_per_token}
        out.values["expert_feed_forward_length"] = dims.ffn
    for key, name in table.numbers.items():
        if (number := getattr(config, name, None)) is not None:
            out.values[key] = float(number)
    _check(out, table, family, dims, config, raw)
    if family.sites.rotary:
        _rotary(out, table, dims, config)
    _windows(out, table, family, raw)
    if table.query_scale is not None:
        at, wanted = table.query_scale.hidden_over_heads_at, float(getattr(config, table.query_scale.field))
        taken = dims.hidden // dims.heads if dims.layers == at else dims.head_dim
        out.query_factor = math.sqrt(taken / wanted)
    return out


def _check(out: Description, table: Gguf, family: Family, dims: Dims, config: Any, raw: dict[str, Any]) -> None:
    """Note as problems what no metadata can tell llama.cpp."""
    for rule in table.requires:
        if (value := getattr(config, rule.field, None)) not in rule.one_of:
            wanted = " or ".join(map(json.dumps, rule.one_of))
            out.problems.append(f"{rule.field} is {json.dumps(value)} in place of {wanted}: {rule.why}")
    if table.square_attention and dims.heads * dims.head_dim != dims.hidden:
        got = f"{dims.heads} heads of {dims.head_dim} and hidden size {dims.hidden}"
        out.problems.append(f"{got}: llama.cpp wants heads * head_dim = hidden in this family; prune both together")
    roles = {spec.role for spec in family.tensors(raw).values()}
    if unread := sorted(roles & set(table.unread)):
        out.problems.append(f"llama.cpp has no place for {', '.join(unread)} in this family")
    if table.no_rope_every is not None:
        wanted_layers = [int((layer + 1) % table.no_rope_every != 0) for layer in range(dims.layers)]
        if list(config.no_rope_layers)[: dims.layers] != wanted_layers:
            every = f"every {table.no_rope_every}th layer"
            out.problems.append(
                f"no_rope_layers: llama.cpp takes {every} without rotary embedding, this model does not"
            )


def _rotary(out: Description, table: Gguf, dims: Dims, config: Any) -> None:
    given = config.rope_parameters
    sliding = given.get("sliding_attention") if "full_attention" in given else None
    rope = given.get("full_attention", given)
    rotated = int(dims.head_dim * (rope.get("partial_rotary_factor") or 1.0))
    if rotated != dims.head_dim and not table.partial_rotary:
        out.problems.append("partial_rotary_factor: llama.cpp rotates whole heads in this family")
    out.values |= {"rope.dimension_count": rotated, "rope.freq_base": float(rope["rope_theta"])}
    if sliding is not None:
        out.values["rope.freq_base_swa"] = float(sliding["rope_theta"])
        if sliding["rope_type"] != "default":
            out.problems.append(f"rope of sliding layers: llama.cpp does not know {sliding['rope_type']!r} there")
    kind = rope["rope_type"]
    if kind == "dynamic":  # as default, up to the length the model was trained for
        _limit_context(out, int(rope.get("original_max_position_embeddings") or config.max_position_embeddings), kind)
    elif kind != "default" and kind not in table.rope_scaling:
        known = " and ".join(("default", *table.rope_scaling))
        out.problems.append(f"rope_type {kind!r}: llama.cpp reads {known} in this family")
    elif kind != "default":
        _scaled_rotary(out, kind, rope, config)


def _scaled_rotary(out: Description, kind: str, rope: dict[str, Any], config: Any) -> None:
    """The metadata and vectors of a rope type, whose frequencies and attention factor are asked of transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind == "linear":
        out.values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        return
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    if kind == "llama3":
        rotated = 2 * len(frequencies)
        plain = float(rope["rope_theta"]) ** (-np.arange(0, rotated, 2) / rotated)
        out.vectors["rope_freqs.weight"] = (plain / frequencies.double().numpy()).astype(np.float32)
        return
    out.values |= {
        "rope.scaling.type": kind,
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    }
    if kind == "longrope":
        out.values["rope.scaling.attn_factor"] = float(attention_factor)
        for which in ("long", "short"):
            out.vectors[f"rope_factors_{which}.weight"] = np.asarray(rope[f"{which}_factor"], dtype=np.float32)
        return
    factor = float(rope["factor"])
    out.values |= {
        "rope.scaling.factor": factor,
        # llama.cpp multiplies by what YaRN suggests
        "rope.scaling.attn_factor": float(attention_factor) / (1 + 0.1 * math.log(factor) if factor > 1 else 1),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }
    if not rope.get("truncate", True):
        out.problems.append("rope truncate: false: llama.cpp rounds YaRN's bounds to whole dimensions")


def _windows(out: Description, table: Gguf, family: Family, raw: dict[str, Any]) -> None:
    windows, values = attention_windows(family, raw), out.values
    width = min((window for window in windows if window is not None), default=None)
    if not table.windows:
        if width is not None:
            _limit_context(out, width, "sliding windows, which llama.cpp does not compute in this family")
        return
    period = period_of([window is not None for window in windows])
    own_frequencies = values.get("rope.freq_base_swa", values["rope.freq_base"]) != values["rope.freq_base"]
    own_frequencies |= "rope.scaling.type" in values
    if width is not None and period is not None:
        values |= {"attention.sliding_window": width, "attention.sliding_window_pattern": period}
        return
    if width is not None and own_frequencies:
        kept = "".join("s" if window is not None else "F" for window in windows)
        out.problems.append(
            f"sliding layers (s) and full ones (F) follow one another as {kept}: llama.cpp only knows a pattern that "
            "repeats, with a full layer at its end; keep whole periods when you prune by depth"
        )
    elif width is not None:
        _limit_context(out, width, "sliding windows, which do not repeat as llama.cpp expects")
    elif "rope.scaling.type" in values:
        out.problems.append("no layer slides and the rotary embedding is scaled: llama.cpp knows no such model")
    # It wants a layer that slides. Within the context a window as wide as that is none.
    values |= {"attention.sliding_window": values["context_length"]}
    values |= {"attention.sliding_window_pattern": len(windows) + 1, "rope.freq_base_swa": values["rope.freq_base"]}


def _limit_context(out: Description, length: int, why: str) -> None:
    """Keep the context to what llama.cpp computes as transformers does."""
    if length < int(out.values["context_length"]):
        out.values["context_length"] = length
        out.notes.append(f"the context is limited to {length:,} tokens, because of {why}")


def period_of(slides: Sequence[bool]) -> int | None:
    """The n of llama.cpp's pattern, n - 1 sliding layers and a full one, over and over; None where there is no such n.

    A period longer than the model makes all its layers slide.
    """
    return next(
        (
            period
            for period in range(1, len(slides) + 2)
            if all(found == (layer % period < period - 1) for layer, found in enumerate(slides))
        ),
        None,
    )
