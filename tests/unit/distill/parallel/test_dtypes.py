"""Number formats: agreed on by all ranks, said where they are slow, kept by DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdscale.distill.parallel import dtypes
from kdscale.errors import SelfCheckError

GPU = torch.device("cuda", 0)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)
        self.register_buffer("positions", torch.arange(4))


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_buffer_that_was_rounded_is_named(whose: str) -> None:
    models = {"teacher": Rotary(), "student": Rotary()}
    before = dtypes.buffer_dtypes(**models)
    assert before == {"teacher: inv_freq": torch.float32, "student: inv_freq": torch.float32}
    dtypes.check_buffers_kept(before, dtypes.buffer_dtypes(**models))
    models[whose].bfloat16()
    with pytest.raises(SelfCheckError, match=rf"{whose}: inv_freq(.|\n)*float32(.|\n)*bfloat16"):
        dtypes.check_buffers_kept(before, dtypes.buffer_dtypes(**models))


@pytest.mark.parametrize(
    ("asked", "own", "least", "agreed"),
    [
        ("auto", torch.bfloat16, 0, torch.float32),  # another rank's GPU cannot
        ("auto", torch.bfloat16, 1, torch.bfloat16),
        ("bfloat16", torch.bfloat16, 0, torch.bfloat16),
    ],
)
def test_auto_is_one_dtype_for_all_ranks(
    monkeypatch: pytest.MonkeyPatch, asked: str, own: torch.dtype, least: int, agreed: torch.dtype
) -> None:
    monkeypatch.setattr(dtypes, "resolve_dtype", lambda *_: own)
    monkeypatch.setattr(dtypes, "all_reduce_min", lambda value: min(value, least))
    assert dtypes.agreed_dtype(asked, torch.device("cpu")) == agreed


@pytest.mark.parametrize(
    ("major", "fp32_results", "dtype", "said"),
    [
        (9, True, torch.bfloat16, []),
        (7, True, torch.float32, ["V100 does not multiply bfloat16 in hardware: it is used in float32"]),
        (7, True, torch.bfloat16, ["V100 does not multiply bfloat16 in hardware: it emulates bfloat16, slowly"]),
        (9, False, torch.bfloat16, ["cannot multiply bfloat16 into float32 on a GPU"]),
        (9, False, torch.float32, []),
    ],
)
def test_slow_products_are_said(
    monkeypatch: pytest.MonkeyPatch, major: int, fp32_results: bool, dtype: torch.dtype, said: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "V100")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dtypes, "gives_fp32_results", lambda: fp32_results)
    notices = dtypes.slow_products(GPU, dtype)
    assert len(notices) == len(said)
    assert all(text in notice for text, notice in zip(said, notices, strict=True))
    assert dtypes.slow_products(torch.device("cpu"), dtype) == []
