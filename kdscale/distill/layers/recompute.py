"""Layers that compute their activations again in the backward, but for the outputs of some operators.

torch's own `create_selective_checkpoint_contexts` counts every operator of a layer. Under ZeRO-3 a layer's weights may
be there before its forward and have to be gathered in its backward, so that the second time has operators that the
first had not, which torch takes for an error (2.13). Here only the operators whose outputs are kept are counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kdscale.config.distill.recompute import Recompute
from kdscale.errors import SelfCheckError
from kdscale.models.attention import attention_dropout

# Attention that consists of other operators (soft caps) is not here: its scores are as large as what they would save.
# torch compiles flex_attention, so that no operator of it is seen.
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable", "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm", "transformers::grouped_mm_fallback")


# A little less than all that a compiled backward would like to have in memory: what is no product is made again.
_BUDGET = 0.99


def recompute_in_backward(model: Any, level: Recompute, compiled: bool = False) -> None:
    """Let the layers of a transformers `model` keep for the backward what `level` says, when it trains.

    Products of `compiled` layers cannot be told from the rest here, so that keeping them is left to the compiler. Call
    it before a layer is compiled.
    """
    if compiled:
        import torch._functorch.config as compiler

        compiler.activation_memory_budget = _BUDGET if level.products else 1.0
    if not level.checkpoints or (compiled and level.products):
        return
    # attention that drops draws random numbers, and what follows it must find the generator where it was
    attention = level.attention and not attention_dropout(model)
    names = (_ATTENTION if attention else ()) + (_PRODUCTS if level.products else ())
    options: dict[str, Any] = {"use_reentrant": False}
    if names:
        options["context_fn"] = functools.partial(_keep_and_hand_back, frozenset(names))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)


def _keep_and_hand_back(names: frozenset[str]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of one layer's forward and of the same a second time, for torch's `checkpoint`."""
    kept = _Kept(names)
    return _Keep(kept), _HandBack(kept)


@dataclass
class _Output:
    """What an operator returned; `values` is None where it has to be computed again."""

    name: str
    values: Any
    versions: list[int]

    def shares_memory(self, tensors: Iterable[torch.Tensor]) -> bool:
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return any(tensor.untyped_storage().data_ptr() in places for tensor in _tensors(self.values))


@dataclass
class _Kept:
    """The outputs of one layer's forward, in its order."""

    names: frozenset[str]
    outputs: list[_Output] = field(default_factory=list)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Outputs in the memory of these tensors are no longer what their operators returned."""
        tensors = list(tensors)
        for output in self.outputs:
            if output.shares_memory(tensors):
                output.values = None


class _Mode(TorchDispatchMode):
    """Sees every operator of a layer."""

    def __init__(self, kept: _Kept):
        super().__init__()
        self._kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Functions that torch compiles run as they are."""
        return True


class _Keep(_Mode):
    """The forward: outputs of the named operators are kept.

    The last one is not if nothing but a sum reads it: the second time ends before it, with all that autograd needs.
    """

    _only_summed = False  # the output kept last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, outputs = func.name(), self._kept.outputs
        if name in self._kept.names:
            values = tree_map(_detached, out)
            outputs.append(_Output(name, values, [tensor._version for tensor in _tensors(values)]))
            self._only_summed = True
        elif written := _written(func, args, kwargs or {}):
            self._kept.forget(written)
        elif self._only_summed and not _passes_on(func, args) and outputs[-1].shares_memory(_tensors((args, kwargs))):
            self._only_summed = False
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._only_summed:
            self._kept.outputs[-1].values = None


class _HandBack(_Mode):
    """The second time: the named operators return what was kept, which is let go."""

    _next: Iterator[_Output]

    def __enter__(self) -> Any:
        self._next = iter(self._kept.outputs)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name not in self._kept.names:
            return func(*args, **(kwargs or {}))
        output = next(self._next, None)
        if output is None or output.name != name:
            expected = "nothing more" if output is None else output.name
            raise SelfCheckError("a layer computed again", expected=expected, got=name)
        values, output.values = output.values, None
        if values is None:
            return func(*args, **(kwargs or {}))
        if [tensor._version for tensor in _tensors(values)] != output.versions:
            raise SelfCheckError(f"what {name} returned", expected="as it was in the forward", got="changed since")
        return values


def _detached(value: Any) -> Any:
    """A tensor without a graph that counts writes together with the original, for which torch has to be told so."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return value.detach()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operator writes to; a collective may be any of its own, which its schema does not tell."""
    if func.namespace == "c10d":
        return _tensors((args, kwargs))
    if not func._schema.is_mutable:
        return []
    writes = {arg.name for arg in func._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write}
    named = dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)) | kwargs
    return _tensors([value for name, value in named.items() if name in writes])


def _passes_on(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the operator's backward reads none of its tensors: views, sums, and products with a plain number."""
    name = func.name().partition(".")[0]
    numbers = sum(tensor.dim() == 0 for tensor in _tensors(args))
    product = name == "aten::mul" and len(_tensors(args)) - numbers == 1
    return func.is_view or name in ("aten::add", "aten::_unsafe_view") or product
