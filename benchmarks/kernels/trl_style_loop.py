"""Distillation in somebody else's loop: kdscale_kernels and transformers only, tiny random models, seconds on a CPU.

Run from the repository:  PYTHONPATH=kernels python benchmarks/kernels/trl_style_loop.py [--trainer] [--steps 30]

Legend: B sequences, S positions, N = B·S, H hidden size. The three lines stand by themselves in Distiller.forward; all
else is what any loop has. They sit in a module's forward so that DDP and DeepSpeed ZeRO see the head being used (for
ZeRO-3 give the head a forward of its own that takes the targets: it is gathered there).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from kdscale_kernels import linear_sparse_kl, linear_topk_lse

VOCAB, BATCH, LENGTH = 512, 4, 32


class Distiller(nn.Module):
    """A student with its loss: forward(input_ids, labels) → {"loss"}, as transformers' Trainer and TRL's expect it."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.student = student
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: no parameters of this module

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **_: Any
    ) -> dict[str, Tensor]:
        (teacher,) = self._teacher
        with torch.no_grad():
            teacher_BSH = teacher.model(input_ids).last_hidden_state
        student_BSH = self.student.model(input_ids).last_hidden_state
        labels_N = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # position t is scored on token t + 1

        targets = linear_topk_lse(teacher_BSH.flatten(0, 1), teacher.lm_head.weight, k=32)
        head_VH = self.student.lm_head.weight
        sums = linear_sparse_kl(student_BSH.flatten(0, 1), head_VH, *targets, labels_N=labels_N, ce_weight=0.1)

        # A sum over the tokens of all micro-batches and ranks: Trainer hands it in, else it is this batch's.
        return {"loss": sums.loss_sum / (sums.tokens if num_items_in_batch is None else num_items_in_batch)}


def tiny_model(hidden: int, layers: int, seed: int) -> PreTrainedModel:
    """A random Llama of a few thousand parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def batches(steps: int) -> Iterator[dict[str, Tensor]]:
    """Endless variations of a few token sequences, so that there is something to learn within a few steps."""
    gen = torch.Generator().manual_seed(0)
    texts_TS = torch.randint(1, VOCAB, (8, LENGTH), generator=gen)
    for _ in range(steps):
        ids_BS = texts_TS[torch.randint(0, len(texts_TS), (BATCH,), generator=gen)]
        labels_BS = ids_BS.clone()
        labels_BS[:, :4] = -100  # a prompt: no loss on it
        yield {"input_ids": ids_BS, "labels": labels_BS}


def plain_loop(distiller: Distiller, steps: int) -> list[float]:
    """The hand-written loop."""
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-3)
    losses = []
    for batch in batches(steps):
        loss = distiller(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trainer_loop(distiller: Distiller, steps: int) -> list[float]:
    """The same under transformers' Trainer, on which TRL's are built."""
    rows = [{"input_ids": i, "labels": y} for b in batches(steps) for i, y in zip(*b.values(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH // 2,
            gradient_accumulation_steps=2,
            max_steps=steps,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=distiller, args=arguments, train_dataset=rows)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trainer", action="store_true", help="run under transformers.Trainer")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args(argv)
    distiller = Distiller(student=tiny_model(48, 2, seed=1), teacher=tiny_model(64, 3, seed=0))
    losses = (trainer_loop if arguments.trainer else plain_loop)(distiller, arguments.steps)
    print(f"loss a token: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at step {len(losses)}")
    return losses


if __name__ == "__main__":
    main()
