"""Final hidden states and head together give the model's own logits, whatever it does to them."""

from __future__ import annotations

import pytest
import torch

from kdscale.models.head import final_hidden, head_of
from tests.integration.prune.family_table import tiny_config


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("granite", {}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("gpt2", {}),
        ("mixtral", {}),
        ("phi", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),  # head bias
        ("cohere", {}),
    ],
)
def test_logits_are_the_models(model_type, changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    known = tiny_config(model_type) if model_type != "phi" else {"model_type": model_type}
    torch.manual_seed(3)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**known, **tokens, **changes})).eval()
    head = head_of(model)
    if head.bias_V is not None:
        torch.nn.init.normal_(head.bias_V)
    ids_BS = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids_BS, use_cache=False).logits
        torch.testing.assert_close(head.logits(final_hidden(model, ids_BS)), expected, rtol=1e-5, atol=1e-5)


def test_a_scale_that_a_head_with_a_bias_has_is_the_biases_too():
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(3)
    model = PhiForCausalLM(PhiConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    ids_BS = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids_BS, use_cache=False).logits * 0.5
        model.config.logits_scaling = 2.0
        got = head_of(model).logits(final_hidden(model, ids_BS))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
