"""Bytes a position, read speed and error of every codec of a store of targets, on text; DistillKit's codec beside them.

    PYTHONPATH=.:kernels:launch OMP_NUM_THREADS=1 python benchmarks/distill/target_store.py --run runs/demo

--run is a run that has been pruned (`kdscale prune CONFIG`): its text and its teacher are used. Reading is timed as a
training does it, from files that the system has in memory: index, checksum of every block, arrays; in processor seconds
of one core, which other work on the machine changes least. The error is KL(exact ‖ stored) in nats a position: of the
top K and one tail bucket, or over the whole vocabulary for hidden states. --distillkit names a checkout of
https://github.com/arcee-ai/DistillKit, whose codec is given the same top K (its two recommended settings).

N rows (positions), H hidden size, V vocabulary, K entries.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kdscale.config.load import load_config
from kdscale.config.target_store import CodecConfig, HiddenConfig, SampledConfig, TopKConfig
from kdscale.data.batches import PackedLoader
from kdscale.data.token_store import TokenStore
from kdscale.distill.step import to_device
from kdscale.models.head import OutputHead, final_hidden, head_of
from kdscale.models.loading import load_model
from kdscale.teacher.head_targets import TargetsFromHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.store.codecs import make_codec
from kdscale.teacher.store.format import Block, StoreHeader
from kdscale.teacher.store.reader import StoreReader
from kdscale.teacher.store.writer import ShardWriter, write_header
from kdscale.teacher.targets import Targets, TopKTargets

CODECS: list[CodecConfig] = [
    SampledConfig(draws=50),
    SampledConfig(draws=12),
    *(TopKConfig(top_k=64, bits=bits) for bits in (5, 6, 8, 16, 32)),
    TopKConfig(top_k=12),
    *(HiddenConfig(dtype=dtype) for dtype in ("int8", "float8", "bfloat16")),
]
DISTILLKIT = {
    "DistillKit k=50": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    "DistillKit k=128": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
}
PASSES = 9


class Text(NamedTuple):
    """What a model says about text: hidden states of the rows of each sequence, in its own head's terms."""

    batches: list[MicroBatch]
    hidden: list[torch.Tensor]  # [N, H] of each batch
    head: OutputHead

    @property
    def rows(self) -> int:
        """Of all sequences."""
        return sum(batch.rows for batch in self.batches)


@torch.no_grad()
def read_text(run: Path, model_dir: Path, sequences: int, length: int) -> Text:
    """Run a model over the first training sequences of a run, one a batch, in float32."""
    cpu = torch.device("cpu")
    loader = PackedLoader(TokenStore.open(run / "data").split("train"), length, 1, 1, seed=0)
    batches = [to_device(loader.stack([number]), cpu) for number in range(sequences)]
    model = load_model(model_dir, dtype=torch.float32, device=cpu)
    hidden = [
        final_hidden(model, batch.input_ids_BS, batch.position_ids_BS).flatten(0, 1)[batch.rows_N] for batch in batches
    ]
    return Text(batches, hidden, head_of(model).detached())


def write_store(folder: Path, settings: CodecConfig, text: Text) -> float:
    """Write a store with one shard; returns the processor seconds of encoding and writing."""
    length = text.batches[0].input_ids_BS.shape[1]
    header = StoreHeader(
        codec=settings.model_dump(mode="json"), vocab_size=text.head.vocab, hidden_size=text.hidden[0].shape[1],
        seq_len=length, heldout=0, train=len(text.batches), shard_sequences=len(text.batches), share=1.0,
        dtype="float32", packing={}, made_from={},
    )  # fmt: skip
    write_header(folder, header)
    make = TargetsFromHead(settings.asks, text.head.vocab, seed=0)
    targets = [make(hidden_NH, text.head, batch) for hidden_NH, batch in zip(text.hidden, text.batches, strict=True)]
    codec, writer = make_codec(settings, header.vocab_size, header.hidden_size), ShardWriter(folder, header, 0)
    began = time.process_time()
    for batch, one in zip(text.batches, targets, strict=True):
        kept_S = np.zeros(length, np.bool_)
        kept_S[batch.rows_N.numpy()] = True
        writer.append(Block(kept_S, codec.encode(one), 0))
    spent = time.process_time() - began
    writer.finish()
    return spent


def read_seconds(folder: Path) -> float:
    """The median of several passes over a whole store, each opened anew, so that every checksum is verified."""
    times = []
    for _ in range(PASSES):
        reader = StoreReader(folder)
        began = time.process_time()
        for number in range(reader.header.train):
            reader.sequence("train", number)
        times.append(time.process_time() - began)
    return statistics.median(times)


def stored_error(folder: Path, settings: CodecConfig, text: Text) -> float | None:
    """KL(exact ‖ stored) a row; None for samples, which are exact."""
    reader, total = StoreReader(folder), 0.0
    for number, hidden_NH in enumerate(text.hidden):
        arrays = {name: torch.from_numpy(a) for name, a in reader.sequence("train", number).arrays.items()}
        if isinstance(settings, TopKConfig):
            exact = TargetsFromHead(settings.asks, text.head.vocab, 0)(hidden_NH, text.head, text.batches[number])
            total += top_k_divergence(exact, arrays["ids"].long(), arrays["logits"] - arrays["lse"][:, None])
        elif isinstance(settings, HiddenConfig):
            total += _hidden_divergence(hidden_NH, arrays, settings, text.head)
        else:
            return None
    return total / text.rows


def top_k_divergence(exact: Targets, ids_NK: torch.Tensor, logp_NK: torch.Tensor) -> float:
    """KL in nats, summed over rows, of the exact top K and its tail from log-probabilities of the same ids."""
    top: TopKTargets | None = exact.top_k
    assert top is not None
    order_NK, by_id_NK = ids_NK.argsort(1), top.ids_NK.argsort(1)
    logq_NK = logp_NK.gather(1, order_NK).double()
    logp_exact_NK = (top.logits_NK - top.lse_N[:, None]).gather(1, by_id_NK).double()
    both = [
        torch.cat([x, (1 - x.exp().sum(1, keepdim=True)).clamp_min(1e-12).log()], 1) for x in (logp_exact_NK, logq_NK)
    ]
    return float((both[0].exp() * (both[0] - both[1])).sum())


def _hidden_divergence(
    hidden_NH: torch.Tensor, arrays: dict[str, torch.Tensor], settings: HiddenConfig, head: OutputHead
) -> float:
    dtype = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}[settings.dtype]
    stored_NH = arrays["hidden"].view(dtype).float() * arrays["scale"]
    logp_NV, logq_NV = (head.logits(x).log_softmax(1) for x in (hidden_NH, stored_NH))
    return float((logp_NV.exp() * (logp_NV - logq_NV)).sum())


def measure_distillkit(checkout: Path, text: Text) -> list[tuple[str, float, float, float, float | None]]:
    """Its rows of the table, from its own functions: packing is timed with its own sorting, reading is unpacking."""
    sys.path.insert(0, str(checkout))
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    found: list[tuple[str, float, float, float, float | None]] = []
    for name, settings in DISTILLKIT.items():
        config: Any = DistributionQuantizationConfig(
            d=text.head.vocab, exact_dtype="bfloat16", term_dtype="float32", residual_bins=[], delta_encoding=False,
            **settings,
        )  # fmt: skip
        codec, make = LogprobCompressor(config), TargetsFromHead(TopKConfig(top_k=config.k).asks, text.head.vocab, 0)
        targets = [make(h, text.head, b) for h, b in zip(text.hidden, text.batches, strict=True)]
        sparse = [(t.top_k.ids_NK, t.top_k.logits_NK - t.top_k.lse_N[:, None]) for t in targets if t.top_k]
        began = time.process_time()
        packed = [codec.compress_from_sparse(ids, logp) for ids, logp in sparse]
        encoding = time.process_time() - began

        def read(packed: list[Any] = packed, codec: Any = codec) -> list[Any]:
            return [codec.decompress_to_sparse(row) for row in packed]

        seconds = statistics.median(_timed(read) for _ in range(PASSES))
        nbytes = sum(part.nbytes for row in packed for part in row.values())
        error = sum(top_k_divergence(t, ids, logp) for t, (ids, logp) in zip(targets, read(), strict=True))
        found.append((name, nbytes / text.rows, text.rows / encoding, text.rows / seconds, error / text.rows))
    return found


def _timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="The teacher's folder, where the run's config has none.")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--distillkit", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher = arguments.teacher or Path(load_config(arguments.run / "config.yaml").teacher.path)
    text = read_text(arguments.run, teacher, arguments.sequences, arguments.length)
    print(f"{text.rows:,} positions, vocabulary {text.head.vocab:,}, hidden size {text.hidden[0].shape[1]}\n")
    print("| codec | bytes a position | written a second | read a second | KL(exact ‖ stored) |")
    print("|---|---|---|---|---|")
    rows: list[tuple[str, float, float, float, float | None]] = []
    for settings in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            encoding = write_store(path, settings, text)
            nbytes = StoreReader(path).totals()[1]
            name = " ".join(
                f"{v}" if k == "name" else f"{k}={v}" for k, v in settings.model_dump().items() if k != "temperature"
            )
            rows.append((
                name, nbytes / text.rows, text.rows / encoding, text.rows / read_seconds(path),
                stored_error(path, settings, text),
            ))  # fmt: skip
    if arguments.distillkit is not None:
        rows += measure_distillkit(arguments.distillkit, text)
    for name, nbytes, written, read, error in rows:
        shown = "exact" if error is None else f"{error:.1e}"
        print(f"| {name} | {nbytes:.1f} | {written:,.0f} | {read:,.0f} | {shown} |")


if __name__ == "__main__":
    main()
