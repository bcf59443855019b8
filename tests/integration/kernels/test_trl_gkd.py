"""benchmarks/distill/trl_gkd.py: its losses against TRL's formula, its table, and a round of it where trl is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 320


@pytest.fixture(scope="module")
def bench(load_script: Callable[[str], Any]) -> Any:
    return load_script("trl_gkd")


def model(seed: int, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )


def inputs() -> dict[str, torch.Tensor]:
    ids_BS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    labels_BS = ids_BS.clone()
    labels_BS[0, :5] = -100
    return {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": torch.ones_like(ids_BS)}


@pytest.mark.parametrize("k", [None, VOCAB, 16])
def test_losses_are_the_forward_kl_that_gkd_trains_on(bench: Any, k: int | None) -> None:
    """k entries: the whole vocabulary gives the same, fewer give less (their tail is one bucket)."""
    student, teacher, batch = model(1), model(0), inputs()
    with torch.no_grad():
        logq, logp = (m(batch["input_ids"]).logits[:, :-1].log_softmax(-1) for m in (student, teacher))
    kl = (logp.exp() * (logp - logq)).sum(-1)[batch["labels"][:, 1:] != -100].sum()
    found = bench.full_loss(student, teacher, batch) if k is None else bench.top_k_loss(student, teacher, batch, k)
    found.backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())
    ratio = float(found.detach() / kl)
    assert ratio == pytest.approx(1.0, rel=1e-4) if k != 16 else 0.0 < ratio < 0.999


def test_the_default_student_is_every_second_layer_and_runs_with_a_cache(bench: Any) -> None:
    teacher = model(0).eval()
    student = bench.half_as_deep(teacher)
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, teacher.model.layers[2].mlp.up_proj.weight)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert student.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_the_table_compares_steps_of_one_round(bench: Any) -> None:
    ours = "with kdscale's top-64 loss"
    spent = {
        bench.TRL: [bench.Spent(2.0, 4.0, 3.5), bench.Spent(20.0, 4.0, 3.4), bench.Spent(2.0, 4.0, 3.3)],
        ours: [bench.Spent(1.0, 1.0, 3.4), bench.Spent(10.0, 1.0, 3.3), bench.Spent(1.0, 1.0, 3.2)],
    }
    *_, base, mine = bench.table(spent, {ours: 0.25}, 512)
    assert base == f"| {bench.TRL} | 256 | 1.00 | 1.00 | - | 3.5000 | 3.3000 |"
    assert mine == f"| {ours} | 512 | 2.00 | 4.00 | 0.25 GiB | 3.4000 | 3.2000 |"


def test_text_is_packed_and_too_little_of_it_is_said(bench: Any, tmp_path: Path) -> None:
    class Words:
        eos_token_id = 9

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("1 2 3", "4", "5 6")), encoding="utf-8")
    assert bench.packed(path, Words(), 4, 2).tolist() == [[1, 2, 3, 9], [4, 9, 5, 6]]
    with pytest.raises(SystemExit, match="expected 12 tokens, got 9"):
        bench.packed(path, Words(), 4, 3)


@pytest.mark.slow
def test_a_step_of_each_contestant(bench: Any, tiny_tokenizer_file: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_tokenizer_file), eos_token="<|end|>", pad_token="<|end|>"
    )
    teacher = model(0).eval().requires_grad_(False)
    found = {}
    for name, loss in bench.losses(VOCAB).items():
        contestant = bench.Contestant(model(1), teacher, loss, tokenizer, lr=1e-3)
        found[name] = [contestant.step(inputs()["input_ids"]) for _ in range(3)]
    want = found.pop(bench.TRL)
    assert want[2] < want[0]
    assert all(losses == pytest.approx(want, rel=1e-3) for losses in found.values())
