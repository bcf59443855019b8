"""Placed teachers beside the whole one, over 1, 2 and 4 gloo processes: python placement_worker.py FOLDER.

Libraries are imported once and every rank is a fork. Writes FOLDER/WORLD-RANK.json: case → what was found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdscale.config.distill.targets import Needs
from kdscale.models.head import final_hidden
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.placement.placed import PlacedTeacher, StreamedTeacher, place_teacher
from kdscale.teacher.source import MicroBatch
from tests.integration.forks import fork_ranks

CPU = torch.device("cpu")
WORLDS = [1, 2, 4]
VOCAB = 61  # no multiple of 2 or 4


def family_table() -> Any:
    path = Path(__file__).parents[1] / "prune" / "family_table.py"
    spec = importlib.util.spec_from_file_location("family_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_teachers(folder: Path) -> None:
    table = family_table()
    for family, tied in {case[:2] for case in CASES.values()}:
        table.save_teacher(family, folder / f"{family}-{tied}", vocab_size=VOCAB, tie_word_embeddings=tied)


def batches(rank: int) -> list[tuple[torch.Tensor, ...]]:
    """Other tokens and other shapes on every rank; rank 1's first batch has no valid position."""
    made = []
    for number in range(2):
        gen = torch.Generator().manual_seed(10 * rank + number)
        rows = 1 + (rank + number) % 3
        ids_BS = torch.randint(0, VOCAB, (rows, 20), generator=gen)
        valid = 0 if (rank, number) == (1, 0) else 7 + rank
        positions_BS = torch.arange(20).remainder(13).expand(rows, 20)
        made.append((ids_BS, positions_BS, torch.randperm(20 * rows, generator=gen)[:valid].sort().values))
    return made


def said(placed: PlacedTeacher, whole: bool, rank: int) -> list[torch.Tensor]:
    needs = Needs(full=True) if whole else Needs(top_k=9, temperature=2.0)
    teacher = OnlineTeacher(placed, needs, vocab_size=VOCAB - 2)
    out: list[torch.Tensor] = []
    for ids_BS, positions_BS, rows_N in batches(rank):
        targets: Any = teacher.targets(MicroBatch(ids_BS, positions_BS, rows_N, rows_N))
        full, top_k = targets.full, targets.top_k
        out += [full.hidden_NG, full.head.weight_VH] if whole else [top_k.ids_NK, top_k.logits_NK, top_k.lse_N]
    return out


def held(model: torch.nn.Module) -> int:
    """Values in parameters right now."""
    return sum(parameter.numel() for parameter in model.parameters())


def most_held(placed: StreamedTeacher, rank: int) -> int:
    """The most values that parameters held at once during a forward."""
    most = [0]
    for module in placed.model.modules():
        module.register_forward_hook(lambda *_: most.__setitem__(0, max(most[0], held(placed.model))))
    with torch.no_grad():
        final_hidden(placed.model, *batches(rank)[0][:2])
    with placed.head():
        pass
    return most[0]


def stored(store: Any) -> int:
    """Values that a rank keeps of a partitioned teacher."""
    return sum(shard.numel() for shard in store._shards) + sum(shard.numel() for shard in store._tables.values())


CASES: dict[str, tuple[str, bool, str, torch.dtype, bool]] = {
    # family, tied head, placement, dtype, whole vocabulary (the head stays)
    "llama tied": ("llama", True, "partitioned", torch.float32, False),
    "llama whole": ("llama", False, "partitioned", torch.float32, True),
    "llama tied whole": ("llama", True, "partitioned", torch.float32, True),
    "gemma2 tied": ("gemma2", True, "partitioned", torch.bfloat16, False),
    "gpt2 tied": ("gpt2", True, "partitioned", torch.bfloat16, False),
    "mixtral": ("mixtral", False, "partitioned", torch.bfloat16, False),
    "gpt_neox": ("gpt_neox", False, "partitioned", torch.float32, False),
    "offloaded llama": ("llama", False, "offloaded", torch.bfloat16, False),
    "offloaded gemma2 tied": ("gemma2", True, "offloaded", torch.float32, False),
}


def compare(folder: Path, rank: int) -> dict[str, Any]:
    found = {}
    for case, (family, tied, placement, dtype, whole) in CASES.items():
        path = folder / f"{family}-{tied}"
        options: dict[str, Any] = {"dtype": dtype, "device": CPU}
        plain = place_teacher(path, "replicated", **options)
        placed: Any = place_teacher(path, placement, keep_head=whole, **options)
        pairs = zip(said(plain, whole, rank), said(placed, whole, rank), strict=True)
        store, partitioned = placed._store, placement == "partitioned"
        found[case] = {
            "equal": all(torch.equal(ours, theirs) for theirs, ours in pairs),
            "vocab": placed.vocab,
            "whole": held(plain.model),
            "resident": held(placed.model),
            "most": most_held(placed, rank),
            "layer": max(unit.numel for unit in placed._movable.layers),
            "head": placed.vocab * placed.model.config.hidden_size,
            "stored": stored(store) if partitioned else 0,
            "buffers": sum(buffer.numel() for buffer in store._buffers) if partitioned else 0,
        }
    return found


def run_rank(folder: Path, world: int, rank: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store-{world}"), world), rank=rank,
                            world_size=world)  # fmt: skip
    (folder / f"{world}-{rank}.json").write_text(json.dumps(compare(folder, rank)))
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    save_teachers(folder)
    for world in WORLDS:
        codes = fork_ranks(world, lambda rank, world=world: run_rank(folder, world, rank))
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
