"""What a filtered mode of linear_sparse_kl could save: the share of tiles of dz that have to be multiplied.

    PYTHONPATH=.:kernels python benchmarks/kernels/live_tiles.py TEACHER TEXT.jsonl.gz [--student NAME=FOLDER ...]

dz is the gradient of the logits (forward KL, K = 64, tail bucket) on real text, for students at several distances: the
teacher with its least important ffn units removed, folders given by --student, and the teacher plus noise on its last
hidden states. A tile is left out of dX = dz·W and dW = dzᵀ·X when a criterion calls it dead; the error of both is then
measured. The vocabulary is tiled as it is, and ordered by how often the teacher lists an id among its K on other text.

Criteria, ε = 5e-3, the error that the project allows:
  2^-9 of the row      |dz| < 2^-9 · max|dz_n| in all of its rows: what bf16 does not resolve beside the row's largest
                       entry. Says nothing about the error: V entries that small may add up.
  bound                |dz| < ε·‖dz_n‖₂/√V in all of its rows: then ‖dropped‖_F ≤ ε·‖dz‖_F, whatever the entries are. A
                       tile can decide this by itself.
  best possible        tiles in order of energy, smallest first, while ‖dropped‖_F ≤ ε·‖dz‖_F holds. Needs all of dz
                       first: no kernel can do it in one pass, no criterion with that guarantee leaves out more.
  largest that keeps ε  |dz| < 2^-k · max|dz_n| with the largest such threshold that keeps both errors within ε. Chosen
                       by looking at the errors, for each student anew: more than a kernel can know.
  2^-12                |dz| < 2^-12: that of Cut Cross-Entropy (Wijmans et al. 2024, section 4.3). Absolute, so it knows
                       nothing of a student that is near its teacher.

Legend: N rows, H hidden size, V vocabulary, K teacher entries, R × C a tile, G × J tiles.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdscale_kernels as kk

EPSILON, K = 5e-3, 64
TILES = ((128, 128), (64, 128), (16, 128))
FULL_MS, PRODUCT_MS = 65.4, 21.8  # three bare products and one: H100, N=16384 H=4096 V=128256


def read_tokens(tokenizer: Any, text: Path, rows: int, length: int = 256) -> Tensor:
    """[rows / length, length] token ids from documents taken evenly over the file."""
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    wanted = rows // length
    sequences = []
    for document in documents[:: max(1, len(documents) // (4 * wanted))]:
        ids = tokenizer(document)["input_ids"]
        if len(ids) >= length:
            sequences.append(ids[:length])
        if len(sequences) == wanted:
            return torch.tensor(sequences)
    raise SystemExit(f"{text}: {len(sequences)} documents of {length} tokens, {wanted} wanted")


def without_ffn_units(model: Any, share: float) -> Any:
    """The model with the given share of each layer's ffn units zeroed, smallest product of weight norms first."""
    pruned = copy.deepcopy(model)
    for layer in pruned.model.layers:
        mlp = layer.mlp
        score_F = mlp.up_proj.weight.norm(dim=1) * mlp.gate_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
        mlp.down_proj.weight.data[:, score_F.argsort()[: int(share * score_F.numel())]] = 0.0
    return pruned


@torch.no_grad()
def hidden(model: Any, ids_BS: Tensor) -> Tensor:
    """The model's last hidden states [N,H] in fp32."""
    return model.model(ids_BS).last_hidden_state.flatten(0, 1).float()


def stages(
    args: argparse.Namespace, teacher: Any, ids_BS: Tensor, hidden_NH: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, the student's hidden states, its head), from the farthest to the nearest."""
    head_VH = teacher.lm_head.weight.detach().float()
    for share in args.prune:
        yield f"{share:.0%} of ffn units removed", hidden(without_ffn_units(teacher, share), ids_BS), head_VH
    for given in args.student:
        name, _, folder = given.partition("=")
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        yield name, hidden(student, ids_BS), student.lm_head.weight.detach().float()
    gen = torch.Generator().manual_seed(0)
    spread = hidden_NH.std()
    for noise in args.noise:
        yield (
            f"teacher + {noise} noise",
            hidden_NH + noise * spread * torch.randn(hidden_NH.shape, generator=gen),
            head_VH,
        )


def gradient_of_logits(hidden_NH: Tensor, head_VH: Tensor, targets: kk.TopKLse) -> Tensor:
    """dz [N,V] in fp32: one call with the logits as the leaf."""
    logits_NV = F.linear(hidden_NH, head_VH).requires_grad_()
    labels_N = torch.zeros(hidden_NH.shape[0], dtype=torch.int64)
    kk.sparse_kl(logits_NV, *targets, labels_N=labels_N, inplace_grad=True).loss_sum.backward()
    assert logits_NV.grad is not None
    return logits_NV.grad


def tiled(values_NV: Tensor, tile: tuple[int, int], reduce: str) -> Tensor:
    """[G,J]: the maximum or the sum over each tile; the last tiles may be smaller."""
    rows, columns = values_NV.shape
    padded = F.pad(values_NV, (0, -columns % tile[1], 0, -rows % tile[0]))
    blocks = padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
    return blocks.amax(dim=(1, 3)) if reduce == "max" else blocks.sum(dim=(1, 3))


class Gradient:
    """dz of one student with one order of the vocabulary, and what leaving tiles out does to dX and dW."""

    def __init__(self, dz_NV: Tensor, hidden_NH: Tensor, head_VH: Tensor):
        self.dz_NV, self.hidden_NH, self.head_VH = dz_NV, hidden_NH.bfloat16(), head_VH.bfloat16()
        self.size_NV = dz_NV.abs()
        self.whole = self._products(dz_NV)

    def _products(self, dz_NV: Tensor) -> tuple[float, float]:
        rounded_NV = dz_NV.bfloat16()
        return (rounded_NV @ self.head_VH).float().norm().item(), (rounded_NV.T @ self.hidden_NH).float().norm().item()

    def errors(self, live_GJ: Tensor, tile: tuple[int, int]) -> tuple[float, float]:
        """Relative errors of dX and dW when the dead tiles are taken as zero."""
        rows, columns = self.dz_NV.shape
        live_NV = live_GJ.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]
        lost = self._products(self.dz_NV.masked_fill(live_NV, 0.0))
        return lost[0] / self.whole[0], lost[1] / self.whole[1]

    def live_tiles(self, tile: tuple[int, int]) -> Iterator[tuple[str, Tensor, tuple[float, float]]]:
        """(criterion, [G,J] bool, errors)."""
        relative_GJ = tiled(self.size_NV / self.size_NV.amax(1, keepdim=True), tile, "max")
        norm_N1 = self.dz_NV.norm(dim=1, keepdim=True)
        energy_GJ = tiled(self.size_NV.square(), tile, "sum").double()
        order = energy_GJ.flatten().argsort()
        best = torch.ones(energy_GJ.numel(), dtype=torch.bool)
        best[order[energy_GJ.flatten()[order].cumsum(0) <= EPSILON**2 * energy_GJ.sum()]] = False
        for criterion, live_GJ in (
            ("2^-9 of the row", relative_GJ >= 2.0**-9),
            ("bound", tiled(self.size_NV / norm_N1, tile, "max") >= EPSILON / self.dz_NV.shape[1] ** 0.5),
            ("best possible", best.view_as(energy_GJ)),
            ("2^-12", tiled(self.size_NV, tile, "max") >= 2.0**-12),
        ):
            yield criterion, live_GJ, self.errors(live_GJ, tile)
        for power in range(6, 20):
            live_GJ = relative_GJ >= 2.0**-power
            errors = self.errors(live_GJ, tile)
            if max(errors) <= EPSILON:
                yield f"largest that keeps ε: 2^-{power} of the row", live_GJ, errors
                return


def main() -> None:
    """Print the shares of live tiles and the errors of leaving the others out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("text", type=Path, help="jsonl.gz with a field text")
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--prune", type=float, nargs="*", default=[0.5, 0.1], help="shares of ffn units to remove")
    parser.add_argument("--noise", type=float, nargs="*", default=[0.3, 0.05])
    parser.add_argument("--rows", type=int, default=1024)
    args = parser.parse_args()
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).eval()
    ids_BS, other_BS = read_tokens(AutoTokenizer.from_pretrained(args.teacher), args.text, 2 * args.rows).chunk(2)
    teacher_head_VH = teacher.lm_head.weight.detach().float()
    teacher_NH = hidden(teacher, ids_BS)
    targets = kk.linear_topk_lse(teacher_NH, teacher_head_VH, K)
    other_ids = kk.linear_topk_lse(hidden(teacher, other_BS), teacher_head_VH, K).ids_NK
    by_frequency_V = torch.bincount(other_ids.flatten(), minlength=len(teacher_head_VH)).argsort(descending=True)
    print("| student | vocabulary | tile | criterion | live f | ms | error dX | error dW |\n|" + "---|" * 8)
    for name, student_NH, head_VH in stages(args, teacher, ids_BS, teacher_NH):
        dz_NV = gradient_of_logits(student_NH, head_VH, targets)
        for order, columns_V in (("as it is", slice(None)), ("by frequency", by_frequency_V)):
            gradient = Gradient(dz_NV[:, columns_V], student_NH, head_VH[columns_V])
            for tile in TILES:
                for criterion, live_GJ, (dx, dw) in gradient.live_tiles(tile):
                    share = live_GJ.float().mean().item()
                    cells = (name, order, f"{tile[0]}×{tile[1]}", criterion, f"{share:.3f}")
                    millis = PRODUCT_MS * (1 + 2 * share)
                    print(f"| {' | '.join(cells)} | {millis:.1f} | {dx:.1g} | {dw:.1g} |", flush=True)
    print(f"\nms: {PRODUCT_MS}·(1 + 2f), the reference shape on an H100 by arithmetic, against {FULL_MS} for all tiles")


if __name__ == "__main__":
    main()
