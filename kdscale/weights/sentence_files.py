"""The files of sentence-transformers beside an encoder's weights: which modules make an embedding of a text.

modules.json               the modules in order: Transformer, Pooling and, for vectors of length 1, Normalize
1_Pooling/config.json      how the pooling makes one vector of the hidden states
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kdscale.errors import CheckpointError
from kdscale.files import read_json, safe_join, write_json

MODULES = "modules.json"
_KNOWN = ("Transformer", "Pooling", "Normalize")
# Before version 6 the pooling's file has a flag for each way of pooling, since then the name of one.
_WIDTHS = ("word_embedding_dimension", "embedding_dimension")
_MODE = "pooling_mode"
_POOLINGS: dict[str, Literal["mean", "cls"]] = {
    "mean": "mean", "cls": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls",
}  # fmt: skip


def pooling_of(folder: Path) -> Literal["mean", "cls"] | None:
    """How the folder's embeddings are pooled; None where it has no modules.json.

    Raises CheckpointError for other modules, such as a matrix behind the pooling, and for other ways of pooling.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = read_json(folder / MODULES, CheckpointError, expect=list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "" for module in modules]
    if not set(kinds) <= set(_KNOWN) or kinds[:2] != ["Transformer", "Pooling"]:
        raise CheckpointError(
            f"{folder / MODULES}: type", expected=f"Transformer and Pooling, and at most {_KNOWN[2]} behind them",
            got=", ".join(kinds)[:300], hint="a model with further modules (Dense) cannot be distilled yet",
        )  # fmt: skip
    file = _pooling_file(folder, modules)
    settings = read_json(file, CheckpointError, expect=dict)
    said = settings.get(_MODE)
    on = [said] if isinstance(said, str) else [name for name, value in settings.items() if _is_on(name, value)]
    if len(on) != 1 or on[0] not in _POOLINGS:
        got = ", ".join(on) if said is None else repr(said)[:100]
        raise CheckpointError(f"{file}: {_MODE}", expected=" or ".join(_POOLINGS), got=got or "none of them")
    return _POOLINGS[on[0]]


def fit_pooling(folder: Path, hidden: Any) -> None:
    """Write the width of a student of `hidden` channels into its pooling file, where that says another one."""
    file = _pooling_file(folder, read_json(folder / MODULES, CheckpointError, expect=list))
    settings = read_json(file, CheckpointError, expect=dict)
    if any(settings.get(name, hidden) != hidden for name in _WIDTHS):
        write_json(file, {**settings, **{name: hidden for name in _WIDTHS if name in settings}})


def _is_on(name: str, value: Any) -> bool:
    """Whether this is the flag of a way of pooling that is taken."""
    return name.startswith(f"{_MODE}_") and value is True


def _pooling_file(folder: Path, modules: list[Any]) -> Path:
    path = next((m["path"] for m in modules if str(m.get("type", "")).endswith("Pooling") and "path" in m), None)
    if not isinstance(path, str) or not safe_join(folder, f"{path}/config.json").is_file():
        raise CheckpointError(f"{folder / MODULES}", expected="the folder of the pooling's config.json", got=repr(path))
    return safe_join(folder, f"{path}/config.json")
