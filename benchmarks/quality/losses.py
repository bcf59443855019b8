"""One pruned student taught with other shares of the label and other sizes of a step, at the same budget of tokens.

    python benchmarks/quality/losses.py TEACHER STUDENT CORPUS --tokens 20480 --label-shares 0 0.3 1 --sequences 2 8

A plain loop in place of a run, so that a variant costs the student's forward and backward alone: the teacher's top K is
computed once. Loss, fp32 masters, AdamW and the cosine are those of a run. Prints one JSON row for the student as it is
and one for each variant: perplexity, KL and agreement on held-out text of known and of other kinds (texts.py).

Letters: B sequences of a step, S their length, N scored tokens, H hidden size, K teacher entries.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from texts import CPU, Texts, Yardstick, load, sequences
from torch import Tensor

from kdscale.distill.schedule import cosine_lr
from kdscale.models.head import final_hidden, head_of
from kdscale.models.loading import load_model, load_tokenizer, read_tokenizer_config, special_tokens
from kdscale.runtime.device import set_threads
from kdscale_kernels import linear_sparse_kl, linear_topk_lse


@dataclass(frozen=True)
class Teaching:
    """The ids of the budget [B, S] and the teacher's top K of every scored token, in the same order."""

    ids_BS: Tensor
    ids_NK: Tensor
    logits_NK: Tensor
    lse_N: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, teacher: Path, ids_BS: Tensor, top_k: int) -> Teaching:
        model = load(teacher)
        head, parts = head_of(model), []
        for ids in ids_BS.split(4):
            hidden_NH = final_hidden(model, ids)[:, :-1].flatten(0, 1)
            parts.append(linear_topk_lse(hidden_NH, head.weight_VH, top_k, bias_V=head.bias_V, softcap=head.softcap))
        return cls(ids_BS, *(torch.cat(column) for column in zip(*parts, strict=True)))


def training_ids(teacher: Path, texts: Texts, tokens: int, length: int) -> Tensor:
    """Sequences [B, S] of the training documents, the kinds taking turns."""
    tokenizer = load_tokenizer(teacher)
    prefix = special_tokens(tokenizer, read_tokenizer_config(teacher)).prefix
    count = -(-tokens // length)
    kinds = sorted({document.source for document in texts.training})
    rows = []
    for kind in kinds:
        documents = [document for document in texts.training if document.source == kind]
        rows.append(sequences(tokenizer, prefix, documents[::-1], length, -(-count // len(kinds))))
    return torch.stack([ids[i] for i in range(max(map(len, rows))) for ids in rows if i < len(ids)][:count])


def teach(student: Path, teaching: Teaching, share: float, batch: int, lr: float, warmup: int) -> Any:
    """The student after one pass over the budget: `share` of the loss is the label's, `batch` sequences a step."""
    model = load_model(student, dtype=torch.bfloat16, device=CPU).requires_grad_(True).train()
    weights = list(model.parameters())
    masters = [weight.detach().float().clone() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps, scored = len(teaching.ids_BS) // batch, batch * (teaching.ids_BS.shape[1] - 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps=steps, warmup_steps=warmup, lr=lr, min_lr=lr / 10)
        ids_BS = teaching.ids_BS[step * batch : (step + 1) * batch]
        rows = slice(step * scored, (step + 1) * scored)
        hidden_NH, head = final_hidden(model, ids_BS)[:, :-1].flatten(0, 1), head_of(model)
        loss = linear_sparse_kl(
            hidden_NH, head.weight_VH, teaching.ids_NK[rows], teaching.logits_NK[rows], teaching.lse_N[rows],
            labels_N=ids_BS[:, 1:].flatten(), ignore_index=None, ce_weight=share, bias_V=head.bias_V,
            softcap=head.softcap,
        ).loss_sum / scored  # fmt: skip
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--label-shares", type=float, nargs="+", default=[0.0, 0.3, 1.0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[2], help="of a step")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--warmup-steps", type=int, default=8)
    parser.add_argument("--cache", type=Path, help="file for what is kept of the teacher on the held-out text")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    texts = Texts.read(arguments.corpus, arguments.teacher, seed=arguments.seed)
    yardstick = Yardstick.read(arguments.teacher, texts, arguments.cache)
    print(json.dumps({"start": str(arguments.student), **yardstick.measure(arguments.student)}), flush=True)
    ids_BS = training_ids(arguments.teacher, texts, arguments.tokens, arguments.seq_len)
    teaching = Teaching.of(arguments.teacher, ids_BS, arguments.top_k)
    for batch in arguments.sequences:
        for share in arguments.label_shares:
            began = time.process_time()
            model = teach(arguments.student, teaching, share, batch, arguments.lr, arguments.warmup_steps)
            seconds = time.process_time() - began
            row = {"label_share": share, "sequences": batch, "steps": len(ids_BS) // batch, "cpu_s": round(seconds, 1)}
            print(json.dumps({**row, **yardstick.measure(model)}), flush=True)


if __name__ == "__main__":
    main()
