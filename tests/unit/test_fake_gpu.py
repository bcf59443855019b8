"""The fake GPU of the tests refuses what CUDA refuses, takes what CUDA takes, and notes what the host waits for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.fake_gpu.cuda import fake_gpu
from tests.fake_gpu.tensors import GPU, GpuTensor

MIXES = {
    "a sum": lambda there, here: there + here,
    "a sum into the CPU": lambda there, here: here.add_(there),
    "a sum into a scalar of the CPU": lambda there, _: torch.zeros(()).add_(there.sum()),
    "a product": lambda there, here: there @ here,
    "a join": lambda there, here: torch.cat([there, here]),
    "a scalar in a join": lambda there, _: torch.stack([there[0, 0], torch.ones(())]),
    "a look-up": lambda there, _: F.embedding(torch.tensor([1]), there),
    "a gather": lambda there, _: there.gather(1, torch.zeros(4, 4, dtype=torch.int64)),
    "a choice": lambda there, here: torch.where(here > 0, there, 0.0),
}

WAITS = {
    "item": (lambda x: x.sum().item(), 1),
    "bool": (lambda x: bool((x > 0).all()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "mask": (lambda x: x[x > 0], 1),
    "a list of rows": (lambda x: x[[0, 2]], 1),
    "rows by a tensor of the CPU": (lambda x: x[torch.tensor([0, 2])], 1),
    "unique": (lambda x: x.unique(), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "repeats": (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1], device=GPU), 0), 2),
    "from the host": (lambda x: torch.tensor([1.0], device=GPU), 1),
    "to the GPU": (lambda x: torch.ones(3).to(GPU), 1),
    "synchronize": (lambda x: torch.cuda.synchronize(), 1),
    "into pageable memory": (lambda x: torch.empty(4, 4).copy_(x, non_blocking=True), 1),
    "to the GPU without waiting": (lambda x: torch.ones(3).to(GPU, non_blocking=True), 0),
    "into pinned memory": (lambda x: torch.empty(4, 4, pin_memory=True).copy_(x, non_blocking=True), 0),
    "to where it is": (lambda x: x.to(GPU), 0),
    "rows by a tensor": (lambda x: x[torch.arange(2, device=GPU)], 0),
    "a number behind a mask": (lambda x: x.masked_fill(x > 0, 1.0).__setitem__(x > 0, 2.0), 0),
    "products": (lambda x: F.softmax(x @ x.T, -1).topk(2).values.sum(), 0),
}


@pytest.mark.parametrize("mix", MIXES)
def test_tensors_of_two_devices_do_not_mix(mix):
    with fake_gpu(), pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXES[mix](torch.ones(4, 4, device="cuda"), torch.ones(4, 4))


def test_scalars_and_copies_may_come_from_the_cpu():
    with fake_gpu():
        x = torch.arange(4.0, device="cuda")
        assert (x * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0, 6.0]
        x[1:3] = torch.tensor([7.0, 8.0])
        assert x.tolist() == [0.0, 7.0, 8.0, 3.0]
        assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_meta
        with pytest.raises(TypeError, match="can't convert cuda"):
            x.numpy()


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted(name):
    call, expected = WAITS[name]
    with fake_gpu() as syncs:
        x = torch.randn(4, 4, device="cuda")
        syncs.clear()
        with torch.inference_mode():
            call(x)
        assert syncs.total() == expected, str(syncs)
        syncs.clear()
        call(x)
    assert syncs.total() == expected, str(syncs)
    assert all("test_fake_gpu" in where for _, where in syncs.seen)


def test_gradients_and_parameters_are_those_of_a_cpu():
    torch.manual_seed(0)
    here = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    here[1].weight = here[0].weight
    there, ids = copy.deepcopy(here), torch.tensor([[1, 2, 3], [3, 0, 1]])
    with fake_gpu():
        there = there.to("cuda")
        assert there[0].weight is there[1].weight
        for model, device in ((here, "cpu"), (there, "cuda")):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(model(ids.to(device)).flatten(0, 1), ids.to(device).flatten()).backward()
                optimizer.step()
        twin = copy.deepcopy(there)
        assert isinstance(twin[0].weight, GpuTensor) and twin[0].weight is twin[1].weight
        moved = twin.to("cpu")[0].weight
    torch.testing.assert_close(moved, here[0].weight)


def test_a_meta_device_that_is_asked_for_stays_one():
    with fake_gpu():
        with torch.device("meta"):
            layer = nn.Linear(2, 2)
        assert layer.weight.is_meta and (layer.weight + 1).is_meta and torch.empty(2, device="meta").is_meta
        assert layer.to_empty(device="cuda").weight.is_cuda


def test_the_process_is_as_before():
    before = torch.cuda.is_available(), torch.get_num_threads()
    with fake_gpu():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available(), torch.get_num_threads()) == before
