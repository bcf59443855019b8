"""Any ZeRO stage's checkpoint in any other, with and without offload: one process, a small model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdscale.config.distill.settings import DistillConfig
from kdscale.distill.checkpoint.rank_files import QUANTITIES, RankFileIndex, RankFileReader, write_rank_file
from kdscale.distill.checkpoint.zero_state import ZeroState
from kdscale.distill.parallel.deepspeed_config import deepspeed_config
from kdscale.distill.parallel.process_group import join_group

# stage, and what differs in distill.zero
WAYS = [(0, {}), (1, {}), (2, {}), (3, {}), (1, {"gradient_dtype": "bfloat16"}), (2, {"offload_optimizer": "cpu"}),
        (3, {"offload_optimizer": "cpu"})]  # fmt: skip
STEPS = 3


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embed(ids)))).float()


def make(way, dtype, seed):
    import deepspeed

    stage, zero = way
    torch.manual_seed(seed)
    model = Tied().to(dtype)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    cfg = DistillConfig(
        zero_stage=stage, zero={**zero, "reduce_bucket": 1000, "allgather_bucket": 1000}, global_batch=1, micro_batch=1
    )
    config = deepspeed_config(cfg, stage, bf16=dtype == torch.bfloat16, device="cpu") | {"gradient_clipping": 0.0}
    optimizer = torch.optim.AdamW(groups, lr=0.05, fused=True)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return made, ZeroState(made, model)


def train(made, first):
    losses = []
    for step in range(first, first + STEPS):
        ids = torch.randint(13, (8,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(made(ids), ids.roll(1))
        made.backward(loss)
        made.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16],
    ids=["float32", "bfloat16"],
)
def test_every_stage_goes_on_from_every_other(tmp_path, dtype):
    join_group(torch.device("cpu"))
    ways = [way for way in WAYS if "gradient_dtype" not in way[1]] if dtype == torch.float32 else WAYS[1:]  # no stage 0
    for number, old in enumerate(ways):
        made, state = make(old, dtype, seed=0)
        train(made, 0)
        path = tmp_path / f"{number}"
        write_rank_file(path, state.ranges, state.blocks())
        assert state.adam_step == STEPS
        assert state.tied == {"head.weight": "embed.weight"}
        assert state.shapes["embed.weight"] == (13, 6)
        index, saved = RankFileIndex([path], state.shapes), path.read_bytes()
        unbroken = train(made, STEPS)
        for new in ways if dtype == torch.float32 else (old, ways[number - 1], ways[number - 2]):
            other, loaded = make(new, dtype, seed=1)
            with RankFileReader(index) as reader:
                loaded.load(reader.fill, STEPS)
            assert loaded.adam_step == STEPS
            again = tmp_path / "again"
            write_rank_file(again, loaded.ranges, loaded.blocks())
            values = RankFileReader(index), RankFileReader(RankFileIndex([again], state.shapes))
            for quantity in QUANTITIES:
                for span in state.ranges:
                    left, right = torch.zeros(span.length), torch.ones(span.length)
                    values[0].fill(quantity, span, left)
                    values[1].fill(quantity, span, right)
                    assert torch.equal(left, right), (old, new, quantity, span)
            if new == old:
                assert again.read_bytes() == saved
                assert train(other, STEPS) == unbroken
            else:
                assert train(other, STEPS) == pytest.approx(unbroken, abs=1e-6 if dtype == torch.float32 else 1e-2)
