"""The messages between the teacher service and the ranks that ask it: safetensors bytes, nothing executable.

B sequences, S positions, N rows asked for, K entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kdscale.errors import ServiceError
from kdscale.teacher.targets import TopKTargets

# Token ids and positions are below 2³¹ in every model, and this takes half the bytes of torch's int64.
_INT = torch.int32


class Question(NamedTuple):
    """A batch, and the flat positions `rows_N` of it whose targets are wanted."""

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    rows_N: torch.Tensor

    def encode(self) -> bytes:
        """The body of a request."""
        return save({name: tensor.to("cpu", _INT).contiguous() for name, tensor in self._asdict().items()})

    @classmethod
    def decode(cls, body: bytes, *, vocab_size: int, max_positions: int, max_tokens: int, max_length: int) -> Question:
        """Read a request and check everything that a forward relies on, and what it costs. Raises ServiceError.

        `max_length`: of a sequence, because a forward takes memory and time that grow with its square.
        """
        tensors = _load(body, cls._fields, dict.fromkeys(cls._fields, _INT))
        ids_BS, positions_BS, rows_N = (tensors[name].long() for name in cls._fields)
        if ids_BS.ndim != 2 or positions_BS.shape != ids_BS.shape or rows_N.ndim != 1 or ids_BS.numel() == 0:
            shapes = ", ".join(str(tuple(tensors[name].shape)) for name in cls._fields)
            raise ServiceError("a question to the teacher", expected="shapes [B, S], [B, S], [N]", got=shapes)
        if ids_BS.numel() > max_tokens:
            raise ServiceError(
                "a question to the teacher",
                expected=f"at most {max_tokens} tokens",
                got=str(ids_BS.numel()),
                hint="a smaller distill.micro_batch, or start the service with a larger --max-tokens",
            )
        if ids_BS.shape[1] > max_length:
            raise ServiceError(
                "a question to the teacher",
                expected=f"sequences of at most {max_length} tokens",
                got=str(ids_BS.shape[1]),
                hint="start the service with this run's config, or with a larger --max-length",
            )
        if len(rows_N) != len(rows_N.unique()):
            raise ServiceError("a question to the teacher", expected="each row once", got="rows that repeat")
        _check_range("input_ids_BS", ids_BS, vocab_size)
        _check_range("position_ids_BS", positions_BS, max_positions)
        _check_range("rows_N", rows_N, ids_BS.numel())
        return cls(ids_BS, positions_BS, rows_N)


def encode_targets(targets: TopKTargets) -> bytes:
    """The body of an answer: ids as int32, logits and log-sum-exp bit for bit."""
    tensors = {
        "ids_NK": targets.ids_NK.to("cpu", _INT),
        "logits_NK": targets.logits_NK.cpu(),
        "lse_N": targets.lse_N.cpu(),
    }
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def decode_targets(body: bytes, *, rows: int, temperature: float, vocab_size: int, top_k: int) -> TopKTargets:
    """Read an answer of `rows` rows, on the CPU. Raises ServiceError when it is not what was asked for."""
    dtypes = {"ids_NK": _INT, "logits_NK": torch.float32, "lse_N": torch.float32}
    tensors = _load(body, tuple(dtypes), dtypes)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"ids_NK": (rows, top_k), "logits_NK": (rows, top_k), "lse_N": (rows,)}
    if shapes != expected:
        raise ServiceError("an answer of the teacher service", expected=str(expected), got=str(shapes))
    _check_range("ids_NK", tensors["ids_NK"], vocab_size)
    return TopKTargets(tensors["ids_NK"].long(), tensors["logits_NK"], tensors["lse_N"], temperature, vocab_size)


def _load(body: bytes, names: tuple[str, ...], dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    try:
        tensors = load(body)
    except SafetensorError as error:
        raise ServiceError("a message of the teacher service", expected="safetensors bytes", got=str(error)) from error
    received = {name: tensor.dtype for name, tensor in tensors.items()}
    if received != {name: dtypes[name] for name in names}:
        raise ServiceError("a message of the teacher service", expected=str(dtypes), got=str(received))
    return tensors


def _check_range(name: str, tensor: torch.Tensor, stop: int) -> None:
    if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < stop):
        low, high = int(tensor.min()), int(tensor.max())
        raise ServiceError(f"{name} of a message", expected=f"0 to {stop - 1}", got=f"{low} to {high}")
