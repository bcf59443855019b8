"""A causal LM whose layers, embedding and head are sliced over the ranks of a tensor-parallel group.

DeepSpeed's tensor parallelism (AutoTP) gives the column- and row-parallel linears with their collectives, the process
groups, and ZeRO optimisers that partition and average over the data-parallel group alone and count a sliced parameter's
norm on every tensor rank and an unsliced one's once. Its walk over a model is not used, because

- it slices weights that every rank has loaded whole; here the modules are sliced before they have weights (meta), and
  each rank reads its own rows and columns from the files;
- its heads compute logits, gathered or for a loss of its own; here the loss reads the head's rows (vocab-parallel);
- its sliced embedding refuses the scaled embeddings of Gemma 2.

B sequences, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kdscale.distill.parallel.checks import HEAD_NORMS, SLICED_INPUT, SLICED_OUTPUT
from kdscale.distill.parallel.tensor_slices import TensorSlice
from kdscale.families.schema import COMPONENT_OF
from kdscale.models.head import VocabShard
from kdscale.models.layer_stream import replace_module
from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import build_skeleton, move_buffers, replace_parameters

_BLOCK_VALUES = 1 << 22  # of one read of whole rows of which some columns are kept


@dataclass(frozen=True)
class ModelSlices:
    """What this rank holds of a model: `slices` and whole `shapes` of the sliced parameters, by name."""

    slices: Mapping[str, TensorSlice]
    shapes: Mapping[str, tuple[int, ...]]
    head: VocabShard
    vocab: int  # rows of the whole head


def tensor_group(size: int) -> Any:
    """This rank's tensor-parallel group. A collective call.

    DeepSpeed makes it and the data-parallel one once per process, with the tensor axis innermost, as mesh.Mesh has it.
    """
    from deepspeed.module_inject.layers import set_autotp_mode
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    set_autotp_mode(training=True)  # layers made otherwise freeze their weights
    return groups.get_tensor_model_parallel_group()


def data_group() -> Any:
    """The ranks that hold the same slices as this one; call `tensor_group` first."""
    from deepspeed.utils import groups

    return groups.get_data_parallel_group()


Materialise = Callable[[Any, ModelSlices, ParameterReader], None]


def load_sliced_model(
    path: Path,
    group: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    materialise: Materialise | None = None,
) -> tuple[Any, ModelSlices]:
    """The causal LM at `path` with this rank's slice of every layer, and what slices these are.

    No rank reads the whole model. `materialise` gives the parameters their values where they are not simply to be read
    into memory (ZeRO-3). Raises CheckpointError when config.json and the weights disagree.
    """
    weights = ParameterReader.open(path)
    model = build_skeleton(weights, dtype=dtype, trust_remote_code=trust_remote_code)
    roles = {spec.parameter: spec.role for spec in weights.family.tensors(weights.checkpoint.config).values()}
    slices = _slice_modules(model, group, weights, roles)
    move_buffers(model, device)
    if materialise is None:
        _read(model, slices, weights, device)
    else:
        materialise(model, slices, weights)
    _mark(model, slices, group, roles)
    return model, slices


def fill_slice(
    weights: ParameterReader, name: str, tensor_slice: TensorSlice | None, shape: tuple[int, ...], begin: int,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Read values `begin` onwards of a slice of parameter `name` into the flat `out`.

    `shape` is that of the whole parameter; without a slice it is read from itself.
    """
    if tensor_slice is None or tensor_slice.dim == 0:
        first = 0 if tensor_slice is None else next(tensor_slice.ranges(shape, 0, 0)).source
        weights.fill(name, first + begin, out)
        return
    rows, width, at = max(1, _BLOCK_VALUES // shape[1]), tensor_slice.end - tensor_slice.begin, 0
    while at < out.numel():
        row, skipped = divmod(begin + at, width)
        count = min(rows, -(-(skipped + out.numel() - at) // width))
        block = torch.empty(count * shape[1], dtype=out.dtype)
        weights.fill(name, row * shape[1], block)
        columns = block.view(count, shape[1])[:, tensor_slice.begin : tensor_slice.end]
        kept = columns.reshape(-1)[skipped : skipped + out.numel() - at]
        out[at : at + kept.numel()].copy_(kept)
        at += kept.numel()


def _read(model: Any, slices: ModelSlices, weights: ParameterReader, device: torch.device) -> None:
    parameters = replace_parameters(
        model, lambda value: nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=device))
    )
    for name, parameter in parameters.items():
        shape = slices.shapes.get(name, tuple(parameter.shape))
        fill_slice(weights, name, slices.slices.get(name), shape, 0, parameter.data.view(-1))


def _mark(model: Any, slices: ModelSlices, group: Any, roles: Mapping[str, str]) -> None:
    """Tell DeepSpeed which parameters are sliced; sum the gradients of norms that see only this rank's heads."""
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = name in slices.slices
        if roles[name] in HEAD_NORMS:
            parameter.register_hook(lambda grad: _summed(grad, group))


def _summed(grad: torch.Tensor, group: Any) -> torch.Tensor:
    total = grad.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _slice_modules(model: Any, group: Any, weights: ParameterReader, roles: Mapping[str, str]) -> ModelSlices:
    """Replace linears with AutoTP's, and cut embedding and head to this rank's rows; all on meta."""
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    dims = weights.family.dims(weights.checkpoint.config)
    model_shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    slices = _slice_linears(model, group, roles, dims.kv_heads)
    rows = _rank_slice(dims.vocab, 0, group, AutoTPMeta())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(value): name for name, value in model.named_parameters()}
    for value in (embedding.weight, head.weight, head.bias):
        if value is not None and names[id(value)] not in slices:  # a tied head is sliced with the embedding
            slices[names[id(value)]] = rows
            value.data = value.data[rows.begin : rows.end]
    _look_up_own_rows(embedding, rows, group)
    shapes = {name: model_shapes[name] for name in slices}
    for name, value in model.named_parameters():
        if name in slices and tuple(value.shape) != slices[name].shape(shapes[name]):
            raise AssertionError(f"{name}: AutoTP made {tuple(value.shape)} of {shapes[name]}, not {slices[name]}")
    return ModelSlices(slices, shapes, VocabShard(rows.begin, group), dims.vocab)


def _slice_linears(model: Any, group: Any, roles: Mapping[str, str], kv_heads: int) -> dict[str, TensorSlice]:
    """Replace the linears of attention and feed-forward; returns the slices of their weights and biases."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    by_heads, evenly = AutoTPMeta(num_kv_heads=kv_heads), AutoTPMeta()
    slices: dict[str, TensorSlice] = {}
    for name, module in list(model.named_modules()):
        role = roles.get(f"{name}.weight")
        if role not in SLICED_OUTPUT + SLICED_INPUT:
            continue
        meta, dim = by_heads if COMPONENT_OF[role] == "attention" else evenly, int(role in SLICED_INPUT)
        slices[f"{name}.weight"] = _rank_slice(module.weight.shape[dim], dim, group, meta)
        if module.bias is not None and dim == 0:
            slices[f"{name}.bias"] = slices[f"{name}.weight"]
        sliced = _outside_graphs(LinearAllreduce if dim else LinearLayer)
        replace_module(model, name, sliced(module, group, tp_meta=meta))
    return slices


@cache
def _outside_graphs(linear_class: type[nn.Module]) -> Any:
    """The class without torch.compile where its layer is compiled: it adds up over ranks in place."""
    forward = torch.compiler.disable(linear_class.forward, reason="sums over ranks")
    return type(linear_class.__name__, (linear_class,), {"forward": forward})


def _rank_slice(total: int, dim: int, group: Any, meta: Any) -> TensorSlice:
    """This rank's slice by AutoTP's rule: kv heads with their queries, or units; the first ranks have one more."""
    from deepspeed.module_inject.tp_shard import get_shard_size_list

    sizes, position = get_shard_size_list(total, dist.get_world_size(group), meta), dist.get_rank(group)
    return TensorSlice(dim, sum(sizes[:position]), sum(sizes[: position + 1]))


def _look_up_own_rows(embedding: Any, rows: TensorSlice, group: Any) -> None:
    """Let the embedding sum, over the ranks, the row that one of them has and the zeros of the others.

    It calls the module's own forward, so that a family's scale is applied as it is in the whole model.
    """
    from deepspeed.module_inject.layers import RowParallel

    forward = embedding.forward
    padding = embedding.padding_idx
    if padding is not None:  # a row without gradient
        embedding.padding_idx = padding - rows.begin if rows.begin <= padding < rows.end else None

    def look_up(ids_BS: torch.Tensor) -> torch.Tensor:
        elsewhere_BS = (ids_BS < rows.begin) | (ids_BS >= rows.end)
        own_BSH = forward((ids_BS - rows.begin).masked_fill(elsewhere_BS, 0))
        summed: torch.Tensor = RowParallel.apply(group, own_BSH.masked_fill(elsewhere_BS[..., None], 0.0), False)
        return summed

    embedding.forward = look_up
