"""Tokenising in several processes: the same tokens in the same order, and a dead process is an error."""

from __future__ import annotations

import multiprocessing.spawn
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdscale.data.encoder_processes import EncoderProcesses
from kdscale.errors import MachineError
from kdscale.models.tokenizer.tokenizing import BatchEncoder


def test_processes_give_what_one_gives_in_order(tokenizer: Any, tiny_texts: list[str]):
    encoder = BatchEncoder.of(tokenizer)
    batches = [tiny_texts[i : i + 1 + i % 4] for i in range(0, 60, 2)]
    with EncoderProcesses(encoder, 2) as encoders:
        results = list(encoders.encode(batches, lambda batch: batch))
        again = list(encoders.encode(batches[:1], lambda batch: batch))
    assert [batch for batch, _ in results] == batches
    assert np.array_equal(again[0][1][0].ids, results[0][1][0].ids)
    for batch, encoded in results:
        for expected, got in zip(encoder.encode(batch), encoded, strict=True):
            assert np.array_equal(expected.ids, got.ids)
            assert np.array_equal(expected.bytes, got.bytes)


def test_a_process_that_dies_is_an_error(tokenizer: Any):
    with (
        EncoderProcesses(BatchEncoder.of(tokenizer), 2) as encoders,
        pytest.raises(MachineError, match=r"has died(.|\n)*data.processes"),
    ):
        list(encoders.encode([["fine"], [7]], lambda batch: batch))  # 7 is no text: the worker fails


def test_a_process_that_never_comes_up_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """Also with a tokenizer of more than a pipe holds."""
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", b"/bin/false")
    with pytest.raises(MachineError, match="has died"):
        EncoderProcesses(BatchEncoder(b"x" * 4_000_000), 2)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _of_tokenizers() -> set[int]:
    """Workers started by this process; multiprocessing has a child of its own."""
    return {pid for pid in _children(os.getpid()) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_one_process_loads_the_tokenizer_and_the_others_share_its_memory(tokenizer: Any, tiny_texts: list[str]):
    encoder, before = BatchEncoder.of(tokenizer), _of_tokenizers()
    with EncoderProcesses(encoder, 3) as encoders:
        assert len(list(encoders.encode([tiny_texts] * 4, lambda batch: batch))) == 4
        (first,) = _of_tokenizers() - before
        forked = _children(first)
        assert len(forked) == 2
    assert "_tokenizer" not in vars(encoder), "a copy that nobody here uses"
    assert not any(Path(f"/proc/{pid}").exists() for pid in (first, *forked))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [0, 1])
def test_any_of_the_processes_may_be_killed(tokenizer: Any, tiny_texts: list[str], number: int):
    before = _of_tokenizers()
    with EncoderProcesses(BatchEncoder.of(tokenizer), 2) as encoders, pytest.raises(MachineError, match="has died"):
        list(encoders.encode([tiny_texts] * 2, lambda batch: batch))
        (first,) = _of_tokenizers() - before
        os.kill([first, *_children(first)][number], signal.SIGKILL)
        list(encoders.encode([tiny_texts] * 4, lambda batch: batch))
