"""Every encoder's documents in one row are what transformers makes of each of them alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from kdscale.families import decoder_types, supported_types
from kdscale.models.attention import documents_apart
from kdscale.models.head import final_hidden, head_of
from kdscale.models.loading import auto_class
from tests.integration.prune.family_table import tiny_config

LENGTHS = [[5, 20, 7], [1, 31]]  # of the documents on each row; some are longer than a window


@pytest.mark.parametrize("model_type", sorted(set(supported_types()) - set(decoder_types())))
def test_logits_of_packed_documents_are_those_of_each_alone(model_type: str) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model(**tiny_config(model_type))
    model = auto_class(config.to_dict()).from_config(config, dtype=torch.float64).eval()
    positions_BS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    ids_BS = torch.randint(2, 60, positions_BS.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone = [
            model(input_ids=part[None]).logits[0]
            for row, lengths in zip(ids_BS, LENGTHS, strict=True)
            for part in row.split(lengths)
        ]
        with documents_apart(model):
            hidden_BSH = final_hidden(model, ids_BS, positions_BS)
        head = head_of(model)
        packed = torch.nn.functional.linear(hidden_BSH, head.weight_VH, head.bias_V).flatten(0, 1)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-9, rtol=0)
