"""Which training sequences pruning looks at: to collect statistics, and to score candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.root import Config
from kdscale.errors import DataError

if TYPE_CHECKING:
    from kdscale.data.batches import Batch


def scoring_batches(config: Config, data: Path) -> list[Batch]:
    """Training sequences halfway between the calibration's, so that no regression has seen them.

    Held-out text stays unseen by every choice: it is what the student is judged on.
    """
    from kdscale.data.batches import PackedLoader
    from kdscale.data.token_store import TokenStore

    settings = config.importance
    split = TokenStore.open(data).split("train")
    loader = PackedLoader(split, settings.seq_len, settings.micro_batch, settings.micro_batch, config.seed)
    epoch = loader.epoch_sequences
    calibrating = -(-settings.calibration_tokens // settings.seq_len)
    seen = set(loader.spread(range(epoch), calibrating))
    free = [number for number in range(epoch) if number not in seen] or list(range(epoch))
    wanted = min(-(-config.prune.search.masked_tokens // settings.seq_len), len(free))
    numbers = loader.spread(free, wanted, halfway=True)
    return [loader.stack(numbers[i : i + settings.micro_batch]) for i in range(0, wanted, settings.micro_batch)]


def calibration_batches(config: Config, data: Path) -> list[Batch]:
    """Training sequences spread evenly over one epoch, so that every source and author is among them."""
    from kdscale.data.batches import PackedLoader
    from kdscale.data.token_store import TokenStore

    settings = config.importance
    split = TokenStore.open(data).split("train")
    loader = PackedLoader(split, settings.seq_len, settings.micro_batch, settings.micro_batch, config.seed)
    wanted = -(-settings.calibration_tokens // settings.seq_len)
    if wanted > loader.epoch_sequences:
        raise DataError(
            "importance.calibration_tokens is more than there is to train on",
            expected=f"at most {loader.epoch_sequences * settings.seq_len:,} tokens",
            got=f"{settings.calibration_tokens:,}",
            hint="lower it, or add text to data.sources",
        )
    numbers = loader.spread(range(loader.epoch_sequences), wanted)
    return [loader.stack(numbers[i : i + settings.micro_batch]) for i in range(0, wanted, settings.micro_batch)]
