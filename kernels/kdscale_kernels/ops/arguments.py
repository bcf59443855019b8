"""Argument checks shared by the ops: ValueErrors that name the argument, what was expected and what came.

Checks of values (ids in range, NaN in the targets) read the data, which on an accelerator would wait for it; they are
made for CPU tensors only. Elsewhere targets that cannot be turn their loss into NaN (rows/teacher_entries.py), which a
training loop looks for anyway, and a bad id is the device's own index error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.rows.teacher_entries import TeacherEntries, prepare_entries
from kdscale_kernels.types import TopKLse, integer


class ValidRows(NamedTuple):
    """The rows that take part in a sparse loss."""

    index_M: Tensor  # which of the N rows
    labels_M: Tensor
    entries: TeacherEntries


def valid_rows(
    targets: Sequence[Any],
    labels_N: Tensor,
    ignore_index: int | None,
    vocab: int,
    temperature: float,
    dtype: torch.dtype,
    ce_weight_N: Tensor | None = None,
) -> ValidRows:
    """The rows that count (counted_rows), and their teacher entries in the accumulation dtype.

    targets: ids and logits [N,K], log-sum-exps [N], weights [N,K] or None; ce_weight_N: where rows have their own.
    Raises ValueError for values that cannot be used (see the module's note).
    """
    ids_NK, logits_NK, lse_N, weights_NK = targets
    index_M = counted_rows(labels_N, ignore_index)
    labels_M, ids_MK = labels_N[index_M].long(), ids_NK[index_M].long()
    logits_MK, lse_M = logits_NK[index_M].to(dtype), lse_N[index_M].to(dtype)
    weights_MK = None if weights_NK is None else weights_NK[index_M].to(dtype)
    check_target_values(ids_MK, logits_MK, lse_M, labels_M, vocab)
    check_weight_values(weights_MK, logits_MK)
    entries = prepare_entries(ids_MK, logits_MK, lse_M, vocab, temperature, weights_MK)
    if ids_MK.device.type == "cpu":
        _check_entries(entries, ids_MK, logits_MK, lse_M, temperature)
    if ce_weight_N is not None:
        entries = entries._replace(ce_weight_N=ce_weight_N[index_M].to(dtype))
    return ValidRows(index_M, labels_M, entries)


def counted_rows(labels_N: Tensor, ignore_index: int | None) -> Tensor:
    """Which rows count, [M]: those whose label is not ignore_index, for which this waits for the device; None: all."""
    if ignore_index is None:
        return torch.arange(labels_N.shape[0], device=labels_N.device)
    return (labels_N != integer("ignore_index", ignore_index)).nonzero()[:, 0]


def as_rows(**tensors: Any) -> list[Any]:
    """[shape of the rows, each argument as rows]: [B,S,H] becomes [B·S,H] and [B,S] becomes [B·S]; 2-D ones stay.

    The first argument has the shape of the rows and one more dimension; of the others, those named _N are numbers a
    row and have no further one. Raises ValueError for what is no tensor and for other shapes.
    """
    for name, tensor in tensors.items():
        if not (tensor is None and name in ("target_weights_NK", "ce_weight_N")):
            check_tensor(name, tensor)
    first = next(iter(tensors))
    shape = tensors[first].shape[:-1]
    if len(shape) < 2:  # the checks that follow name the shapes they expect
        return [shape, *tensors.values()]
    for name, tensor in tensors.items():
        wanted = [*shape, *([] if name.endswith("_N") else [name[-1]])]
        if tensor is not None and (tensor.dim() != len(wanted) or tensor.shape[: len(shape)] != shape):
            raise ValueError(f"{name}: expected {wanted} to match {first}, got {list(tensor.shape)}")
    return [shape, *(None if tensor is None else tensor.flatten(0, len(shape) - 1) for tensor in tensors.values())]


def in_shape(rows: TopKLse, shape: Sequence[int]) -> TopKLse:
    """What as_rows flattened, in the shape that it had."""
    return rows if len(shape) < 2 else TopKLse(*(field.unflatten(0, shape) for field in rows))


def check_tensor(name: str, value: object) -> None:
    """An argument is a tensor, and not the module that has it."""
    if not isinstance(value, Tensor):
        hint = "; pass its .weight" if isinstance(getattr(value, "weight", None), Tensor) else ""
        got = type(value).__name__
        raise ValueError(f"{name}: expected a tensor, got {got}{hint}")  # noqa: TRY004 - as every wrong argument here


def resolve_vocab(vocab_size: int | None, rows: int, what: str) -> int:
    """The number of vocabulary entries to use: the first vocab_size of `rows` (padding sits at the end)."""
    if vocab_size is None:
        return rows
    if not 1 <= integer("vocab_size", vocab_size) <= rows:
        raise ValueError(f"vocab_size: expected from 1 to the {rows} rows of {what}, got {vocab_size}")
    return vocab_size


def check_linear(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, prefix: str = "") -> None:
    """Hidden states, head and bias have matching shapes, floating dtypes and one device."""
    if bias_V is not None:
        check_tensor(f"{prefix}bias_V", bias_V)
    for name, tensor, shape in ((f"{prefix}hidden", hidden_NH, "[N, H]"), (f"{prefix}weight", weight_VH, "[V, H]")):
        check_tensor(name, tensor)
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating {shape}, got {tensor.dtype} {list(tensor.shape)}")
    if hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"{prefix}weight: expected [V, {hidden_NH.shape[1]}] to match {prefix}hidden, got {tuple(weight_VH.shape)}"
        )
    if weight_VH.shape[0] == 0:
        raise ValueError(f"{prefix}weight: expected at least one vocabulary row, got {tuple(weight_VH.shape)}")
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(f"{prefix}bias_V: expected [{weight_VH.shape[0]}], got {tuple(bias_V.shape)}")
    check_same_device(hidden_NH, weight_VH, *([] if bias_V is None else [bias_V]))


def check_two_models(hidden_NH: Tensor, teacher_hidden_NG: Tensor, labels_N: Tensor) -> None:
    """Both models' hidden states and the labels have the same rows, on one device."""
    rows = hidden_NH.shape[0]
    if teacher_hidden_NG.shape[0] != rows:
        raise ValueError(f"teacher_hidden: expected [{rows}, G] to match hidden, got {list(teacher_hidden_NG.shape)}")
    if labels_N.shape != (rows,) or labels_N.is_floating_point() or labels_N.dtype == torch.bool:
        raise ValueError(f"labels_N: expected integers [{rows}], got {labels_N.dtype} {list(labels_N.shape)}")
    check_same_device(hidden_NH, teacher_hidden_NG, labels_N)


def check_same_device(first: Tensor, *rest: Tensor) -> None:
    """All tensors are on one device."""
    for tensor in rest:
        if tensor.device != first.device:
            raise ValueError(f"expected all tensors on one device, got {first.device} and {tensor.device}")


def ce_weight_of_rows(ce_weight: float | Tensor) -> tuple[float, Tensor | None]:
    """The number of LossOptions, which says that both parts are needed, and the rows' own weights if there are any."""
    return (0.5, ce_weight.detach()) if isinstance(ce_weight, Tensor) else (ce_weight, None)


def check_ce_weights(ce_weight_N: Tensor | None, labels_N: Tensor) -> None:
    """One a row, floating, on the labels' device; on a CPU also that they are from 0 to 1."""
    if ce_weight_N is None:
        return
    if ce_weight_N.shape != labels_N.shape or not ce_weight_N.is_floating_point():
        got = f"{ce_weight_N.dtype} {list(ce_weight_N.shape)}"
        raise ValueError(f"ce_weight: expected a number, or a floating tensor {list(labels_N.shape)}, got {got}")
    check_same_device(labels_N, ce_weight_N)
    if ce_weight_N.device.type == "cpu" and not bool(((ce_weight_N >= 0) & (ce_weight_N <= 1)).all()):
        raise ValueError("ce_weight: expected values from 0 to 1, got others")


def check_targets(rows: int, targets: Sequence[Any], labels_N: Tensor, tail: str) -> None:
    """The teacher's entries (as in valid_rows) and the labels have matching shapes, the right dtypes and one device."""
    ids_NK, logits_NK, lse_N, weights_NK = targets
    if ids_NK.dim() != 2 or ids_NK.shape[0] != rows or ids_NK.shape[1] < 1:
        raise ValueError(f"ids_NK: expected [{rows}, K] with K >= 1, got {tuple(ids_NK.shape)}")
    for name, tensor, shape in (
        ("teacher_logits_NK", logits_NK, tuple(ids_NK.shape)),
        ("teacher_lse_N", lse_N, (rows,)),
        ("labels_N", labels_N, (rows,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    for name, tensor in (("ids_NK", ids_NK), ("labels_N", labels_N)):
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"{name}: expected an integer tensor, got {tensor.dtype}")
    for name, tensor in (("teacher_logits_NK", logits_NK), ("teacher_lse_N", lse_N)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating tensor, got {tensor.dtype}")
    check_same_device(ids_NK, logits_NK, lse_N, labels_N)
    _check_weights(ids_NK, weights_NK, tail)


def _check_weights(ids_NK: Tensor, weights_NK: Tensor | None, tail: str) -> None:
    """Sampled targets come with weights [N,K], others without."""
    if (weights_NK is not None) != (tail == "sampled"):
        got = "none" if weights_NK is None else f"some with tail={tail!r}"
        raise ValueError(f"target_weights_NK: expected with tail='sampled' and only then, got {got}")
    if weights_NK is None:
        return
    if weights_NK.shape != ids_NK.shape or not weights_NK.is_floating_point():
        raise ValueError(
            f"target_weights_NK: expected a floating {list(ids_NK.shape)}, "
            f"got {weights_NK.dtype} {list(weights_NK.shape)}"
        )
    check_same_device(ids_NK, weights_NK)


def check_weight_values(weights_NK: Tensor | None, logits_NK: Tensor) -> None:
    """Weights of used slots in valid rows are finite, not negative and not all zero; on a CPU only."""
    if weights_NK is None or weights_NK.device.type != "cpu":
        return
    used_NK = weights_NK.masked_fill(logits_NK == float("-inf"), 0.0)
    broken_N = ~(used_NK.isfinite() & (used_NK >= 0.0)).all(1) | (used_NK.sum(1) == 0.0)
    if bool(broken_N.any()):
        row = int(broken_N.nonzero()[0, 0])
        raise ValueError(
            f"target_weights_NK: expected finite weights of 0 or more, not all 0, got valid row {row}: "
            f"{weights_NK[row].tolist()[:8]}"
        )


def check_target_values(ids_NK: Tensor, logits_NK: Tensor, lse_N: Tensor, labels_N: Tensor, vocab: int) -> None:
    """Teacher entries and labels of valid rows can be used; on a CPU only."""
    if ids_NK.device.type != "cpu":
        return
    used_NK = logits_NK != float("-inf")
    broken_N = logits_NK.isnan().any(1) | (logits_NK == float("inf")).any(1) | ~lse_N.isfinite() | ~used_NK.any(1)
    if bool(broken_N.any()):
        row = int(broken_N.nonzero()[0, 0])
        raise ValueError(
            f"teacher targets: expected finite values, got NaN, +inf or no usable entry in {int(broken_N.sum())} of "
            f"{broken_N.numel()} valid rows (first: valid row {row}, log-sum-exp {float(lse_N[row])}); "
            "the teacher's forward pass overflowed or its weights are damaged"
        )
    outside_NK = used_NK & ((ids_NK < 0) | (ids_NK >= vocab))
    if bool(outside_NK.any()):
        raise ValueError(
            f"ids_NK: expected ids from 0 to {vocab - 1}, got {int(ids_NK[outside_NK][0])}; "
            "give both sides the same vocab_size when their vocabularies are padded differently"
        )
    check_label_values(labels_N, vocab)


def _check_entries(
    entries: TeacherEntries, ids_NK: Tensor, logits_NK: Tensor, lse_N: Tensor, temperature: float
) -> None:
    """prepare_entries made no row of finite numbers NaN. Else a ValueError says what is wrong with the first one."""
    broken_N = entries.logp_NK[:, 0].isnan()
    if not bool(broken_N.any()):
        return
    row = int(broken_N.nonzero()[0, 0])
    ids = ids_NK[row].masked_fill(logits_NK[row] == float("-inf"), -1)
    for repeated in ids[ids >= 0].unique().tolist():
        logits = logits_NK[row][ids == repeated].unique().tolist()
        if len(logits) > 1:
            raise ValueError(
                f"ids_NK: expected one logit an id, got {logits[:2]} for id {repeated} in valid row {row}; "
                "for ids drawn with repeats use tail='sampled' with target_weights_NK"
            )
    raise ValueError(
        f"teacher_lse_N: expected the log-sum-exp of all logits / temperature, got {float(lse_N[row])} in valid row "
        f"{row}, below that of its entries ({float(torch.logsumexp(logits_NK[row] / temperature, 0))} at temperature "
        f"{temperature}); give both calls the same temperature"
    )


def check_label_values(labels_N: Tensor, vocab: int) -> None:
    """Labels of valid rows lie in the vocabulary; on a CPU only."""
    bad_N = (labels_N < 0) | (labels_N >= vocab)
    if labels_N.device.type == "cpu" and bool(bad_N.any()):
        raise ValueError(f"labels_N: expected ids from 0 to {vocab - 1} or ignore_index, got {int(labels_N[bad_N][0])}")
