"""Who writes with the student's weights: this rank itself, through a plain model around the very same tensors.

The model that is trained has hooks, an attention of its own and perhaps compiled layers, none of which can decode with
a cache. So the rank builds the model of the student's folder once more, without weights, and lends it the student's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from kdscale.config.distill.lora import LoraConfig
from kdscale.config.distill.optimizer import FakeQuantizeConfig
from kdscale.distill.layers.fake_quantize import fake_quantize
from kdscale.distill.parallel.checks import check_lora
from kdscale.distill.parallel.zero3_loading import whole_parameters
from kdscale.errors import CheckpointError
from kdscale.models.generation.drawing import Drawing, Drawn, draw_answers
from kdscale.models.loading import model_on_meta
from kdscale.models.lora.adapters import add_adapters
from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import move_buffers


class Asked(NamedTuple):
    """A prompt to go on from; `seed` chooses what is drawn."""

    ids: list[int]
    seed: str

    @property
    def number(self) -> int:
        """The seed as a number below 2⁶³."""
        return int.from_bytes(hashlib.sha256(self.seed.encode()).digest()[:8], "big") >> 1


class Writer(Protocol):
    """Goes on from prompts."""

    at_once: int  # how many prompts it likes to be given together
    whole_batches: bool  # whether the other prompts of a batch change an answer's last bits

    def weights(self) -> AbstractContextManager[None]:
        """Within the block the student as it is now writes. A collective call."""

    def write(self, asked: Sequence[Asked]) -> list[Drawn | None]:
        """What follows each; None where it was stopped by a signal before that was there."""

    def close(self) -> None:
        """Free what it holds."""


class LocalWriter:
    """Writes on this rank's device."""

    whole_batches = True

    def __init__(
        self, student: nn.Module, folder: Path, drawing: Drawing, at_once: int, *, device: torch.device,
        dtype: torch.dtype, grid: FakeQuantizeConfig | None, lora: LoraConfig | None, trust_remote_code: bool,
    ):  # fmt: skip
        """`student` is the model that is trained, of `folder`'s files; `grid`: distill.fake_quantize."""
        self.at_once, self._student, self._drawing = at_once, student, drawing
        self._folder, self._device, self._dtype = folder, device, dtype
        self._grid, self._lora, self._trust = grid, lora, trust_remote_code
        self._lent: _LentModel | None = None

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Lend the student's weights for the block, gathered where ranks share them."""
        if self._lent is None:
            self._lent = _LentModel(self._build())
        with whole_parameters(self._student) as parameters, self._lent.borrowing(parameters):
            yield

    def write(self, asked: Sequence[Asked]) -> list[Drawn | None]:
        """One batch."""
        assert self._lent is not None
        uniforms_BT = torch.stack([uniforms_of(one, self._drawing.new_tokens) for one in asked])
        prompts = [one.ids for one in asked]
        return [*draw_answers(self._lent.model, prompts, uniforms_BT, self._drawing)]

    def close(self) -> None:
        """Let the model go."""
        self._lent = None

    def _build(self) -> Any:
        model: Any = model_on_meta(self._folder, dtype=self._dtype, trust_remote_code=self._trust)
        model.tie_weights()
        if self._grid is not None:
            fake_quantize(model, self._grid, ParameterReader.open(self._folder).linear_maps())
        if self._lora is not None:
            add_adapters(model, self._lora, check_lora(self._lora, self._folder), seed=0)
        move_buffers(model, self._device)
        return model.eval()


def uniforms_of(asked: Asked, tokens: int) -> torch.Tensor:
    """Random numbers [tokens] in [0, 1), fp64, on the CPU."""
    generator = torch.Generator().manual_seed(asked.number)
    return torch.rand(tokens, generator=generator, dtype=torch.float64)


class _LentModel:
    """A model on the meta device that borrows its parameters."""

    def __init__(self, model: Any):
        self.model = model
        names = {id(value): name for name, value in model.named_parameters()}
        self._places = [
            (module, attribute, names[id(value)], value)
            for module in model.modules()
            for attribute, value in module._parameters.items()
            if value is not None
        ]

    @contextmanager
    def borrowing(self, parameters: dict[str, torch.Tensor]) -> Iterator[None]:
        """Within the block its parameters are these, by name. Raises CheckpointError where the names differ."""
        if wrong := sorted({name for _, _, name, _ in self._places} ^ set(parameters)):
            raise CheckpointError("the student's parameters", expected="those of its folder", got=", ".join(wrong[:8]))
        lent = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
        try:
            for module, attribute, name, _ in self._places:
                module._parameters[attribute] = lent[name]
            yield
        finally:
            for module, attribute, _, own in self._places:
                module._parameters[attribute] = own
