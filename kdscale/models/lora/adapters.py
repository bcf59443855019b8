"""Low-rank adapters (LoRA, arXiv 2106.09685) on a transformers model, by peft; the model keeps its class.

Of an adapted module `m` the weight becomes `m.base_layer.weight`, and `m.lora_A.default.weight` [R, I] and
`m.lora_B.default.weight` [O, R] come beside it.

R rank, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kdscale.config.distill.lora import LoraConfig
from kdscale.runtime.packages import require_packages

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def check_peft() -> None:
    """Raises ConfigError where peft is not installed."""
    require_packages("distill.lora", ("peft",), "lora", "leave the section out: all weights are trained then")


def adapter_names(module: str) -> tuple[str, str]:
    """The parameters (A, B) of the adapter of a module."""
    return module + _A, module + _B


def adapted_weight(parameter: str) -> str:
    """The weight that an adapter's parameter changes, by its name without adapters; other names stay as they are."""
    for end in (_A, _B):
        if parameter.endswith(end):
            return parameter.removesuffix(end) + ".weight"
    return parameter


def add_adapters(model: Any, settings: LoraConfig, modules: Collection[str], seed: int) -> None:
    """Freeze the model's parameters and give these modules adapters, which are all that is trainable afterwards.

    A is drawn from `seed` and B is zero, so that the model computes what it did. The weights may be elsewhere
    (partitioned, or on the meta device): they are not read. Modules outside `modules` stay as they are.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*fan_in_fan_out")  # of GPT-2's maps, which peft finds out itself
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config(settings, modules), model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in _layers(model):
        module.enable_adapters(True)


def peft_config(settings: LoraConfig, modules: Collection[str]) -> Any:
    """The same settings as peft has them."""
    from peft import LoraConfig as PeftConfig

    alpha: Any = settings.alpha  # declared as an integer there, and only divided
    return PeftConfig(
        r=settings.rank, lora_alpha=alpha, use_rslora=settings.rank_stabilised, bias="none",
        target_modules=sorted(modules), task_type="CAUSAL_LM",
    )  # fmt: skip


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its frozen weights alone do, as it does when it is measured."""
    training, layers = model.training, _layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    model.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(training)


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
