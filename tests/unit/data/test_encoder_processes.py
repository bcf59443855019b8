"""Tokenising in several processes: the same tokens in the same order, and a dead process is an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdscale.data.encoder_processes import EncoderProcesses
from kdscale.data.tokenizing import BatchEncoder
from kdscale.errors import MachineError


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
