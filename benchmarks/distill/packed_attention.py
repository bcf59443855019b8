"""Attention within documents beside the dense mask of transformers: seconds of a distillation step and peak memory.

    python benchmarks/distill/packed_attention.py --seq-len 2048 --rows 1 --steps 5
    python benchmarks/distill/packed_attention.py --kinds "within documents" compiled

Teacher and student have the shapes of SmolLM2-135M and random weights; rows are packed from documents of 200 to 500
tokens. A step is the teacher's forward with its 64 largest logits, the student's forward, sparse KL and backward. The
kind `compiled` is attention within documents in layers that torch.compile made. All kinds take turns in one process,
whose seconds are compared; the peak is of one process each, without the loaded models. `--compare` prints the losses
and the largest difference of any gradient instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rank_processes import SOURCES, MemoryWatch

sys.path[:0] = SOURCES

import torch  # noqa: E402 - after the path

from kdscale.config.distill.objectives import TokenDivergenceConfig  # noqa: E402 - after the path
from kdscale.config.distill.targets import Needs  # noqa: E402 - after the path
from kdscale.distill.objectives.base import Objectives  # noqa: E402 - after the path
from kdscale.distill.step import StudentModule  # noqa: E402 - after the path
from kdscale.models.attention import attend_within_documents  # noqa: E402 - after the path
from kdscale.models.compiling import compile_layers, uncompiled  # noqa: E402 - after the path
from kdscale.models.documents import Documents  # noqa: E402 - after the path
from kdscale.teacher.online import OnlineTeacher  # noqa: E402 - after the path
from kdscale.teacher.placement.placed import ReplicatedTeacher  # noqa: E402 - after the path
from kdscale.teacher.source import MicroBatch  # noqa: E402 - after the path

CONFIG = Path(__file__).parents[2] / "tests/fixtures/teachers/smollm2-135m-instruct/config.json"
DENSE, APART, COMPILED = KINDS = ("dense mask", "within documents", "compiled")


class Step:
    """One distillation step of `rows` × `length` positions, of any kind."""

    def __init__(self, layers: int, rows: int, length: int, dtype: torch.dtype, device: torch.device):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(1)
        config = {**json.loads(CONFIG.read_text()), "num_hidden_layers": layers}
        make = lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).to(device)  # noqa: E731
        self.models: list[Any] = [make().eval().requires_grad_(False), make().train()]
        for model in self.models:
            compile_layers(model)
        self._kind = DENSE
        vocab, gen = config["vocab_size"], torch.Generator().manual_seed(2)
        self.teacher = OnlineTeacher(ReplicatedTeacher(self.models[0]), Needs(top_k=64), vocab_size=vocab)
        self.student = StudentModule(self.models[1], Objectives([TokenDivergenceConfig()]), vocab)
        position_BS = torch.zeros(rows, length, dtype=torch.long)
        for row in position_BS:
            begin = 0
            while begin < length:
                size = min(int(torch.randint(200, 501, (), generator=gen)), length - begin)
                row[begin : begin + size] = torch.arange(size)
                begin += size
        ids_BS = torch.randint(0, vocab, (rows, length), generator=gen)
        rows_N = torch.arange(rows * length)
        self.documents = Documents.of(position_BS)
        on_device = (x.to(device) for x in (ids_BS, position_BS, rows_N, ids_BS.flatten()))
        self.batch = MicroBatch(*on_device, documents=self.documents.to(device))

    def use(self, kind: str) -> None:
        self._kind = kind
        for model in self.models:
            if kind == DENSE:
                model.config._attn_implementation = "sdpa"
            else:
                assert attend_within_documents(model)

    def __call__(self) -> float:
        self.student.zero_grad()
        with nullcontext() if self._kind == COMPILED else uncompiled():
            (loss_sum,), _ = self.student(self.batch, self.teacher.targets(self.batch))
            (loss_sum / self.batch.rows).backward()
        return float(loss_sum.detach()) / self.batch.rows


def seconds(step: Step, kinds: Sequence[str], steps: int) -> None:
    """The kinds take turns, the first round uncounted. On a CPU processor time, which other work changes less."""
    clock = time.perf_counter if step.batch.rows_N.is_cuda else time.process_time
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(steps + 1):
        for kind in kinds:
            step.use(kind)
            began = clock()
            step()
            taken[kind].append(clock() - began)
    best = {kind: min(values[1:]) for kind, values in taken.items()}
    for kind, value in best.items():
        print(f"{kind}: {value:.3f} s, {step.batch.rows / value:,.0f} tokens/s")
    first, *others = kinds
    for kind in others:
        ratios = sorted(a / b for a, b in zip(taken[first][1:], taken[kind][1:], strict=True))
        print(f"tokens/s, {kind}: {ratios[len(ratios) // 2]:.2f} times those of {first} (median of {steps})")


def compare(step: Step, kinds: Sequence[str]) -> None:
    """Losses, and the largest difference of any gradient as a share of the largest gradient of its tensor."""
    found = {}
    for kind in kinds:
        step.use(kind)
        loss = step()
        found[kind] = loss, [p.grad.clone() for p in step.student.parameters()]
    (first, (loss, gradients)), *others = found.items()
    for kind, (other, changed) in others:
        worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(gradients, changed, strict=True))
        print(f"loss {loss:.8f} {first}, {other:.8f} {kind}; gradients differ by at most {worst:.1e}")


def peak(step: Step, kind: str) -> None:
    """Bytes beyond the loaded models; what compiling takes is not counted."""
    step.use(kind)
    if kind == COMPILED:
        step()
    if step.batch.rows_N.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        print(torch.cuda.max_memory_allocated() - before)
        return
    watch = MemoryWatch()
    watch.start()
    step()
    print(watch.finish()["anonymous"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS[:2], help="the first is what others are compared with"
    )
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    step = Step(args.layers, args.rows, args.seq_len, getattr(torch, args.dtype), torch.device(args.device))
    if args.peak:
        return peak(step, args.peak)
    lengths = sorted(step.documents.lengths)
    print(
        f"{args.rows} × {args.seq_len} {args.dtype}, {len(lengths)} documents of {lengths[0]} to {lengths[-1]} tokens"
    )
    if args.compare:
        return compare(step, args.kinds)
    seconds(step, args.kinds, args.steps)
    for kind in args.kinds:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--peak", kind], stdout=subprocess.PIPE, text=True, check=True
        )
        print(f"{kind}: peak {int(done.stdout) / 1e6:,.0f} MB beyond the models")
    return None


if __name__ == "__main__":
    main()
