"""A causal LM whose layers, embedding and head are split over the ranks of a tensor-parallel group.

DeepSpeed's tensor parallelism (AutoTP) does the work: its column- and row-parallel linears with their collectives, its
process groups, and its ZeRO optimisers, which then partition and average over the data-parallel group alone and count a
split parameter's norm on every tensor rank and a whole one's once. Not used is its walk over a model, because

- it splits weights that every rank has loaded whole; here the modules are split without their weights (meta), and each
  rank reads its own rows and columns from the files;
- its heads compute logits, gathered or for a loss of its own; here the loss reads the head's rows (vocab-parallel);
- its split embedding refuses the scaled embeddings of Gemma 2.

Imports deepspeed for those layers and groups, which are needed before there is an engine.

B sequences, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kdscale.distill.parallel.tensor_slices import TensorSlice
from kdscale.models.head import VocabShard
from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import build_skeleton, move_buffers, replace_parameters

_ATTENTION, _COLUMN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


_ROW = ("o_proj", "down_proj")


_HEAD_NORMS = ("q_norm", "k_norm")


_BLOCK_VALUES = 1 << 22  # of one read of rows of which columns are kept


@dataclass(frozen=True)
class ModelSlices:
    """What of a model this rank holds: `parts` and whole `shapes` of the parameters that are split, by name."""

    slices: Mapping[str, TensorSlice]
    shapes: Mapping[str, tuple[int, ...]]
    head: VocabShard
    vocab: int  # rows of the whole head


def tensor_group(size: int) -> Any:
    """This rank's tensor-parallel group, from DeepSpeed, which makes it and the data-parallel one once a process.

    A collective call. Its mesh has the tensor axis innermost, as mesh.Mesh has.
    """
    from deepspeed.module_inject.layers import set_autotp_mode
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    set_autotp_mode(training=True)  # layers made otherwise freeze their weights
    return groups.get_tensor_model_parallel_group()


def data_group() -> Any:
    """The ranks that hold the same parts as this one; after `tensor_group`."""
    from deepspeed.utils import groups

    return groups.get_data_parallel_group()


Materialise = Callable[[Any, "ModelSlices", ParameterReader], None]


def load_sliced_model(
    path: Path,
    group: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    materialise: Materialise | None = None,
) -> tuple[Any, ModelSlices]:
    """The causal LM at `path` with this rank's part of every layer, and what part that is; no rank reads it whole.

    `materialise` gives the parameters their values, where they are not simply to be read into memory (ZeRO-3).
    Raises CheckpointError when config.json and the weights disagree.
    """
    weights = ParameterReader.open(path)
    model = build_skeleton(weights, dtype=dtype, trust_remote_code=trust_remote_code)
    split = _split_modules(model, group, weights)
    move_buffers(model, device)
    if materialise is None:
        _read(model, split, weights, device)
    else:
        materialise(model, split, weights)
    _mark(model, split, group)
    return model, split


def fill_slice(
    weights: ParameterReader, name: str, part: TensorSlice | None, shape: tuple[int, ...], begin: int, out: torch.Tensor
) -> None:
    """Values `begin` onwards of `part` of parameter `name`, whole of `shape`, into the flat `out`."""
    if part is None or part.dim == 0:
        first = 0 if part is None else next(part.runs(shape, 0, 0)).begin
        weights.fill(name, first + begin, out)
        return
    rows, width, at = max(1, _BLOCK_VALUES // shape[1]), part.end - part.begin, 0
    while at < out.numel():
        row, skipped = divmod(begin + at, width)
        count = min(rows, -(-(skipped + out.numel() - at) // width))
        block = torch.empty(count * shape[1], dtype=out.dtype)
        weights.fill(name, row * shape[1], block)
        kept = block.view(count, shape[1])[:, part.begin : part.end].reshape(-1)[skipped : skipped + out.numel() - at]
        out[at : at + kept.numel()].copy_(kept)
        at += kept.numel()


def _read(model: Any, split: ModelSlices, weights: ParameterReader, device: torch.device) -> None:
    made = replace_parameters(
        model, lambda value: nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=device))
    )
    for name, parameter in made.items():
        shape = split.shapes.get(name, tuple(parameter.shape))
        fill_slice(weights, name, split.slices.get(name), shape, 0, parameter.data.view(-1))


def _mark(model: Any, split: ModelSlices, group: Any) -> None:
    """Say to DeepSpeed which parameters are split, and sum the gradients of those that see only this rank's heads."""
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = name in split.slices
        if name.rsplit(".", 2)[-2] in _HEAD_NORMS:
            parameter.register_hook(lambda grad: _summed(grad, group))


def _summed(grad: torch.Tensor, group: Any) -> torch.Tensor:
    total = grad.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _split_modules(model: Any, group: Any, weights: ParameterReader) -> ModelSlices:
    """Put AutoTP's layers in the place of linears, and make embedding and head this rank's rows; all on meta."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    dims = weights.family.dims(weights.checkpoint.config)
    whole = {name: tuple(value.shape) for name, value in model.named_parameters()}
    by_heads, evenly = AutoTPMeta(num_kv_heads=dims.kv_heads), AutoTPMeta()
    parts: dict[str, TensorSlice] = {}
    for name, module in list(model.named_modules()):
        kind = name.rsplit(".", 1)[-1]
        if kind not in _COLUMN + _ROW or not isinstance(module, nn.Linear):
            continue
        meta, dim = by_heads if kind in _ATTENTION else evenly, int(kind in _ROW)
        parts[f"{name}.weight"] = _part(whole[f"{name}.weight"][dim], dim, group, meta)
        if module.bias is not None and dim == 0:
            parts[f"{name}.bias"] = parts[f"{name}.weight"]
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, kind, (LinearAllreduce if dim else LinearLayer)(module, group, tp_meta=meta))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = _part(dims.vocab, 0, group, evenly)
    names = {id(value): name for name, value in model.named_parameters()}
    for value in (embedding.weight, head.weight, head.bias):
        if value is not None and names[id(value)] not in parts:  # a tied head is split with the embedding
            parts[names[id(value)]] = rows
            value.data = value.data[rows.begin : rows.end]
    _look_up_own_rows(embedding, rows, group)
    shapes = {name: whole[name] for name in parts}
    for name, value in model.named_parameters():
        if name in parts and tuple(value.shape) != parts[name].shape(shapes[name]):
            raise AssertionError(f"{name}: AutoTP made {tuple(value.shape)} of {shapes[name]}, not {parts[name]}")
    return ModelSlices(parts, shapes, VocabShard(rows.begin, group), dims.vocab)


def _part(total: int, dim: int, group: Any, meta: Any) -> TensorSlice:
    """This rank's share by AutoTP's own rule: kv heads with their queries, or units; the first ranks have one more."""
    from deepspeed.module_inject.tp_shard import get_shard_size_list

    sizes, mine = get_shard_size_list(total, dist.get_world_size(group), meta), dist.get_rank(group)
    return TensorSlice(dim, sum(sizes[:mine]), sum(sizes[: mine + 1]))


def _look_up_own_rows(embedding: Any, rows: TensorSlice, group: Any) -> None:
    """The embedding of every token: from the rank that has its row, zeros from the others, summed.

    Wraps the module's own forward, so that a family's scale is applied as it is in the whole model.
    """
    from deepspeed.module_inject.layers import RowParallel

    forward = embedding.forward
    padding = embedding.padding_idx
    if padding is not None:  # a row without gradient
        embedding.padding_idx = padding - rows.begin if rows.begin <= padding < rows.end else None

    def look_up(ids_BS: torch.Tensor) -> torch.Tensor:
        elsewhere_BS = (ids_BS < rows.begin) | (ids_BS >= rows.end)
        found_BSH = forward((ids_BS - rows.begin).masked_fill(elsewhere_BS, 0))
        summed: torch.Tensor = RowParallel.apply(group, found_BSH.masked_fill(elsewhere_BS[..., None], 0.0), False)
        return summed

    embedding.forward = look_up
