"""What travels between ranks and a served teacher: the bits that were sent, and nothing that was not checked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from kdscale.errors import ServiceError
from kdscale.teacher.messages import Question, decode_targets, encode_targets
from kdscale.teacher.targets import TopKTargets

_LIMITS = {"vocab_size": 50, "max_positions": 16, "max_tokens": 64, "max_length": 14}


def _question(**changed: torch.Tensor) -> Question:
    tensors = {
        "input_ids_BS": torch.tensor([[1, 2, 3], [4, 5, 49]]),
        "position_ids_BS": torch.tensor([[0, 1, 2], [0, 0, 1]]),
        "rows_N": torch.tensor([0, 5]),
    }
    return Question(**{**tensors, **changed})


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_a_question_arrives_as_it_was_sent(sequences: int, positions: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (sequences, positions), generator=made)
    rows = torch.randperm(ids.numel(), generator=made)[: ids.numel() // 2]
    sent = Question(ids, torch.arange(positions).expand_as(ids), rows)
    got = Question.decode(sent.encode(), **_LIMITS)
    assert all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids_BS": torch.tensor([[1, 2, 3], [4, 5, 50]])}, "0 to 49"),
        ({"input_ids_BS": torch.tensor([[1, 2, 3], [4, 5, -1]])}, "-1 to"),
        ({"position_ids_BS": torch.tensor([[0, 1, 2], [0, 0, 16]])}, "0 to 15"),
        ({"rows_N": torch.tensor([6])}, "0 to 5"),
        ({"position_ids_BS": torch.tensor([[0, 1, 2]])}, r"\[B, S\]"),
        ({"input_ids_BS": torch.zeros(0, 3), "position_ids_BS": torch.zeros(0, 3)}, r"\[B, S\]"),
        ({"rows_N": torch.tensor([2, 0, 2])}, "each row once"),
        ({"input_ids_BS": torch.zeros(1, 15), "position_ids_BS": torch.zeros(1, 15)}, "at most 14 tokens"),
        ({"input_ids_BS": torch.zeros(5, 13), "position_ids_BS": torch.zeros(5, 13)}, "at most 64"),
    ],
)
def test_a_question_that_a_forward_cannot_take_is_refused(changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        Question.decode(_question(**changed).encode(), **_LIMITS)


@pytest.mark.parametrize(
    "body", [b"", b"\xff" * 40, save({"input_ids_BS": torch.zeros(1, 1)}), _question().encode()[:-1]]
)
def test_bytes_that_are_no_question_are_refused(body: bytes) -> None:
    with pytest.raises(ServiceError):
        Question.decode(body, **_LIMITS)


def _targets(rows: int = 3) -> TopKTargets:
    made = torch.Generator().manual_seed(1)
    logits_NK = torch.randn(rows, 4, generator=made)
    return TopKTargets(torch.randint(0, 50, (rows, 4), generator=made), logits_NK, logits_NK.logsumexp(1), 2.0, 50)


def test_targets_arrive_with_the_bits_that_were_computed() -> None:
    sent = _targets()
    got = decode_targets(encode_targets(sent), rows=3, temperature=2.0, vocab_size=50, top_k=4)
    for name in ("ids_NK", "logits_NK", "lse_N"):
        assert torch.equal(getattr(got, name), getattr(sent, name))
    assert got.ids_NK.dtype == torch.int64


def test_targets_of_another_question_are_refused() -> None:
    body = encode_targets(_targets())
    with pytest.raises(ServiceError, match="lse_N"):
        decode_targets(body, rows=2, temperature=2.0, vocab_size=50, top_k=4)
    with pytest.raises(ServiceError, match="0 to 3"):
        decode_targets(body, rows=3, temperature=2.0, vocab_size=4, top_k=4)
