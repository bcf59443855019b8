"""A ZeRO-3 student from its files: each rank reads its partition of every parameter and nothing else.

DeepSpeed's `zero.Init` makes the partitions, one parameter after the other, before there is an engine. Neither of its
documented uses works here: around `from_pretrained` it fails, and around a model's constructor it initialises anew and
rounds rotary frequencies.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdscale.distill.parallel.tensor_parallel import Materialise, ModelSlices, data_group, fill_slice
from kdscale.models.compiling import decoder_layers
from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import build_skeleton, move_buffers, replace_parameters
from kdscale.teacher.placement.host_memory import explain_refusal


def load_zero3(
    path: Path, settings: dict[str, Any], *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """The causal LM at `path` with ZeRO-3 parameters as `deepspeed.initialize` with the config `settings` makes them.

    Raises CheckpointError for a family that is not known and when config.json and the weights disagree, MachineError
    when this machine refuses the memory for a parameter.
    """
    weights = ParameterReader.open(path)
    model = build_skeleton(weights, dtype=dtype, trust_remote_code=trust_remote_code)
    move_buffers(model, device)
    _partition(model, None, weights, settings, device)
    return model


def zero3_materialiser(settings: dict[str, Any], device: torch.device) -> Materialise:
    """For `load_sliced_model`: partition this rank's slice of each parameter over the ranks that hold the same one."""
    return lambda model, slices, weights: _partition(model, slices, weights, settings, device)


def gather_by_layer(model: nn.Module) -> None:
    """Let ZeRO-3 gather each decoder layer as one, before it runs, instead of each module within it.

    A compiled layer cannot stop in its middle for DeepSpeed's hooks. Call it before `deepspeed.initialize`.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in decoder_layers(model):
        set_z3_leaf_module(layer, True)


def _partition(
    model: nn.Module, slices: ModelSlices | None, weights: ParameterReader, settings: dict[str, Any],
    device: torch.device,
) -> None:  # fmt: skip
    from deepspeed.runtime.zero.partition_parameters import Init

    shapes = {name: value.shape for name, value in model.named_parameters()}
    empty = replace_parameters(model, lambda value: nn.Parameter(torch.empty(0, dtype=value.dtype, device=device)))
    names = {id(parameter): name for name, parameter in empty.items()}

    class FromFiles(Init):
        """Partitions empty parameters. It maps memory for the whole one, but touches only this rank's part of it."""

        def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
            parameters = list(param_list)
            # the objectives' own are in no file; DeepSpeed takes what rank 0 has
            super()._convert_to_zero_parameters([value for value in parameters if id(value) not in names])
            for parameter in parameters:
                if id(parameter) not in names:
                    continue
                name = names[id(parameter)]
                parameter.data = _empty(shapes[name], parameter.dtype, self.local_device)
                self._convert_to_deepspeed_param(parameter)
                begin, end = self._own_range(parameter)
                if begin < end:
                    tensor_slice, shape = None, tuple(shapes[name])
                    if slices is not None and name in slices.slices:
                        tensor_slice, shape = slices.slices[name], slices.shapes[name]
                    fill_slice(weights, name, tensor_slice, shape, begin, parameter.data.view(-1)[begin:end])
                parameter.partition()

        def _own_range(self, parameter: Any) -> tuple[int, int]:
            """The values that `partition` takes; with hpZ's second copy in each node, all of them."""
            if self.zero_param_process_group is not None:
                return 0, parameter.ds_numel
            size = self._aligned_size(parameter) // self._partition_world_size(parameter)
            begin = min(size * self._partition_rank(parameter), parameter.ds_numel)
            return begin, min(begin + size, parameter.ds_numel)

    FromFiles(
        module=model,
        data_parallel_group=None if slices is None else data_group(),
        config_dict_or_path=settings,
        dtype=next(model.parameters()).dtype,
    )


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor whose memory goes back to the system at once; malloc would keep it for the next partition."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = shape.numel() * dtype.itemsize
    with explain_refusal("no memory for a parameter of the student", f"{nbytes:,} bytes", hint="use more ranks"):
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, which ZeRO-3 keeps in `ds_shape` while the parameter is partitioned."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block every parameter of `model` whole on this rank, by name, at any ZeRO stage. A collective call.

    At stage 3 a rank then holds all weights of the model at once.
    """
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        if partitioned := [value for value in parameters.values() if hasattr(value, "ds_id")]:
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            stack.enter_context(GatheredParameters(partitioned))
        yield {name: value.data for name, value in parameters.items()}
