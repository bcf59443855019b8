"""Send what libraries print to a log file instead of the console."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet(log_path: Path) -> Iterator[None]:
    """Send what DeepSpeed and gloo print (also from C++, hence the descriptor) to a log file instead of the console."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    kept = os.dup(1)
    with log_path.open("a", encoding="utf-8") as log, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        os.dup2(log.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
    logger = logging.getLogger("DeepSpeed")
    if not any(getattr(handler, "baseFilename", "") == str(log_path.absolute()) for handler in logger.handlers):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(logging.FileHandler(log_path, encoding="utf-8"))
