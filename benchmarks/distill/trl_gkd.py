"""One teacher, one student, the same packed batches: TRL's GKDTrainer against itself with kdscale_kernels' losses.

    PYTHONPATH=.:kernels OMP_NUM_THREADS=1 python benchmarks/distill/trl_gkd.py --teacher FOLDER --text docs.jsonl.gz

Every contestant is a GKDTrainer on offline data (lmbda 0, beta 0: forward KL from the teacher, T = 1) with a student
and an AdamW of its own; the teacher is shared. They differ in compute_loss alone: TRL's holds both models' logits of
all positions and several arrays of their size; kdscale's goes from hidden states to the loss. Steps take turns, so that
whatever else the machine does slows all of them, and a ratio compares steps of one round. Memory is that of one step
beyond models and optimizer state, in a process each. --student names a folder (`kdscale prune` writes one); without it
the student is every second layer of the teacher. Needs `pip install trl` (tested with 1.16).

Legend: B sequences, S positions, N = B·S, H hidden size, K teacher entries.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kdscale_kernels import linear_full_kl, linear_sparse_kl, linear_topk_lse

TRL = "TRL GKDTrainer"
Inputs = dict[str, Tensor]


def top_k_loss(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Inputs, k: int) -> Tensor:
    """Summed forward KL of K teacher entries and a tail bucket: kdscale's default loss."""
    hidden_NH, teacher_NH, labels_N = _hidden(student, teacher, inputs)
    with torch.no_grad():
        targets = linear_topk_lse(teacher_NH, _head(teacher), k)
    return linear_sparse_kl(hidden_NH, _head(student), *targets, labels_N=labels_N).loss_sum


def full_loss(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Summed forward KL over the whole vocabulary: what GKDTrainer computes with beta 0."""
    hidden_NH, teacher_NH, labels_N = _hidden(student, teacher, inputs)
    return linear_full_kl(hidden_NH, _head(student), teacher_NH, _head(teacher), labels_N=labels_N).loss_sum


def _head(model: PreTrainedModel) -> Tensor:
    weight_VH: Tensor = model.get_output_embeddings().weight
    return weight_VH


def _hidden(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states of both [N,H], and labels [N]: position t is scored on token t + 1."""
    common = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    hidden_BSH = student.get_decoder()(**common).last_hidden_state
    with torch.no_grad():
        teacher_BSH = teacher.get_decoder()(**common).last_hidden_state
    labels_BS = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    return hidden_BSH.flatten(0, 1), teacher_BSH.flatten(0, 1), labels_BS.flatten()


Loss = Callable[[PreTrainedModel, PreTrainedModel, Inputs], Tensor]


def losses(k: int) -> dict[str, Loss | None]:
    """By contestant; None is TRL's own compute_loss."""
    return {
        TRL: None,
        f"with kdscale's top-{k} loss": lambda student, teacher, inputs: top_k_loss(student, teacher, inputs, k),
        "with kdscale's full-vocabulary loss": full_loss,
    }


def packed(path: Path, tokenizer: Any, length: int, count: int) -> Tensor:
    """[count, length] tokens of the documents in a row, each ended by the end-of-text token."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        tokens: list[int] = []
        for line in stream:
            tokens += tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id]
            if len(tokens) >= length * count:
                return torch.tensor(tokens[: length * count]).view(count, length)
    raise SystemExit(f"--text {path}: expected {length * count} tokens, got {len(tokens)}; take fewer or shorter steps")


def half_as_deep(teacher: PreTrainedModel) -> PreTrainedModel:
    """Every second layer of the teacher: a student of half its depth, untrained, for its speed alone."""
    student = copy.deepcopy(teacher)
    layers = student.get_decoder().layers
    student.get_decoder().layers = nn.ModuleList(layers[::2])
    student.config.num_hidden_layers = len(student.get_decoder().layers)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[::2]
    for index, layer in enumerate(student.get_decoder().layers):
        layer.self_attn.layer_idx = index
    return student


class Contestant:
    """A GKDTrainer that is stepped from outside: forward, backward, AdamW."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, loss: Loss | None, tokenizer: Any, lr: float
    ):
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        class Fused(GKDTrainer):  # type: ignore[misc]
            def compute_loss(
                self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Tensor:
                assert loss is not None
                return loss(model, self.teacher_model, inputs) / num_items_in_batch

        self.folder = tempfile.TemporaryDirectory()
        config = GKDConfig(
            output_dir=self.folder.name,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            seq_kd=False,
            bf16=False,  # the models have their dtype; no autocast on either side
            gradient_checkpointing=False,
            learning_rate=lr,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        self.trainer = (GKDTrainer if loss is None else Fused)(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]], "attention_mask": [[1]]}),
            data_collator=lambda rows: rows,
            processing_class=tokenizer,
        )
        self.optimizer = self.trainer.create_optimizer()

    def step(self, ids_BS: Tensor) -> float:
        """One optimizer step; the loss, in nats per token."""
        inputs = {"input_ids": ids_BS, "labels": ids_BS.clone(), "attention_mask": torch.ones_like(ids_BS)}
        tokens = torch.tensor(ids_BS[:, 1:].numel())
        self.trainer.model.train()
        loss = self.trainer.training_step(self.trainer.model, inputs, num_items_in_batch=tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


class Spent(NamedTuple):
    """One step."""

    wall: float
    cpu: float  # processor seconds of all threads: what a neighbour's load changes least
    loss: float


def timed(contestant: Contestant, ids_BS: Tensor) -> Spent:
    """One step, from an idle device until it is idle again."""
    if ids_BS.is_cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = contestant.step(ids_BS)  # ends with a copy of the loss to the host: the device is done then
    if ids_BS.is_cuda:
        torch.cuda.synchronize()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu, loss)


def table(spent: dict[str, list[Spent]], peaks: dict[str, float], tokens: int) -> Iterator[str]:
    """Markdown lines: medians over the rounds, ratios to TRL's step of the same round (above 1: TRL takes longer)."""
    yield "| contestant | tokens/s | TRL's time / its | of processor time | memory of a step | first loss | last |"
    yield "|---|---|---|---|---|---|---|"
    for name, rounds in spent.items():
        pairs = list(zip(spent[TRL], rounds, strict=True))
        wall, cpu = (
            statistics.median(getattr(base, what) / getattr(own, what) for base, own in pairs)
            for what in ("wall", "cpu")
        )
        rate = tokens / statistics.median(step.wall for step in rounds)
        peak = f"{peaks[name]:.2f} GiB" if name in peaks else "-"
        first, last = rounds[0].loss, rounds[-1].loss
        yield f"| {name} | {rate:.0f} | {wall:.2f} | {cpu:.2f} | {peak} | {first:.4f} | {last:.4f} |"


def peak_gib(contestant: Contestant, ids_BS: Tensor) -> float:
    """What a step needs at once beyond what was there before: the allocator's count, or resident memory (Linux)."""
    if ids_BS.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.step(ids_BS)
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status_kib("VmRSS")
    contestant.step(ids_BS)
    return (_status_kib("VmHWM") - before) / 2**20


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a transformers model")
    parser.add_argument("--student", type=Path, help="folder of the student (default: every second layer)")
    parser.add_argument("--text", type=Path, required=True, help='JSON lines with a "text" each, gzipped or not')
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="steps each, after one to warm up")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of both models")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one contestant, two steps, its peak on the last line
    return parser.parse_args(argv)


def build(args: argparse.Namespace, names: list[str]) -> tuple[dict[str, Contestant], Tensor]:
    """The contestants, and batches [rounds + 1, B, S]."""
    dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches = packed(args.text, tokenizer, args.length, (args.rounds + 1) * args.batch)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype).to(device).eval().requires_grad_(False)
    if args.student:
        student = AutoModelForCausalLM.from_pretrained(args.student, dtype=dtype).to(device)
    else:
        student = half_as_deep(teacher)
    contestants = {}
    for name in names:
        own = copy.deepcopy(student).requires_grad_(True) if len(names) > 1 else student.requires_grad_(True)
        contestants[name] = Contestant(own, teacher, losses(args.k)[name], tokenizer, args.lr)
    return contestants, batches.to(device).unflatten(0, (args.rounds + 1, args.batch))


def main(argv: list[str] | None = None) -> None:
    """Step the contestants in turn and print their table."""
    args = parse(argv)
    contestants, batches = build(args, [args.only] if args.only else list(losses(args.k)))
    if args.only:
        contestants[args.only].step(batches[0])  # makes the optimizer's state
        print(f"{peak_gib(contestants[args.only], batches[1]):.4f}")
        return
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
    for index, ids_BS in enumerate(batches):
        for name, contestant in contestants.items():
            once = timed(contestant, ids_BS)
            if index:
                spent[name].append(once)
            print(f"round {index}, {name}: {once.wall:.2f} s, loss {once.loss:.4f}", file=sys.stderr, flush=True)
    peaks = {}
    for name in contestants:
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--only", name]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    for line in table(spent, peaks, args.batch * args.length):
        print(line)


if __name__ == "__main__":
    main()
