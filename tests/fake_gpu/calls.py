"""Calls of torch's Python functions on the fake GPU's tensors, before they reach C++ (tensors.py says how it works)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.fake_gpu.syncs import Syncs
from tests.fake_gpu.tensors import CPU, GPU, GpuTensor, MetaDevice, Operations, is_pinned, on_gpu, pin

aten = torch.ops.aten
_is_meta = Tensor.is_meta.__get__  # type: ignore[attr-defined]


def _to_gpu(tensor: Tensor, **kwargs: Any) -> Any:
    return tensor if isinstance(tensor, GpuTensor) else aten._to_copy.default(tensor, device=GPU, **kwargs)


def _made_on_cpu(function: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.tensor and its like: from the values on the CPU, and one copy."""
    requires_grad = kwargs.pop("requires_grad", False)
    return _to_gpu(function(*args, **{**kwargs, "device": CPU})).requires_grad_(requires_grad)


class Calls(TorchFunctionMode):
    """Calls of torch's Python functions, before they reach C++."""

    def __init__(self, syncs: Syncs):
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        before, MetaDevice.is_real = MetaDevice.is_real, _names_meta(args, kwargs)
        try:
            args = tuple(_indexed(arg) for arg in args)
            kwargs = {name: _indexed(arg) for name, arg in kwargs.items()}
            if (special := _SPECIAL.get(func)) is not None:
                return special(self._syncs, func, *args, **kwargs)
            if func in _FROM_VALUES and on_gpu(kwargs.get("device")):
                if args and isinstance(args[0], GpuTensor):  # torch.tensor(t) and torch.as_tensor(t) of such a tensor
                    return (
                        args[0].to(dtype=kwargs.get("dtype")) if func is torch.as_tensor else args[0].detach().clone()
                    )
                return _made_on_cpu(func, *args, **kwargs)
            return func(*args, **kwargs)
        finally:
            MetaDevice.is_real = before


def _names_meta(args: Any, kwargs: Any) -> bool:
    def real(value: Any) -> bool:
        if isinstance(value, GpuTensor):
            return False
        if isinstance(value, Tensor):
            return bool(_is_meta(value))
        if isinstance(value, (list, tuple)):
            return any(real(item) for item in value)
        return (isinstance(value, torch.device) and value.type == "meta") or (
            isinstance(value, str) and value == "meta"
        )

    return any(map(real, args)) or any(map(real, kwargs.values()))


def _indexed(value: Any) -> Any:
    """A CUDA device as cuda:0: C++ asks the missing CUDA for the number of one without."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return GPU
    return GPU if isinstance(value, str) and value in ("cuda", "cuda:0") else value


def _tolist(syncs: Syncs, func: Any, tensor: Tensor) -> Any:
    if not isinstance(tensor, GpuTensor):
        return func(tensor)
    syncs.note("tolist")
    return tensor.values.tolist()


def _numpy(syncs: Syncs, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, GpuTensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
    return func(tensor, *args, **kwargs)


def _new_tensor(syncs: Syncs, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(tensor, GpuTensor):
        return func(tensor, *args, **kwargs)
    return _made_on_cpu(torch.tensor, *args, **{"dtype": tensor.dtype, **kwargs})


def _cuda(syncs: Syncs, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _to_gpu(tensor)


def _pin_memory(syncs: Syncs, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return pin(tensor.clone())


def _is_pinned(syncs: Syncs, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> bool:
    return is_pinned(tensor)


def _to(syncs: Syncs, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`to` a tensor's own device is the tensor itself, where C++ would see two devices and copy."""
    if args and isinstance(args[0], GpuTensor):
        args = (GPU, args[0].dtype, *args[1:])
    if not isinstance(tensor, GpuTensor) or GPU not in (*args[:1], kwargs.get("device")):
        return func(tensor, *args, **kwargs)
    kwargs.pop("device", None)
    dtype, non_blocking, copy = (*args[1:], None, None, None)[:3] if args else (None, None, None)
    if isinstance(dtype, bool):  # to(device, non_blocking, copy) has no dtype
        dtype, non_blocking, copy = None, dtype, non_blocking
    named = {"dtype": dtype, "non_blocking": bool(non_blocking), "copy": bool(copy)}
    return func(tensor, **{"dtype": tensor.dtype, **{key: value for key, value in named.items() if value}, **kwargs})


def _indexing(syncs: Syncs, func: Any, tensor: Tensor, index: Any, *value: Any) -> Any:
    """C++ would put a list of numbers on the meta device, where it has no values."""
    if isinstance(tensor, GpuTensor):
        parts = index if isinstance(index, tuple) else (index,)
        index = tuple(_made_on_cpu(torch.tensor, part) if isinstance(part, list) else part for part in parts)
    return func(tensor, index, *value)


_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray}
_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _indexing,
    Tensor.__setitem__: _indexing,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.new_tensor: _new_tensor,
    Tensor.cuda: _cuda,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: _is_pinned,
    Tensor.to: _to,
}


def modes(syncs: Syncs) -> Iterator[Any]:
    """The two modes, in the order in which they are entered."""
    yield Operations(syncs)
    yield Calls(syncs)
