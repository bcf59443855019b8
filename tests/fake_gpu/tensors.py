"""Tensors that say they are on `cuda:0` and hold their values on the CPU, for machines without a GPU.

An operation that mixes them with tensors on the CPU raises what CUDA would raise, and every operation for which the
host would wait for the GPU is noted with the line of code that asked for it.

How it works. A `GpuTensor` wraps a CPU tensor. To torch's C++ it is on the meta device, for which every build has what
autograd needs of a device; to Python it is on cuda:0. Two modes, pushed together by `fake_gpu`, see all that happens:
`Calls` (calls.py) sees calls of torch's Python functions and turns "cuda" into a device that C++ accepts, and
`Operations` sees the operations that they come down to and runs them on the wrapped tensors. A meta device that C++
asks for is ours unless the Python call had a real meta tensor or named that device.

What it cannot show: streams that run out of order, memory that is too small, kernels (Triton's, NCCL's), and operations
that CUDA lacks or rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_gpu.syncs import Syncs

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten


class GpuTensor(Tensor):
    """A tensor "on the GPU"; `values` is the CPU tensor with what it holds."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> GpuTensor:
        assert not isinstance(values, GpuTensor)
        # C++ counts versions, which a wrapper made under inference_mode has not
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            wrapper: GpuTensor = Tensor._make_wrapper_subclass(
                cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
                dtype=values.dtype, layout=values.layout, device="meta",
            )  # fmt: skip
        wrapper.values = values
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.values = new.values  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reached without the modes, in threads of their own."""
        return _run(func, args, kwargs or {}, syncs=None)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        stream.recorded.append(self.data_ptr())

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.values})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in the arguments of an operation (torch's own tree functions take most of a step's time)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


def _map(change: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(change, item) for item in value])
    if isinstance(value, dict):
        return {name: _map(change, item) for name, item in value.items()}
    return value


class MetaDevice:
    """What C++ calls meta: the fake GPU, unless the Python call under way means the meta device itself."""

    is_real = False


# CPU memory that was asked to be page-locked, by address; held, so that no other memory gets the address
_PINNED: dict[int, torch.UntypedStorage] = {}


def pin(tensor: Tensor) -> Tensor:
    """Note that a CPU tensor's memory was asked to be page-locked."""
    _PINNED[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether a CPU tensor lies in memory that was asked to be page-locked."""
    return tensor.untyped_storage().data_ptr() in _PINNED


def on_gpu(device: Any) -> bool:
    """Whether a device that an operation was asked for is the fake GPU."""
    if device is None:
        return False
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "meta" and not MetaDevice.is_real)


@cache
def _kind(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


# Operations whose result's shape, or whose result, the host has to know.
_WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "is_nonzero", "bincount", "_linalg_check_errors", "histogram", "_linalg_eigh", "_linalg_svd",
    "linalg_lstsq", "linalg_cholesky_ex", "linalg_inv_ex", "linalg_solve_ex", "item",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"_to_copy", "copy_", "copy"}
_TAKES_CPU_SCALARS = {"fill_", "fill", "masked_fill", "masked_fill_"}


def _waits(func: Any, args: Any, kwargs: Any) -> str | None:
    """The name of the operation if the host waits for it."""
    kind = _kind(func)
    if kind in _WAITS:
        return kind
    if kind == "repeat_interleave" and kwargs.get("output_size") is None:
        return kind
    if kind in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, GpuTensor) for index in indices):
            return f"{kind} by indices on the CPU"
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        filled = kind.startswith(("index_put", "_index_put")) and len(indices) == 1 and args[2].numel() == 1
        return f"{kind} by a mask" if masks and not filled else None
    if kind in _COPIES:
        source, target = (args[1], args[0]) if kind != "_to_copy" else (args[0], None)
        to_gpu = isinstance(target, GpuTensor) if target is not None else on_gpu(kwargs.get("device", source.device))
        if isinstance(source, GpuTensor) == to_gpu:
            return None
        non_blocking = kwargs.get("non_blocking", args[2] if kind == "copy_" and len(args) > 2 else False)
        # into memory that is not page-locked a copy waits in any case; torch page-locks what `to` makes for itself
        pageable = not to_gpu and target is not None and not is_pinned(target)
        return f"copy to the {'GPU' if to_gpu else 'CPU'}" if pageable or not non_blocking else None
    return None


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Raises RuntimeError, as CUDA does, for a mix of devices that it does not take."""
    kind = _kind(func)
    if kind in _COPIES:
        return
    if kind in _INDEXING:
        args = (args[0], *args[2:])  # indices may be on the CPU
    tensors = list(_tensors_in((args, kwargs)))
    there = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
    if not there or not here:
        return
    scalars = torch.Tag.pointwise in func.tags or kind in _TAKES_CPU_SCALARS or kind in _INDEXING
    scalars = scalars or kind.startswith("_foreach")
    written = [args[i] for i, item in enumerate(func._schema.arguments[: len(args)]) if item.is_write]
    written += [kwargs[item.name] for item in func._schema.arguments if item.is_write and item.name in kwargs]
    into_cpu = any(not isinstance(tensor, GpuTensor) for tensor in _tensors_in(written))
    if into_cpu or not scalars or any(tensor.dim() for tensor in here):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


def _wide_product(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`mm` of 16-bit operands with an fp32 result, which torch has for CUDA alone."""
    names = [item.name for item in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    product = given["self" if "mat1" not in given else "mat1"].float() @ given["mat2"].float()
    if _kind(func) == "addmm":
        product = given["self"].to(given["out_dtype"]) * given.get("beta", 1) + given.get("alpha", 1) * product
    if "out" in given:
        return given["out"].copy_(product)
    return product.to(given["out_dtype"])


def _run(func: Any, args: Any, kwargs: Any, syncs: Syncs | None) -> Any:
    """One operation, on the wrapped tensors where it has any or is asked to make some."""
    there = any(isinstance(tensor, GpuTensor) for tensor in _tensors_in((args, kwargs)))
    asked = on_gpu(kwargs.get("device"))
    if not there and not asked:
        if kwargs.get("pin_memory"):
            return pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)
    if there:
        _check_devices(func, args, kwargs)
    if syncs is not None and (what := _waits(func, args, kwargs)):
        syncs.note(what)
    inner_args, inner_kwargs = _map(lambda x: x.values if isinstance(x, GpuTensor) else x, (args, kwargs))
    leaves_gpu = kwargs.get("device") is not None and not asked
    if kwargs.get("device") is not None:
        inner_kwargs["device"] = kwargs["device"] if leaves_gpu else CPU
    inner_kwargs.pop("pin_memory", None)
    if _kind(func) == "histc" and not inner_args[0].is_floating_point():  # CUDA counts integers, a CPU does not
        result = func(inner_args[0].float(), *inner_args[1:], **inner_kwargs).to(inner_args[0].dtype)
    elif _kind(func) in ("mm", "addmm", "bmm") and func._overloadname in ("dtype", "dtype_out"):
        result = _wide_product(func, inner_args, inner_kwargs)
    else:
        result = func(*inner_args, **inner_kwargs)
    if leaves_gpu or (func is aten.copy_.default and not isinstance(args[0], GpuTensor)):
        return args[0] if func is aten.copy_.default else result
    return _wrapped(func, args, kwargs, result)


def _wrapped(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """The result of an operation as tensors on the GPU: an argument that was written into is itself the result."""
    arguments, returns = func._schema.arguments, func._schema.returns
    if not any(item.alias_info is not None and item.alias_info.is_write for item in returns):
        return _map(GpuTensor, result)
    given = dict(zip((item.name for item in arguments), args, strict=False)) | kwargs
    written = [given[item.name] for item in arguments if item.is_write and given.get(item.name) is not None]
    for tensor in _tensors_in(written):
        assert tensor.shape == getattr(tensor, "values", tensor).shape, f"{func} changes shapes in place"
    return written[0] if len(returns) == 1 else tuple(written)


class Operations(TorchDispatchMode):
    """What calls of torch come down to, run on the wrapped tensors."""

    def __init__(self, syncs: Syncs):
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):  # under inference_mode operations come whole, with the copies and waits inside them
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}, self._syncs)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)


def forget_pinned() -> None:
    """Let go of the memory that was page-locked."""
    _PINNED.clear()
