from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdscale.config.distill.settings import DistillConfig
from kdscale.distill.parallel.mesh import Mesh

SIZES = st.integers(1, 4)


@given(SIZES, SIZES, SIZES)
def test_every_rank_is_in_one_group_of_each_kind_at_its_own_place(data: int, sequence: int, tensor: int) -> None:
    mesh = Mesh(data, sequence, tensor, 0)
    for groups, place in (
        (mesh.sequence_ranks, lambda member: member.sequence_rank),
        (mesh.tensor_ranks, lambda member: member.rank % tensor),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        for group in groups:
            members = [replace(mesh, rank=rank) for rank in group]
            assert [place(member) for member in members] == list(range(len(group)))
            assert len({member.data_rank for member in members}) == 1


def test_the_batch_is_shared_by_the_groups_that_take_sequences_of_their_own() -> None:
    for axis in ("sequence_parallel", "tensor_parallel"):
        cfg = DistillConfig(processes=8, **{axis: 4}, micro_batch=4, global_batch=8)
        assert cfg.data_parallel == 2
    with pytest.raises(ValidationError, match=r"micro_batch × data-parallel ranks \(6\)"):
        DistillConfig(processes=4, sequence_parallel=2, micro_batch=3, global_batch=8)
    with pytest.raises(ValidationError, match=r"multiple of sequence_parallel × tensor_parallel \(3\)"):
        DistillConfig(processes=4, tensor_parallel=3)


@pytest.mark.parametrize(
    "other",
    [
        {"sequence_parallel": 2},
        {"objectives": [{"name": "token_divergence", "targets": "full"}]},
        {"teacher_placement": "served", "served": {"urls": ["http://teacher"]}},
        {"zero_stage": 3, "zero": {"hpz_partition_size": 2}},
        {"zero_stage": 3, "zero": {"quantized_weights": True}},
        {"zero_stage": 3, "zero": {"quantized_gradients": True}},
    ],
)
def test_what_ranks_that_share_layers_cannot_do_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"tensor_parallel \(2\) does not go with"):
        DistillConfig(processes=8, global_batch=8, micro_batch=1, tensor_parallel=2, **other)


def test_sums_of_micro_batches_add_up_over_a_sequence_and_count_once_over_a_layer() -> None:
    rows = [[1.0, 10.0], [1.0, 10.0], [2.0, 20.0], [2.0, 20.0], [3.0, 30.0], [3.0, 30.0], [4.0, 40.0], [4.0, 40.0]]
    assert Mesh(2, 2, 2, 0).by_data(rows) == [3.0, 30.0, 7.0, 70.0]
