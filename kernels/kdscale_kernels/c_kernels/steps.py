"""The row steps in torch, with those on bf16 logits in C (bf16_rows.c), for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.c_kernels.library import library
from kdscale_kernels.rows.results import Candidates, TailSums
from kdscale_kernels.rows.torch_steps import TorchRowSteps


class CompiledBf16Steps:
    """On as many threads as torch would use."""

    leaves_softmaxes = False

    def dots(self, hidden_CH: Tensor, weight_VH: Tensor, ids_CK: Tensor) -> Tensor:
        """See Bf16Steps.dots."""
        out_CK = hidden_CH.new_empty(ids_CK.shape, dtype=torch.float32)
        hidden_CH, weight_VH, ids_CK = hidden_CH.contiguous(), weight_VH.contiguous(), ids_CK.contiguous()
        addresses = (hidden_CH.data_ptr(), weight_VH.data_ptr(), ids_CK.data_ptr())
        library().dots(*addresses, *ids_CK.shape, hidden_CH.shape[1], out_CK.data_ptr(), torch.get_num_threads())
        return out_CK

    def exponentials(self, z_CV: Tensor, plain_CV: Tensor | None, temperature: float) -> TailSums:
        """See Bf16Steps.exponentials."""
        sums = TailSums(*z_CV.new_empty((3, len(z_CV)), dtype=torch.float32).unbind())
        plain = None if plain_CV is None else _address(plain_CV)
        places = (field.data_ptr() for field in sums)
        library().exponentials(_address(z_CV), plain, *z_CV.shape, temperature, *places, torch.get_num_threads())
        return sums

    def scale(
        self, first_CV: Tensor, factor_C: Tensor, second_CV: Tensor | None = None, other_C: Tensor | None = None
    ) -> None:
        """See Bf16Steps.scale."""
        second = None if second_CV is None else _address(second_CV)
        factors_C = [None if f is None else f.float().contiguous() for f in (factor_C, other_C)]
        factors = [None if f is None else f.data_ptr() for f in factors_C]
        library().scale(_address(first_CV), second, *first_CV.shape, *factors, torch.get_num_threads())

    def candidates(self, z_CV: Tensor, count: int, temperature: float) -> Candidates:
        """See Bf16Steps.candidates."""
        rows = len(z_CV)
        ids_CM = torch.empty(rows, count, dtype=torch.int64)
        lowest_C, others_C = torch.empty(2, rows, dtype=torch.float32).unbind()
        places = (ids_CM.data_ptr(), lowest_C.data_ptr(), others_C.data_ptr())
        threads = torch.get_num_threads()
        if library().candidates(_address(z_CV), *z_CV.shape, count, temperature, *places, threads):
            raise MemoryError(f"no memory to search {count} of {z_CV.shape[1]} logits on {threads} threads")
        return Candidates(ids_CM, ids_CM[:, -1], lowest_C, others_C)


class CompiledRowSteps(TorchRowSteps):
    """Everything but the steps on bf16 logits is torch's. Where `library` raises, those do."""

    def __init__(self) -> None:
        self.bf16_steps = CompiledBf16Steps()


def _address(tensor: Tensor) -> int:
    """Of a contiguous bf16 array, which the steps read and write where it lies."""
    assert tensor.is_contiguous() and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
    return tensor.data_ptr()
