"""The calls of the vocab-parallel tests, and a launch of processes that makes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import kdscale_kernels as kk

SPANS = {  # uneven; not in the order of ranks
    1: [(0, 203)],
    2: [(0, 70), (70, 203)],
    4: [(120, 203), (0, 3), (3, 60), (60, 120)],
}
PADDED = {
    1: [(0, 203)],
    2: [(0, 196), (196, 203)],
    4: [(0, 80), (80, 150), (150, 192), (192, 203)],
}  # vocab_size 190: a shard of padding
GEN = torch.Generator().manual_seed(4)
LOSSES = {
    "plain": {},
    "tempered": {"temperature": 2.0, "ce_weight": 0.3},
    "capped": {"softcap": 5.0, "ce_weight": 0.3, "temperature": 0.7, "divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "ce_weight": 0.5},
    "truncated": {"tail": "truncated", "divergence": "jsd"},
    "renormalised": {"tail": "renormalised"},
    "hard": {"ce_weight": 1.0},
    "weights by row": {"ce_weight": torch.linspace(0.0, 1.0, 11).double(), "temperature": 2.0, "softcap": 5.0},
    "skewed": {"divergence": kk.Divergence("skewed_reverse_kl", 0.3), "ce_weight": 0.2},
    "sampled": {"tail": "sampled", "temperature": 1.5, "target_weights_NK": torch.rand(11, 7, generator=GEN).double()},
}
TOPS = {"top": {}, "tempered": {"temperature": 3.0, "softcap": 4.0}}


def case_of(p, spans, *, bias=False, vocab_size=203, chunk_bytes=4 * 133 * 8, **more):
    return {
        "hidden": p.hidden.detach(),
        "weight": p.weight.detach(),
        "bias": p.bias.detach() if bias else None,
        "targets": p.targets,
        "labels": p.labels,
        "spans": spans,
        "vocab_size": vocab_size,
        "chunk_bytes": chunk_bytes,
        "options": {},
    } | more


def single(student, teacher, k):
    """A case of one row whose logits are given: hidden state (1), the logits as weights."""
    teacher = torch.tensor([teacher], dtype=torch.float64)
    values, ids = teacher.topk(k, 1)
    return {
        "hidden": torch.ones(1, 1),
        "weight": torch.tensor(student)[:, None],
        "bias": None,
        "targets": (ids, values.float(), teacher.logsumexp(1).float()),
        "labels": torch.tensor([0]),
        "vocab_size": len(student),
        "chunk_bytes": 1 << 20,
        "options": {},
    }


def triton_cases(make_example, world):
    """What the Triton kernels run of both ops: in the interpreter over gloo, on GPUs over NCCL."""
    cases, triton = {}, {"backend": "triton"}
    head = {"temperature": 3.0, "softcap": 4.0}
    for noise, options in ((None, {"ce_weight": 0.3, **head}), (0.05, {"divergence": "jsd"})):
        tempered = {key: options[key] for key in head if key in options}
        p = make_example(rows=6, noise=noise, with_bias=True, **tempered).cast(torch.float32, grad=False)
        more = {"chunk_bytes": 4 * 133 * 4, "options": options} | triton
        cases[world, "triton", noise] = case_of(p, SPANS[world], bias=True, **more)
    p = make_example(rows=4).cast(torch.float32, grad=False)
    for k, options in ((5, head), (100, {}), (400, {})):  # 100: more than some shards have
        cases[world, "triton topk", k] = case_of(p, SPANS[world], bias=True, k=k, options=options) | triton
    weight = p.weight.clone()
    weight[190:] = torch.nan
    padded = case_of(p, PADDED[world], vocab_size=190) | triton | {"weight": weight}
    cases[world, "triton padded topk"] = padded | {"k": 9}
    cases[world, "triton padded"] = padded | {
        "options": {"ce_weight": 0.3},
        "targets": make_example(rows=4, vocab_size=190).cast(torch.float32).targets,
        "labels": p.labels.clamp(max=189),
    }
    ties = torch.arange(203)[:, None].expand(-1, 24) // 40 / 24.0
    flat = {"hidden": torch.ones(2, 24), "weight": ties.clone()}
    cases[world, "triton ties"] = case_of(p, SPANS[world], k=50) | triton | flat
    broken = p.weight.clone()
    broken[150, 0] = torch.nan
    cases[world, "triton nan topk"] = case_of(p, SPANS[world], k=4) | triton | {"weight": broken}
    p = make_example(rows=3, hidden=8, vocab=1536).cast(torch.float32, grad=False)
    wide = [(1536 // world * r, 1536 // world * (r + 1)) for r in range(world)]
    cases[world, "triton groups"] = case_of(p, wide, vocab_size=1536, k=4) | triton
    return cases


def build_cases(make_example):
    cases = {}
    for world in (2, 4):
        for name, options in LOSSES.items():
            head = {key: options[key] for key in ("temperature", "softcap") if key in options}
            for noise in (None, 0.05):
                p = make_example(noise=noise, with_bias=True, **head).cast(torch.float64, grad=False)
                cases[world, name, noise] = case_of(p, SPANS[world], bias=True, options=options)
        for name, options in TOPS.items():
            p = make_example().cast(torch.float64, grad=False)
            for k in (5, 203, 400):
                cases[world, "topk", name, k] = case_of(p, SPANS[world], bias=True, k=k, options=options)
        p = make_example(vocab_size=190).cast(torch.float64, grad=False)
        padded = {"vocab_size": 190, "options": {"ce_weight": 0.3, "temperature": 2.0}}
        weight = p.weight.clone()
        weight[190:] = torch.nan  # nothing may come of the padding, not even times zero
        cases[world, "padded"] = case_of(p, PADDED[world], **padded) | {"weight": weight}
        cases[world, "padded topk"] = case_of(p, PADDED[world], vocab_size=190, k=9) | {"weight": weight}

        p = make_example(rows=40, hidden=64, vocab=203, k=16, noise=0.05, spread=0.35, dtype=torch.bfloat16, seed=3)
        cases[world, "bf16"] = case_of(p.cast(torch.bfloat16, grad=False), SPANS[world])
        p = make_example(rows=12, noise=0.1).cast(torch.float32, grad=False)
        mixed = {"options": {"ce_weight": 0.3, "temperature": 2.0}}
        cases[world, "fp32"] = cases[world, "again"] = case_of(p, SPANS[world], **mixed)
        cases[world, "checkpointed"] = case_of(p, SPANS[world], checkpointed=True, **mixed)
        batch = {name: t.unflatten(0, (3, 4)) for name, t in (("hidden", p.hidden.detach()), ("labels", p.labels))}
        batch["targets"] = [t.unflatten(0, (3, 4)) for t in p.targets]
        cases[world, "in batches"] = cases[world, "fp32"] | batch
        cases[world, "fp32 topk"] = cases[world, "fp32"] | {"k": 5, "options": {}}
        cases[world, "topk in batches"] = cases[world, "fp32 topk"] | batch
        cases[world, "frozen head"] = case_of(p, SPANS[world], frozen=True, **mixed)
        cases[world, "only the head"] = case_of(p, SPANS[world], grad_hidden=False, **mixed)
        ties = torch.arange(203)[:, None].expand(-1, 24) // 40 / 24.0
        cases[world, "ties"] = case_of(p, SPANS[world], k=50) | {"hidden": torch.ones(2, 24), "weight": ties.clone()}
        broken = p.weight.clone()
        broken[150, 0] = torch.nan
        nothing = p.labels.clone().fill_(-100)
        cases[world, "ignored"] = case_of(p, SPANS[world], **mixed) | {"labels": nothing}
        cases[world, "nan topk"] = case_of(p, SPANS[world], k=4) | {"weight": broken}
        hidden = p.hidden.clone()
        hidden[5, 2] = torch.nan
        cases[world, "nan row"] = case_of(p, SPANS[world]) | {"hidden": hidden}
        big = make_example(rows=256, hidden=4, vocab=2048, k=4).cast(torch.float32, grad=False)
        wide = [(2048 // world * r, 2048 // world * (r + 1)) for r in range(world)]
        cases[world, "large"] = case_of(big, wide, vocab_size=2048, chunk_bytes=16 * 2048 // world * 4)
        far = [100.0, 99.0, -100.0, -100.0, 60.0, -100.0]
        cases[world, "far tail"] = single(far, [2.0, 1.0, 0.5, 0.5, 1.5, 0.25], 3) | {
            "spans": [(0, 3), (3, 6)] if world == 2 else [(0, 2), (2, 3), (3, 4), (4, 6)]
        }
        gap = [(a + (a > 3), b) for a, b in SPANS[world]]
        cases[world, "gap"] = case_of(p, gap)
        cases[world, "unlike"] = case_of(p, SPANS[world], by_rank={1: {"chunk_bytes": 12345}})
        p = make_example(rows=4).cast(torch.float64, grad=False)
        cases[world, "no backend"] = case_of(p, SPANS[world], by_rank={1: {"backend": "triton"}})
        cases[world, "no topk backend"] = cases[world, "no backend"] | {"k": 3}
        cases[world, "refused"] = case_of(p, SPANS[world], by_rank={1: {"bias_Vs": torch.zeros(2)}})
        cases[world, "wrong type"] = case_of(p, SPANS[world], by_rank={1: {"vocab_size": "203"}})
        cases[world, "no tensor"] = case_of(p, SPANS[world], by_rank={1: {"bias_Vs": [0.0]}})
    return cases


def launch(folder, cases, world, device):
    """Each rank's results by case."""
    torch.save(cases, folder / "cases.pt")
    roots = [str(Path(kk.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(roots)}
    worker = Path(__file__).with_name("vocab_parallel_worker.py")
    arguments = [str(folder / "store"), str(folder / "cases.pt"), str(folder), device]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(world), *arguments], env=env, stderr=subprocess.PIPE
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=150)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def triton_runs(device):
    """Whether backend="triton" can run on this device in this process."""
    try:
        return kk.choose_backend("triton", device) == "triton"
    except kk.BackendUnavailableError:
        return False
