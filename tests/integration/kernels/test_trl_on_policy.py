"""benchmarks/distill/trl_on_policy.py: its losses against TRL's formula, what it writes, and a round where trl is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 320


@pytest.fixture(scope="module")
def bench(load_script: Callable[[str], Any]) -> Any:
    return load_script("trl_on_policy")


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.2, tie_word_embeddings=True, **sizes)
    )


def test_what_is_written_is_scored_by_the_reverse_kl_that_gkd_trains_on(bench: Any) -> None:
    student, teacher = model(1), model(0)
    prompts_BS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    ids_BS, mask_BS, labels_BS = bench.Writer(7, VOCAB)(student, {"prompts": prompts_BS}, None)
    assert ids_BS.shape == (2, 12) and torch.equal(ids_BS[:, :5], prompts_BS) and bool(mask_BS.all())
    assert (labels_BS[:, :5] == -100).all() and torch.equal(labels_BS[:, 5:], ids_BS[:, 5:])
    batch = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
    with torch.no_grad():
        logq, logp = (m(ids_BS).logits[:, :-1].log_softmax(-1) for m in (student, teacher))
    kl = (logq.exp() * (logq - logp)).sum(-1)[labels_BS[:, 1:] != -100].sum()
    torch.testing.assert_close(bench.full_loss(student, teacher, batch).detach(), kl, rtol=1e-4, atol=0)
    assert 0.0 < float(bench.top_k_loss(student, teacher, batch).detach()) < float(kl)


@pytest.mark.slow
def test_a_step_of_each_contestant(bench: Any, tiny_tokenizer_file: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_tokenizer_file), eos_token="<|end|>", pad_token="<|end|>"
    )
    teacher, prompts_BS = model(0).eval().requires_grad_(False), torch.tensor([[1, 2, 3], [4, 5, 6]])
    args, answers_BT = Namespace(batch=2, new_tokens=4, lr=1e-3), torch.tensor([[7, 8, 9, 1], [3, 2, 1, 4]])
    losses = {}
    for name in (bench.TRL, bench.OURS):
        contestant = bench.Contestant(name, model(1), teacher, tokenizer, args)
        losses[name] = contestant.loss_on(prompts_BS, answers_BT)
        assert contestant.step(prompts_BS).loss > 0
    assert losses[bench.OURS] == pytest.approx(losses[bench.TRL], rel=1e-4)
