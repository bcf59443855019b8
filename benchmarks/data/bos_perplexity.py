"""A teacher's perplexity on held-out text, with what its tokenizer puts before a text (BOS) and without.

    python benchmarks/data/bos_perplexity.py --teacher FOLDER --work /tmp/bos --tokens 8192

Text and batches are those of a run's evaluation; both rows score the same tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.eval.quality import ScoringOptions, score_models
from kdscale.models.loading import load_tokenizer, read_tokenizer_config
from kdscale.models.tokenizer.tokenizing import NO_SPECIAL_TOKENS, document_end_id, special_tokens
from kdscale.runtime.progress import Reporter


def main() -> None:
    """Print a row with and a row without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--source", default="builtin:classics")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.teacher)
    own = special_tokens(tokenizer, read_tokenizer_config(args.teacher))
    options = ScoringOptions(torch.device("cpu"), getattr(torch, args.dtype))
    print("| before each text | tokens scored | perplexity |\n|---|---|---|", flush=True)
    for name, special in ((f"ids {list(own.prefix)}", own), ("nothing", NO_SPECIAL_TOKENS)):
        store = TokenStore.build(
            args.work / f"store-{len(special.prefix)}",
            DataConfig(sources=(SourceConfig(path=args.source),)),
            tokenizer,
            eos_id=document_end_id(tokenizer),
            reporter=Reporter(quiet=True),
            special=special,
        )
        batches = eval_batches(store.split("heldout"), args.seq_len, 4, args.tokens)
        scores, _ = score_models({"teacher": args.teacher}, batches, options, Reporter(quiet=True))
        ce_N = scores["teacher"].stats.ce_N.double().numpy()
        print(f"| {name} | {ce_N.size:,} | {np.exp(ce_N.mean()):.2f} |", flush=True)


if __name__ == "__main__":
    main()
