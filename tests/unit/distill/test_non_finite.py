"""The guard's counting, and that its hooks name the module where a non-finite value first appears."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdscale.distill.non_finite import SkipGuard, by_rank, show_documents, stop_error, watch


def test_counts_in_a_row_and_in_all():
    guard = SkipGuard(2)
    for skipped in (True, False, True):
        guard.record(skipped)
    assert (guard.in_a_row, guard.total, guard.exhausted) == (1, 2, False)
    again = SkipGuard(2)
    again.restore(guard.state())
    again.record(True)
    assert (again.total, again.exhausted) == (3, True)


def test_a_checkpoint_waits_for_the_end_of_a_streak():
    guard, saved = SkipGuard(9), []
    for step, skipped in enumerate([False, True, True, False, False, True, False], start=1):
        guard.record(skipped)
        if guard.checkpoint_due(regular=step % 3 == 0):
            saved.append(step)
    assert saved == [4, 7]  # due at 3 and 6, both skipped


def test_the_rank_that_found_something_else_is_named():
    assert by_rank(["", "bad layer", ""]) == ["rank 1: bad layer"]
    assert by_rank(["a", "b", "a"]) == ["rank 0, 2: a", "rank 1: b"]
    assert by_rank(["a", "a"]) == ["a"]
    assert by_rank([""]) == []


def test_documents_are_named_once_and_not_by_the_hundred():
    batches = [SimpleNamespace(document_ids=[4, 4, 9]), SimpleNamespace(document_ids=[9, 2])]
    assert show_documents(batches) == "4, 9, 2"
    assert show_documents([SimpleNamespace(document_ids=list(range(30)))]).endswith("11 and 18 more")


class Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class BadBackward(nn.Module):
    def forward(self, x):
        return Root.apply(x) * 1.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*blocks)


def test_watch_finds_the_first_output():
    net = network()
    with torch.no_grad():
        net[1][0].bias[2] = float("nan")
    with watch(net, "student ") as found:
        net(torch.ones(2, 4)).sum().backward()
    assert found.forward == "student 1.0"


def test_watch_finds_the_first_gradient_and_leaves_no_hooks():
    net = network()
    net.insert(2, BadBackward())
    with watch(net, "") as found:
        net(torch.ones(2, 4)).sum().backward()
    assert (found.forward, found.backward) == ("", "1.1")  # the innermost module whose output enters the bad one
    assert not any(module._forward_hooks for module in net.modules())


def test_nothing_is_found_in_a_healthy_network():
    net = network()
    with watch(net, "") as found:
        net(torch.ones(2, 4)).sum().backward()
    assert (found.forward, found.backward) == ("", "")


def test_the_message_names_step_documents_and_layer():
    guard = SkipGuard(3)
    for _ in range(3):
        guard.record(True)
    error = stop_error(17, guard, [SimpleNamespace(document_ids=[5, 6])], ["", "output of model.layers.2"])
    assert error.exit_code == 6
    for part in ("step 17", "3 steps in a row", "documents 5, 6", "model.layers.2"):
        assert part in str(error)
    with pytest.raises(type(error)):
        raise error
