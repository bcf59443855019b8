"""Heads split over 2 and 4 gloo processes against one process with the whole head.

One launch of four processes runs every case (those of two ranks in a group of world ranks 1 and 3); each test then
looks at its case. The truth is the twin in fp64 on the concatenated head.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference

INF = float("inf")
CUDA = torch.cuda.is_available()
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


@pytest.fixture(scope="module")
def ran(make_example, tmp_path_factory):
    """{case: (the case, each rank's result in order of the group's ranks)}."""
    cases = build_cases(make_example)
    if triton_runs("cpu"):
        cases |= triton_cases(make_example, 2) | triton_cases(make_example, 4)
    found = launch(tmp_path_factory.mktemp("vocab-parallel"), cases, 4, "cpu")
    return {
        name: (case, [found[rank][name] for rank in ((1, 3) if name[0] == 2 else range(4))])
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def ran_on_gpus(make_example, tmp_path_factory):
    """The same of the Triton cases, over NCCL on as many GPUs as there are (1, 2 or 4)."""
    world = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())
    cases = triton_cases(make_example, world)
    found = launch(tmp_path_factory.mktemp("vocab-parallel-gpu"), cases, world, "cuda")
    return {name: (case, [rank[name] for rank in found]) for name, case in cases.items()}


def triton_runs(device):
    """Whether backend="triton" can run on this device in this process."""
    try:
        return kk.choose_backend("triton", device) == "triton"
    except kk.BackendUnavailableError:
        return False


def whole_gradients(case, results):
    """Each rank's (equal) gradient of the hidden states, and the shards' put together; checks they are equal."""
    hidden = [r["grads"][0] for r in results]
    assert all(torch.equal(hidden[0], other) or hidden[0].isnan().any() for other in hidden[1:])
    parts = sorted(zip(case["spans"], results, strict=True), key=lambda pair: pair[0])
    weight = torch.cat([r["grads"][1] for _, r in parts])
    bias = torch.cat([r["grads"][2] for _, r in parts]) if case["bias"] is not None else None
    return hidden[0], weight, bias


def truth(case):
    """The fp64 twin's (sums, gradients of hidden, the whole weight, the whole bias)."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_() for t in map(case.get, ("hidden", "weight", "bias"))
    ]
    spans = sorted(case["spans"])
    shards = [leaves[1][a:b] for a, b in spans]
    biases = None if leaves[2] is None else [leaves[2][a:b] for a, b in spans]
    targets = [t.double() if t.is_floating_point() else t for t in case["targets"]]
    sums = reference.vocab_parallel_sparse_kl(
        leaves[0],
        shards,
        *targets,
        vocab_size=case["vocab_size"],
        bias_shards=biases,
        labels_N=case["labels"],
        **case["options"],
    )
    (sums.loss_sum * 0.37).backward()
    return sums, [None if t is None else t.grad for t in leaves]


def same_on_all(results):
    first = results[0]["sums"]
    return all(torch.equal(first[key], r["sums"][key]) for r in results for key in first)


def check_against_truth(ran, name, tol):
    case, results = ran[name]
    want, want_grads = truth(case)
    assert same_on_all(results)
    for field, got in results[0]["sums"].items():
        torch.testing.assert_close(got.double(), getattr(want, field).detach().double(), rtol=tol, atol=tol)
    for actual, expected in zip(whole_gradients(case, results), want_grads, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual.double(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("noise", [None, 0.05])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_the_whole_heads(ran, world, name, noise):
    check_against_truth(ran, (world, name, noise), 1e-9)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", TOPS)
@pytest.mark.parametrize("k", [5, 203, 400])
def test_topk_equals_the_whole_heads(ran, world, name, k):
    case, results = ran[world, "topk", name, k]
    want = kk.linear_topk_lse(case["hidden"], case["weight"], k, bias_V=case["bias"], **case["options"])
    for result in results:
        ids, logits, lse = result["top"]
        assert torch.equal(ids, want.ids_NK)
        torch.testing.assert_close(logits, want.logits_NK, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, want.lse_N, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_equal_logits_on_different_ranks_come_in_order_of_id(ran, world):
    case, results = ran[world, "ties"]
    want = kk.linear_topk_lse(case["hidden"], case["weight"], 50)
    assert all(torch.equal(r["top"][0], want.ids_NK) for r in results)


@pytest.mark.parametrize("world", [2, 4])
def test_padding_takes_no_part(ran, world):
    """vocab_size ends inside one shard (two ranks), or before the last one starts (four)."""
    case, results = ran[world, "padded"]
    cut = case | {"weight": case["weight"].nan_to_num(0.0)}
    want, want_grads = truth(cut)
    torch.testing.assert_close(results[0]["sums"]["loss_sum"], want.loss_sum.detach(), rtol=1e-9, atol=1e-9)
    hidden, weight, _ = whole_gradients(case, results)
    torch.testing.assert_close(hidden, want_grads[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight, want_grads[1], rtol=1e-9, atol=1e-9)
    assert not weight[190:].any()
    case, results = ran[world, "padded topk"]
    top = kk.linear_topk_lse(case["hidden"], case["weight"], 9, vocab_size=190)
    assert all(torch.equal(r["top"][0], top.ids_NK) for r in results)


@pytest.mark.parametrize("world", [2, 4])
def test_fp32_and_bf16_keep_their_digits(ran, world):
    check_against_truth(ran, (world, "fp32"), 1e-4)
    case, results = ran[world, "bf16"]
    _, want = truth(case)
    for actual, expected in zip(whole_gradients(case, results)[:2], want[:2], strict=True):
        assert actual.dtype == torch.bfloat16
        assert float((actual.double() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("world", [2, 4])
def test_same_bits_twice_and_when_checkpointed(ran, world):
    _, once = ran[world, "fp32"]
    for name in ("again", "checkpointed"):
        for a, b in zip(once, ran[world, name][1], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a["grads"][:2], b["grads"][:2], strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_sequences_of_a_batch_are_rows(ran, world):
    for rows, batch in zip(ran[world, "fp32"][1], ran[world, "in batches"][1], strict=True):
        assert all(torch.equal(rows["sums"][name], batch["sums"][name]) for name in rows["sums"])
        assert torch.equal(rows["grads"][0].unflatten(0, (3, 4)), batch["grads"][0])
        assert torch.equal(rows["grads"][1], batch["grads"][1])
    for rows, batch in zip(ran[world, "fp32 topk"][1], ran[world, "topk in batches"][1], strict=True):
        assert all(torch.equal(a.unflatten(0, (3, 4)), b) for a, b in zip(rows["top"], batch["top"], strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_only_what_is_wanted_is_made(ran, world):
    case, results = ran[world, "fp32"]
    hidden, weight, _ = whole_gradients(case, results)
    frozen = ran[world, "frozen head"][1]
    assert all(r["grads"][1] is None and torch.equal(r["grads"][0], hidden) for r in frozen)
    case, alone = ran[world, "only the head"]
    assert all(r["grads"][0] is None for r in alone)
    parts = [r["grads"][1] for _, r in sorted(zip(case["spans"], alone, strict=True), key=lambda pair: pair[0])]
    assert torch.equal(torch.cat(parts), weight)


@pytest.mark.parametrize("world", [2, 4])
def test_nothing_valid(ran, world):
    case, results = ran[world, "ignored"]
    assert float(results[0]["sums"]["loss_sum"]) == 0.0
    assert not any(g.any() for g in whole_gradients(case, results)[:2])


@pytest.mark.parametrize("world", [2, 4])
def test_nan_poisons_its_row_on_every_rank(ran, world):
    _, results = ran[world, "nan row"]
    good = [row for row in range(12) if row != 5]
    for result in results:
        assert result["sums"]["loss_sum"].isnan()
        assert result["grads"][0][5].isnan().all()
        assert result["grads"][0][good].isfinite().all()
    _, results = ran[world, "nan topk"]
    assert all(r["top"][2].isnan().all() for r in results)


@pytest.mark.parametrize("world", [2, 4])
def test_a_tail_far_below_the_rest_still_pulls(ran, world):
    """Shards 160 and 200 nats below the largest logit: one row constant for all would lose them in fp32."""
    check_against_truth(ran, (world, "far tail"), 1e-5)
    case, results = ran[world, "far tail"]
    assert whole_gradients(case, results)[1][2:].abs().min() > 1e-3


@pytest.mark.parametrize("world", [2, 4])
def test_no_rows_by_vocabulary_array(ran, world):
    _, results = ran[world, "large"]
    assert all(0 < r["largest"] <= 16 * 2048 // world for r in results)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("no backend", "backend='triton': .*fp64", "rank 1 of the group refused"),
        ("no topk backend", "backend='triton': .*fp64", "rank 1 of the group refused"),
        ("gap", r"cover 0\.\.203 once", r"cover 0\.\.203 once"),
        ("unlike", "same on all ranks", "same on all ranks"),
        ("refused", "bias_V", "rank 1 of the group refused"),
        ("wrong type", "vocab_size: expected an integer of at least 1, got '203'", "rank 1 of the group refused"),
        ("no tensor", "bias_V: expected a tensor, got list", "rank 1 of the group refused"),
    ],
)
def test_a_wrong_call_is_an_error_everywhere_and_hangs_nobody(ran, world, name, own, others):
    _, results = ran[world, name]
    for rank, result in enumerate(results):
        with pytest.raises(ValueError, match=own if rank == 1 else others):
            raise ValueError(result["error"])


def test_no_process_group_is_a_readable_error(make_example, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    p = make_example().cast(torch.float32)
    with pytest.raises(RuntimeError, match="init_process_group"):
        kk.vocab_parallel_topk_lse(p.hidden, p.weight, 3, first_id=0, vocab_size=203)


def check_triton(ran, world):
    for noise in (None, 0.05):
        check_against_truth(ran, (world, "triton", noise), 1e-4)
    for k in (5, 100, 400):
        check_topk(*ran[world, "triton topk", k])
    check_topk(*ran[world, "triton groups"])
    check_topk(*ran[world, "triton ties"])
    check_topk(*ran[world, "triton padded topk"], vocab_size=190)
    assert all(r["top"][2].isnan().all() for r in ran[world, "triton nan topk"][1])
    case, results = ran[world, "triton padded"]
    want, want_grads = truth(case | {"weight": case["weight"].nan_to_num(0.0)})
    assert float(results[0]["sums"]["loss_sum"]) == pytest.approx(float(want.loss_sum.detach()), rel=1e-5)
    for actual, expected in zip(whole_gradients(case, results)[:2], want_grads[:2], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def check_topk(case, results, **options):
    want = kk.linear_topk_lse(
        case["hidden"], case["weight"], case["k"], bias_V=case["bias"], backend="torch", **case["options"], **options
    )
    for result in results:
        ids, logits, lse = result["top"]
        assert torch.equal(ids, want.ids_NK)
        torch.testing.assert_close(logits, want.logits_NK, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want.lse_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_triton_kernels_equal_the_whole_heads(ran, world):
    if not triton_runs("cpu"):
        pytest.skip("needs triton's interpreter: TRITON_INTERPRET=1 set before triton is imported")
    check_triton(ran, world)


@pytest.mark.gpu
def test_triton_kernels_equal_the_whole_heads_over_nccl(request):
    if not CUDA or not triton_runs("cuda"):
        pytest.skip("needs a CUDA device and triton")
    found = request.getfixturevalue("ran_on_gpus")
    check_triton(found, next(iter(found))[0])
