"""Which GPU a rank takes under which launcher, and what is refused before any work. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from kdscale.errors import ConfigError
from kdscale.runtime.gpu_binding import check_gpus, claim_gpu, rank_device

See = Callable[..., None]
CARDS = ["41", "61", "81", "a1"]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    """Let torch see these cards (their buses), in this order, and nothing of the machine's own."""
    chosen: list[torch.device] = []

    def show(*buses: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(buses))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(buses))
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(pci_domain_id=0, pci_bus_id=int(buses[index], 16), pci_device_id=0),
        )

    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    return show


def ranks(port: int, count: int) -> list[dict[str, str]]:
    return [{"LOCAL_RANK": str(rank), "MASTER_ADDR": "host", "MASTER_PORT": str(port)} for rank in range(count)]


# by launcher: what each of the ranks of one host sees, and the index that it takes of it
LAUNCHERS: dict[str, list[tuple[list[str], int]]] = {
    "torchrun, our own launcher: all see all": [(CARDS, 0), (CARDS, 1), (CARDS, 2), (CARDS, 3)],
    "Slurm, one GPU a task": [([card], 0) for card in CARDS],
    "Slurm, two GPUs a task": [(CARDS[:2], 0), (CARDS[2:], 1)],
    "half of the host's GPUs": [(CARDS[2:], 0), (CARDS[2:], 1)],
    "fewer ranks than GPUs": [(CARDS, 0), (CARDS, 1), (CARDS, 2)],
    "no launcher": [(CARDS, 0)],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_has_a_card_of_its_own(launcher: str, see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = LAUNCHERS[launcher]
    claims, cards = [], []
    for environment, (buses, index) in zip(ranks(1, len(seen)), seen, strict=True):
        see(*buses)
        monkeypatch.setenv("LOCAL_RANK", environment["LOCAL_RANK"])
        assert rank_device("auto") == torch.device("cuda", index)
        claims.append(claim_gpu("auto", environment))
        cards.append(buses[index])
    assert len(set(cards)) == len(cards)
    for claim in claims:
        claim.close()


@pytest.mark.parametrize(
    ("buses", "count"),
    [(["41"], 2), (CARDS[:2], 4), (["41", "41"], 2)],
    ids=["one GPU for two ranks", "two for four", "two slices of one MIG card"],
)
def test_two_ranks_on_one_card_are_refused_when_the_second_starts(
    buses: list[str], count: int, see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(*buses)
    claims = []
    with pytest.raises(ConfigError, match=r"which another rank has(.|\n)*--slots") as refusal:
        for environment in ranks(2, count):
            claims.append(claim_gpu("auto", {**environment, "CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}))
    assert f"local rank {len(claims)}\n" in str(refusal.value) and "CUDA_VISIBLE_DEVICES=MIG-1,MIG-2" in str(
        refusal.value
    )
    shared = ranks(2, count)[-1] | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}  # whoever says so may share a card
    claim_gpu("auto", shared).close()
    for claim in claims:
        claim.close()


def test_a_card_is_free_again_when_its_rank_ends_and_for_other_jobs(see: See) -> None:
    see("41")
    (one,), (other,) = ranks(3, 1), ranks(4, 1)
    first = claim_gpu("auto", one)
    claim_gpu("auto", other).close()
    with pytest.raises(ConfigError, match="card 0000:41:00"):
        claim_gpu("auto", one)
    first.close()
    claim_gpu("auto", one).close()


def test_more_ranks_than_gpus_are_refused_with_the_fields_that_ask_for_them(
    see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    see("41", "61")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    check_gpus("auto", {"distill.processes": 2})
    with pytest.raises(ConfigError) as refusal:
        check_gpus("auto", {"distill.processes": 8, "eval.processes": 1, "importance.processes": 4})
    message = str(refusal.value)
    assert message.startswith("distill.processes, importance.processes\n")
    assert "at most 2" in message and "CUDA_VISIBLE_DEVICES=4,6" in message and "distill.processes = 8" in message
    check_gpus("cpu", {"distill.processes": 8})
    see()
    check_gpus("auto", {"distill.processes": 8})
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        check_gpus("cuda", {})
