"""Which families' attention can be shared by positions: packed, windowed, as transformers itself computes it."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from kdscale.errors import ConfigError
from kdscale.families import supported_types
from kdscale.models import sequence_parallel
from kdscale.models.head import final_hidden
from kdscale.models.sequence_parallel import Exchange, SequenceSlice
from tests.integration.prune.family_table import tiny_config

REFUSED = {"gemma2"}  # soft-capped attention
LENGTHS = [[5, 20, 7], [1, 1, 30], [32]]  # of the documents on each row, beyond every window of the table


def positions():
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def tiny_model(model_type):
    torch.manual_seed(3)
    config = AutoConfig.for_model(**tiny_config(model_type))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", sorted(set(supported_types()) - REFUSED))
def test_alone_it_is_the_familys_own_attention(model_type):
    model, position_BS = tiny_model(model_type), positions()
    ids_BS = torch.randint(1, 60, position_BS.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = final_hidden(model, ids_BS, position_BS)
        SequenceSlice(0, 2).prepare(model)
        got = final_hidden(model, ids_BS, position_BS, ulysses=Exchange(None, 1, position_BS))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        mixed = final_hidden(model, ids_BS, position_BS, ulysses=Exchange(None, 1, torch.arange(32).expand(3, -1)))
    assert float((mixed - want).abs().max()) > 1e-2  # documents that see each other do differ


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_attention_of_another_kind_is_refused(model_type):
    with pytest.raises(ConfigError, match=r"distill\.sequence_parallel"):
        model = tiny_model(model_type)
        SequenceSlice(0, 2).prepare(model)
        position_BS = positions()
        final_hidden(model, torch.ones_like(position_BS), position_BS, ulysses=Exchange(None, 1, position_BS))


def test_a_model_with_an_attention_of_its_own_is_refused():
    model = tiny_model("llama")
    model.config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match="eager"):
        SequenceSlice(0, 2).prepare(model)


def test_it_is_registered_under_a_name_of_ours_alone():
    SequenceSlice(0, 2).prepare(tiny_model("llama"))
    assert AttentionInterface()[sequence_parallel._NAME] is sequence_parallel._attend
    assert AttentionInterface()["sdpa"] is not sequence_parallel._attend
