"""Make a Mixtral of a dense Llama checkpoint: every expert a copy of the dense MLP, a random router (sparse upcycling).

    python benchmarks/prune/upcycle_mixture.py TEACHER /tmp/mixture --experts 4

The weights of a token's experts sum to one, so the mixture computes what the dense model does, and prune_methods.py
measures on it what compensation inside experts is worth on real activations. Each expert gets its own part of the
tokens (the router's rows are random directions). It says nothing about the choice of experts: they are all alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdscale.families import load_family
from kdscale.files import write_json
from kdscale.weights import Checkpoint, ShardWriter, TensorInfo, copy_sidecars

_DENSE = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--experts-per-token", type=int, default=2)
    arguments = parser.parse_args()
    teacher = Checkpoint.open(arguments.teacher)
    if teacher.config["model_type"] != "llama":
        raise SystemExit(f"a llama checkpoint is needed, this is {teacher.config['model_type']}")
    config = mixture_config(teacher.config, arguments.experts, arguments.experts_per_token)
    arguments.out.mkdir(parents=True, exist_ok=True)
    specs = load_family(config, str(arguments.out)).tensors(config)
    dtype = teacher.spec(teacher.names[0]).dtype
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(arguments.out, {name: TensorInfo(s.shape, dtype) for name, s in specs.items()}, 5 << 30) as writer:
        for name, value in tensors(teacher, specs, generator):
            writer.add(name, value)
    write_json(arguments.out / "config.json", config)
    copy_sidecars(arguments.teacher, arguments.out)


def mixture_config(dense: dict[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    config = json.loads(json.dumps(dense))
    for field in ("mlp_bias", "attention_bias", "pretraining_tp"):
        config.pop(field, None)
    return config | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "sliding_window": None,
    }


def tensors(teacher: Checkpoint, specs: dict[str, Any], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, spec in specs.items():
        if spec.role == "router":
            yield name, torch.randn(spec.shape, generator=generator).to(torch.bfloat16) * spec.shape[1] ** -0.5
        elif spec.expert is not None:
            layer, _, rest = name.partition(".block_sparse_moe.")
            yield name, teacher.tensor(f"{layer}.mlp.{_DENSE[rest.split('.')[2]]}.weight")
        else:
            yield name, teacher.tensor(name)


if __name__ == "__main__":
    main()
