"""Which training sequences pruning looks at, to collect statistics and to score candidates, and which quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.calibration import CalibrationSection
from kdscale.config.root import Config
from kdscale.errors import DataError

if TYPE_CHECKING:
    from kdscale.data.batches import Batch, PackedLoader


def scoring_batches(config: Config, data: Path) -> list[Batch]:
    """Training sequences halfway between the calibration's, so that no regression has seen them.

    Held-out text stays unseen by every choice: it is what the student is judged on.
    """
    settings, loader = config.importance, training_loader(config, config.importance, data)
    epoch = loader.epoch_sequences
    calibrating = -(-settings.calibration_tokens // settings.seq_len)
    seen = set(loader.spread(range(epoch), calibrating))
    free = [number for number in range(epoch) if number not in seen] or list(range(epoch))
    wanted = min(-(-config.prune.search.masked_tokens // settings.seq_len), len(free))
    return _stacked(loader, loader.spread(free, wanted, halfway=True), settings.micro_batch)


def calibration_batches(config: Config, data: Path) -> list[Batch]:
    """Training sequences spread evenly over one epoch, so that every source and author is among them."""
    settings, loader = config.importance, training_loader(config, config.importance, data)
    wanted = -(-settings.calibration_tokens // settings.seq_len)
    if wanted > loader.epoch_sequences:
        raise DataError(
            "importance.calibration_tokens is more than there is to train on",
            expected=f"at most {loader.epoch_sequences * settings.seq_len:,} tokens",
            got=f"{settings.calibration_tokens:,}",
            hint="lower it, or add text to data.sources",
        )
    return _stacked(loader, loader.spread(range(loader.epoch_sequences), wanted), settings.micro_batch)


def quantization_batches(config: Config, data: Path) -> list[Batch]:
    """The same for quantisation, as many as the config asks for; all of an epoch where there are fewer."""
    settings = config.quantize
    assert settings is not None, "a run without this section quantises nothing"
    loader = training_loader(config, settings, data)
    wanted = min(-(-settings.calibration_tokens // settings.seq_len), loader.epoch_sequences)
    return _stacked(loader, loader.spread(range(loader.epoch_sequences), wanted), settings.micro_batch)


def training_loader(config: Config, settings: CalibrationSection, data: Path) -> PackedLoader:
    """The training text as sequences of the section's length, in the order in which it is trained on."""
    from kdscale.data.batches import PackedLoader
    from kdscale.data.token_store import TokenStore

    split = TokenStore.open(data).split("train")
    return PackedLoader(split, settings.seq_len, settings.micro_batch, settings.micro_batch, config.seed)


def _stacked(loader: PackedLoader, numbers: Sequence[int], micro_batch: int) -> list[Batch]:
    return [loader.stack(numbers[i : i + micro_batch]) for i in range(0, len(numbers), micro_batch)]
