"""Heads split over 2 and 4 processes give what the whole head gives: the truth is the twin in fp64 on it.

One launch of four processes makes every call, those of two ranks in a group of their own; each test then looks at its
call. That is why they are one file: pytest-xdist gives each file to one worker.
"""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from tests.numerics.kernels.ops.vocab_parallel_cases import LOSSES, TOPS, build_cases, launch, triton_cases, triton_runs
from tests.numerics.kernels.ops.vocab_parallel_checks import check_against_truth, truth, whole_gradients

CUDA = torch.cuda.is_available()


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
def test_a_tail_far_below_the_rest_still_pulls(ran, world):
    """Shards 160 and 200 nats below the largest logit: one row constant for all would lose them in fp32."""
    check_against_truth(ran, (world, "far tail"), 1e-5)
    case, results = ran[world, "far tail"]
    assert whole_gradients(case, results)[1][2:].abs().min() > 1e-3


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
