"""One teacher, one student, on-policy: TRL's GKDTrainer against itself with kdscale's writing and loss.

    PYTHONPATH=.:kernels:launch OMP_NUM_THREADS=1 python benchmarks/distill/trl_on_policy.py --teacher FOLDER \
        --text docs.jsonl.gz

Every contestant is a GKDTrainer that is fully on-policy (lmbda 1, beta 1: reverse KL, T = 1), with a student and an
AdamW of its own; the teacher is shared. They go on from the same prompts with the same number of tokens: no token ends
an answer. First both compute their loss on the very same tokens, which must agree; then they take turns, each with what
it writes itself. Ratios compare steps of one round. --student names a folder (`kdscale prune` writes one); without it
the student is every second layer of the teacher. Needs `pip install trl` (tested with 1.16, which has GKDTrainer under
trl.experimental.gkd).

Legend: B prompts, S positions, N rows, H hidden size, T new tokens.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl_gkd import TRL, _head, _hidden, half_as_deep, packed

from kdscale.models.generation.drawing import Drawing, draw_answers
from kdscale_kernels import linear_full_kl, linear_sparse_kl, linear_topk_lse

Inputs = dict[str, Tensor]
OURS = "with kdscale's writing and full-vocabulary loss"
TOP_K = "with kdscale's writing and top-64 loss"


class Writer:
    """Stands in for GKDTrainer.generate_on_policy_outputs: another row of random numbers for each prompt and step."""

    def __init__(self, new_tokens: int, vocab: int):
        self._drawing = Drawing(new_tokens, 1.0, 1.0, vocab, end_ids=(), pad_id=0)
        self._random = torch.Generator().manual_seed(0)

    def __call__(self, model: PreTrainedModel, inputs: Inputs, _: Any) -> tuple[Tensor, Tensor, Tensor]:
        prompts_BS = inputs["prompts"]
        uniforms_BT = torch.rand(len(prompts_BS), self._drawing.new_tokens, generator=self._random, dtype=torch.float64)
        drawn = draw_answers(model, prompts_BS.tolist(), uniforms_BT, self._drawing)
        return as_inputs(prompts_BS, torch.tensor([one.ids for one in drawn], device=prompts_BS.device))


def as_inputs(prompts_BS: Tensor, answers_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels) as GKDTrainer learns from them."""
    ids_BS = torch.cat([prompts_BS, answers_BT], 1)
    labels_BS = torch.cat([torch.full_like(prompts_BS, -100), answers_BT], 1)
    return ids_BS, torch.ones_like(ids_BS), labels_BS


def full_loss(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Summed reverse KL over the whole vocabulary: what GKDTrainer computes with beta 1."""
    hidden_NH, teacher_NH, labels_N = _hidden(student, teacher, inputs)
    return linear_full_kl(
        hidden_NH, _head(student), teacher_NH, _head(teacher), labels_N=labels_N, divergence="reverse_kl"
    ).loss_sum


def top_k_loss(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Summed reverse KL on the teacher's top 64 and one bucket for the rest."""
    hidden_NH, teacher_NH, labels_N = _hidden(student, teacher, inputs)
    with torch.no_grad():
        targets = linear_topk_lse(teacher_NH, _head(teacher), 64)
    return linear_sparse_kl(hidden_NH, _head(student), *targets, labels_N=labels_N, divergence="reverse_kl").loss_sum


class Spent(NamedTuple):
    """One step: seconds to write and to learn, processor seconds of all, and the loss in nats per token."""

    write: float
    learn: float
    cpu: float
    loss: float


class Contestant:
    """A GKDTrainer that is stepped from outside."""

    def __init__(
        self, name: str, student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, args: argparse.Namespace
    ):
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        loss = {TRL: None, OURS: full_loss, TOP_K: top_k_loss}[name]

        class Ours(GKDTrainer):  # type: ignore[misc]
            def compute_loss(
                self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Tensor:
                assert loss is not None
                return loss(model, self.teacher_model, inputs) / num_items_in_batch

        self._folder, self._tokens = tempfile.TemporaryDirectory(), args.batch * args.new_tokens
        config = GKDConfig(
            output_dir=self._folder.name, lmbda=1.0, beta=1.0, temperature=1.0, seq_kd=False, bf16=False,
            gradient_checkpointing=False, learning_rate=args.lr, report_to=[], max_new_tokens=args.new_tokens,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        self.trainer = (GKDTrainer if loss is None else Ours)(
            model=student, teacher_model=teacher, args=config, data_collator=lambda rows: rows,
            train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]], "attention_mask": [[1]]}),
            processing_class=tokenizer,
        )  # fmt: skip
        self.trainer.generation_config.eos_token_id = None
        self.optimizer = self.trainer.create_optimizer()
        self._write = self.trainer.generate_on_policy_outputs
        if loss is not None:
            self._write = Writer(args.new_tokens, student.config.vocab_size)
        self.trainer.generate_on_policy_outputs = self._timed
        self._seconds = 0.0

    def _timed(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        begin = _now()
        written = self._write(*arguments, **named)
        self._seconds += _now() - begin
        return written

    def loss_on(self, prompts_BS: Tensor, answers_BT: Tensor) -> float:
        """The loss on given answers, in nats per token."""
        names = ("input_ids", "attention_mask", "labels")
        inputs = dict(zip(names, as_inputs(prompts_BS, answers_BT), strict=True))
        with torch.no_grad():
            return float(
                self.trainer.compute_loss(self.trainer.model, inputs, num_items_in_batch=torch.tensor(self._tokens))
            )

    def step(self, prompts_BS: Tensor) -> Spent:
        """Write, learn, update."""
        mask = torch.ones_like(prompts_BS)
        inputs = {
            "prompts": prompts_BS, "prompt_attention_mask": mask, "input_ids": prompts_BS, "attention_mask": mask,
            "labels": prompts_BS.clone(),
        }  # fmt: skip
        self._seconds, begin, cpu = 0.0, _now(), time.process_time()
        self.trainer.model.train()
        loss = self.trainer.training_step(self.trainer.model, inputs, num_items_in_batch=torch.tensor(self._tokens))
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(loss)
        return Spent(self._seconds, _now() - begin - self._seconds, time.process_time() - cpu, value)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--student", type=Path, help="folder of the student (default: every second layer)")
    parser.add_argument("--text", type=Path, required=True, help='JSON lines with a "text" each, gzipped or not')
    parser.add_argument("--batch", type=int, default=4, help="prompts a step")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4, help="steps each, after one to warm up")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of both models")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare losses, step the contestants in turn and print their table."""
    args = parse(argv)
    dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = packed(args.text, tokenizer, args.prompt_tokens, (args.rounds + 1) * args.batch).to(device)
    batches = prompts.unflatten(0, (args.rounds + 1, args.batch))
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype).to(device).eval().requires_grad_(False)
    student = half_as_deep(teacher)
    if args.student:
        student = AutoModelForCausalLM.from_pretrained(args.student, dtype=dtype).to(device)
    contestants = {
        name: Contestant(name, copy.deepcopy(student).requires_grad_(True), teacher, tokenizer, args)
        for name in (TRL, OURS, TOP_K)
    }
    first = Writer(args.new_tokens, student.config.vocab_size)(student.eval(), {"prompts": batches[0]}, None)
    answers_BT = first[0][:, args.prompt_tokens :]
    same = {name: contestant.loss_on(batches[0], answers_BT) for name, contestant in contestants.items()}
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
    for index, prompts_BS in enumerate(batches):
        for name, contestant in contestants.items():
            once = contestant.step(prompts_BS)
            if index:
                spent[name].append(once)
            print(f"round {index}, {name}: {once}", file=sys.stderr, flush=True)
    tokens = args.batch * args.new_tokens
    print("| contestant | loss on the same tokens | new tokens/s | to write | to learn | of processor time |")
    print("|---|---|---|---|---|---|")
    for name, rounds in spent.items():
        pairs = list(zip(spent[TRL], rounds, strict=True))
        rate = tokens / statistics.median(one.write + one.learn for one in rounds)
        write = statistics.median(base.write / one.write for base, one in pairs)
        learn = statistics.median(base.learn / one.learn for base, one in pairs)
        cpu = statistics.median(base.cpu / one.cpu for base, one in pairs)
        print(f"| {name} | {same[name]:.5f} | {rate:.1f} | {write:.2f} | {learn:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
