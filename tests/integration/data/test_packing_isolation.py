"""Documents packed into one sequence must not see each other: transformers' mask, from our position ids alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.data.batches import PackedLoader
from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.models.tokenizer.tokenizing import document_end_id
from kdscale.runtime.progress import Reporter


@pytest.fixture(scope="module")
def store(tiny_llama_dir: Path, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("isolation")
    for i, text in enumerate(tiny_texts):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return TokenStore.build(
        folder / "store",
        DataConfig(sources=(SourceConfig(path=str(folder)),), heldout_fraction=0.3),
        tokenizer,
        eos_id=document_end_id(tokenizer),
        reporter=Reporter(quiet=True),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_packed_logits_equal_lone_logits(tiny_llama_dir: Path, store: TokenStore, attention: str, kind: str):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32, attn_implementation=attention)
    if kind == "train":
        (batch,), _ = next(PackedLoader(store.split("train"), 256, 3, 3, seed=0).batches())
    else:
        batch = eval_batches(store.split("heldout"), 96, 3, 250)[0]
    with torch.no_grad():
        packed_BSV = model(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
        shared = 0
        for ids, positions, packed_SV in zip(batch.input_ids_BS, batch.position_ids_BS, packed_BSV, strict=True):
            starts = [*np.flatnonzero(positions.numpy() == 0).tolist(), len(ids)]
            for begin, end in pairwise(starts):
                alone = model(input_ids=ids[None, begin:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed_SV[begin:end], alone, atol=1e-5, rtol=0)
                shared += begin > 0
        assert shared > 3, "the test needs sequences that hold several documents"
        # the same tokens under plain positions do see each other, so the comparison above can fail
        mixed_BSV = model(input_ids=batch.input_ids_BS, use_cache=False).logits
        assert (mixed_BSV - packed_BSV).abs().max() > 1e-2
