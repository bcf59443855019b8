"""config.json of a GGUF file: the family that its architecture and tensors are of, and that family's fields.

The tables of the family files that the writer uses, read the other way round (packaging/gguf_metadata): which key is
which field, what a family's norms add, how its rotary rows lie. What a file does not say is transformers' default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.families import Dims, Family, gguf_data, load_family
from kdscale.families.schema import FamilyData, Gguf
from kdscale.models.loading import explain_library_errors
from kdscale.packaging.gguf_names import gguf_name
from kdscale.packaging.gguf_teacher.file import GgufFile
from kdscale.packaging.gguf_teacher.rotary import VECTORS, rope_parameters

_SLIDES, _FULL = "sliding_attention", "full_attention"


def read_config(file: GgufFile) -> tuple[Family, dict[str, Any]]:
    """The family of the file's model and its config.json.

    Raises CheckpointError for an architecture without a family, for sizes or settings that no family of it has, and for
    tensors that are not the family's.
    """
    candidates = [data for data in gguf_data() if data.gguf is not None and data.gguf.architecture == file.architecture]
    if not candidates:
        got = repr(file.architecture)[:100]
        known = sorted({data.gguf.architecture for data in gguf_data() if data.gguf is not None})
        raise CheckpointError(
            f"{file.path}: general.architecture", expected="one of " + ", ".join(known), got=got,
            hint="docs/how-to/add-a-family.md says how a family gets a GGUF table",
        )  # fmt: skip
    of_experts = file.size("expert_count", 0) > 0
    # several families share Llama's architecture: the one that has its name, and experts where the file has some
    candidates.sort(key=lambda data: (bool(data.sites.experts) != of_experts, data.name != file.architecture))
    refused: list[CheckpointError] = []
    for data in candidates:
        try:
            return _config_of(file, data)
        except CheckpointError as error:
            refused.append(error)
    raise refused[0]


def _config_of(file: GgufFile, data: FamilyData) -> tuple[Family, dict[str, Any]]:
    from transformers import AutoConfig

    model_type = data.model_types[0]
    said = {"model_type": model_type, **_sizes(file, data), **_flags(file, data)}
    assert data.gguf is not None
    said |= {field: number for key, field in data.gguf.numbers.items() if (number := file.number(key)) is not None}
    dims = load_family(said, str(file.path)).dims(said)
    with explain_library_errors(file.path, "config"):
        said |= _positions(file, data, AutoConfig.for_model(**said), dims)
        config = AutoConfig.for_model(**said)
    said |= _required(data.gguf, config)
    raw = {**config.to_diff_dict(), **said, "architectures": [data.architectures[0]]}
    raw = {key: raw[key] for key in sorted(raw) if key != "transformers_version"}
    family = load_family(raw, str(file.path))
    file.check_names(tensor_names(family, raw), VECTORS)
    return family, raw


def tensor_names(family: Family, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tensor of the file → the family's tensors that it holds, in order: of experts, all of a layer's."""
    names: dict[str, list[str]] = {}
    for name, spec in family.tensors(dict(config)).items():
        found = gguf_name(spec.role, spec.layer, spec.expert is not None)
        if found is None:
            raise CheckpointError(f"{name} of {family.name} has no name in GGUF files")
        names.setdefault(found, []).append(name)
    return names


def _sizes(file: GgufFile, data: FamilyData) -> dict[str, Any]:
    heads, hidden = file.size("attention.head_count"), file.size("embedding_length")
    head_dim = file.size("attention.key_length", hidden // heads)
    if file.size("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path}: attention.value_length", expected=f"that of keys, {head_dim}",
            got=str(file.size("attention.value_length")),
        )  # fmt: skip
    ffn = file.size("feed_forward_length")
    sizes = {
        "hidden": hidden,
        "ffn": file.size("expert_feed_forward_length", ffn) if data.sites.experts else ffn,
        "dense_ffn": ffn,
        "shared_ffn": file.size("expert_shared_feed_forward_length", 0),
        "heads": heads,
        "kv_heads": file.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "layers": file.size("block_count"),
        "vocab": file.shape("token_embd.weight")[0],
        "experts": file.size("expert_count", 0),
    }
    out: dict[str, Any] = {
        field.field: sizes[dim] for dim, field in data.dims.items() if field.field is not None and dim in sizes
    }
    if data.experts_per_token is not None and data.experts_per_token.field is not None:
        out[data.experts_per_token.field] = file.size("expert_used_count")
    context = file.size("context_length")
    if data.sizes:  # learned positions: as many as the table has rows
        return out | {str(size.field): file.shape("position_embd.weight")[0] for size in data.sizes.values()}
    return out | {"max_position_embeddings": context}


def _flags(file: GgufFile, data: FamilyData) -> dict[str, Any]:
    """The flags that decide which tensors there are, from those that the file holds."""
    out = {}
    for name, flag in data.flags.items():
        for template in data.tensors:
            if name not in (template.when, template.unless):
                continue
            stored = gguf_name(template.role, 0 if template.per_layer else None, template.per_expert)
            out[flag.field] = (stored in file.names) == (template.when == name)
            break
    return out


def _required(table: Gguf, config: Any) -> dict[str, Any]:
    """What llama.cpp computes whatever a file says, where the config class has something else by itself."""
    return {
        rule.field: rule.one_of[0]
        for rule in table.requires
        if hasattr(config, rule.field) and getattr(config, rule.field) not in rule.one_of
    }


def _positions(file: GgufFile, data: FamilyData, usual: Any, dims: Dims) -> dict[str, Any]:
    """Rotary embedding, windows, and what queries are scaled by."""
    table, out = data.gguf, dict[str, Any]()
    assert table is not None
    if data.sites.rotary:
        out["rope_parameters"] = rope_parameters(file, getattr(usual, "rope_parameters", None), dims)
    if data.window is not None:
        out |= _windows(file, data, out.get("rope_parameters", {}), dims.layers)
    if table.query_scale is not None:
        at = table.query_scale.hidden_over_heads_at
        out[table.query_scale.field] = dims.hidden // dims.heads if dims.layers == at else dims.head_dim
    return out


def _windows(file: GgufFile, data: FamilyData, rope: dict[str, Any], layers: int) -> dict[str, Any]:
    window, width = data.window, file.number("attention.sliding_window")
    assert window is not None and data.gguf is not None
    if width is None or not data.gguf.windows:
        if window.only_with is not None:
            return {window.only_with: False}
        return {window.field: None if width is None else int(width)} if not data.gguf.windows else {}
    out: dict[str, Any] = {window.field: int(width)}
    period = file.number("attention.sliding_window_pattern")
    if period is None or window.layers is None:
        return out
    same_base = file.number("rope.freq_base_swa") == file.number("rope.freq_base")
    if width >= file.size("context_length") and same_base and period > layers:
        return out | {window.layers: [_FULL] * layers}  # as a model without windows is written
    return out | {window.layers: [_SLIDES if layer % period < period - 1 else _FULL for layer in range(layers)]}
