"""Every encoder's documents in one row are what transformers makes of each of them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kdscale.families import decoder_types, supported_types
from kdscale.models.attention import documents_apart
from kdscale.models.head import final_hidden, head_of
from kdscale.models.loading import auto_class
from tests.integration.prune.family_table import architectures, tiny_config

LENGTHS = [[5, 20, 7], [1, 31]]  # of the documents on each row; some are longer than a window


ENCODERS = sorted(set(supported_types()) - set(decoder_types()))


def model_of(model_type: str, architecture: str | None = None, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**tiny_config(model_type, architecture), **changes})
    return auto_class(config.to_dict()).from_config(config, dtype=torch.float64).eval()


def packed_and_alone(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits at all positions of the rows, positions, what transformers makes of each document)."""
    positions_BS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    ids_BS = torch.randint(2, 60, positions_BS.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone = [
            model(input_ids=part[None]).logits
            for row, lengths in zip(ids_BS, LENGTHS, strict=True)
            for part in row.split(lengths)
        ]
        with documents_apart(model):
            hidden_BSH = final_hidden(model, ids_BS, positions_BS)
        head = head_of(model)
        packed = torch.nn.functional.linear(hidden_BSH, head.weight_VH, head.bias_V)
    return packed, positions_BS, torch.cat([logits.flatten(0, -2) for logits in alone])


@pytest.mark.parametrize("model_type", ENCODERS)
def test_logits_of_packed_documents_are_those_of_each_alone(model_type: str) -> None:
    packed, _, alone = packed_and_alone(model_of(model_type))
    torch.testing.assert_close(packed.flatten(0, 1), alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "changes"), [*((name, {}) for name in ENCODERS), ("modernbert", {"classifier_pooling": "mean"})]
)
def test_classes_of_packed_documents_are_those_of_each_alone(model_type: str, changes: dict[str, Any]) -> None:
    architecture = next(name for name in architectures(model_type) if name.endswith("ForSequenceClassification"))
    packed, positions_BS, alone = packed_and_alone(model_of(model_type, architecture, num_labels=3, **changes))
    assert alone.shape == (5, 3)
    torch.testing.assert_close(packed[positions_BS == 0], alone, atol=1e-9, rtol=0)
