"""One rank of a distributed scoring pass. Arguments: teacher, scratch folder, file for the scores, layer to die at."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from kdscale.config.prune import PruneConfig
from kdscale.models.hidden_states import Scratch
from kdscale.models.layer_stream import LayerStream
from kdscale.models.loading import open_teacher
from kdscale.prune.importance.collect import collect_scores

AXES = ("ffn", "heads", "kv_heads", "hidden", "layers")
CONFIG = PruneConfig(target_params="50%", axes=AXES)


def batches() -> list[SimpleNamespace]:
    """Three, so that two ranks have unequal shares."""
    generator = torch.Generator().manual_seed(5)
    positions = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1)
    return [
        SimpleNamespace(input_ids_BS=torch.randint(0, 320, (2, 48), generator=generator), position_ids_BS=positions)
        for _ in range(3)
    ]


def stream(folder: Path) -> LayerStream:
    checkpoint, family = open_teacher(folder)
    return LayerStream(checkpoint.config, family, checkpoint.tensor, dtype=torch.float32, device=torch.device("cpu"))


def main() -> None:
    teacher, folder, out, last = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    source = stream(teacher)
    read, seen = source.layer, []

    def spy(index: int):
        seen.append(index)
        if index == last and rank == 1:
            os._exit(9)
        return read(index)

    source.layer = spy
    scores = collect_scores(source, batches()[rank::world], AXES, CONFIG, scratch=Scratch(folder / f"rank-{rank}", 1))
    if rank == 0:
        out.with_suffix(".txt").write_text(" ".join(map(str, seen)))
    save_file(scores, out.with_suffix(f".{rank}.safetensors"))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
