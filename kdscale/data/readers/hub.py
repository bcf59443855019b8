"""Data sets on the hub, streamed through the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdscale.config.data import SourceConfig
from kdscale.errors import DataError, ServiceError
from kdscale.runtime.packages import require_packages
from kdscale.weights.locate import hub_connection_errors


def read(name: str, source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of `hf:NAME` or `hf:NAME#CONFIG`.

    Raises ServiceError when the hub cannot be reached, ConfigError without the package `datasets`, DataError for a
    name that there is not.
    """
    name, _, config = name.removeprefix("hf:").partition("#")
    require_packages(f"data source {source.path}", ("datasets",), "datasets")
    from datasets import load_dataset

    unreachable: tuple[type[Exception], ...] = (OSError, RuntimeError, *hub_connection_errors())
    try:
        for number, record in enumerate(load_dataset(name, config or None, split=source.split, streaming=True)):
            yield f"{source.path} record {number}", record
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"data source {source.path} does not exist under this name",
            got=str(error),
            hint="check its name, configuration (hf:NAME#CONFIG) and split; a private one needs `hf auth login`",
        ) from error
    except unreachable as error:
        raise ServiceError(
            f"data source {source.path} cannot be fetched",
            got=str(error),
            hint="check the network and HF_HUB_OFFLINE, or download it and name the files",
        ) from error
