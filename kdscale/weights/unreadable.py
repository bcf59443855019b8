"""What a folder is that is no checkpoint to read: the errors say it and what to do, and open nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from kdscale.errors import CheckpointError
from kdscale.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # of an adapter as peft saves it
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
_CONVERT = (
    "convert it once, in a sandbox if you do not trust its author (a pickle can run code when it is opened):\n"
    "            AutoModelForCausalLM.from_pretrained({src!r}).save_pretrained({dst!r}, safe_serialization=True)\n"
    "            AutoTokenizer.from_pretrained({src!r}).save_pretrained({dst!r})"
)
_LISTED = 8  # names an error spells out before it says how many more there are


def no_config(folder: Path) -> CheckpointError:
    """The error for a folder without config.json; it says what the folder is where that can be seen."""
    expected, got, hint = "a folder with config.json and *.safetensors", None, None
    below = sorted(path.parent for path in (*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")))
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_json(folder / ADAPTER_CONFIG, CheckpointError)
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        got = "an adapter" + (f" of {base}" if isinstance(base, str) else "")
        hint = "give its base model as teacher.path, and this folder in teacher.adapters"
    elif below:
        hint = f"is it to be {below[0]}?"
    elif any(folder.glob("*.gguf")):
        got = "GGUF files"
        hint = "give the original Hugging Face folder, or convert a file: kdscale get-teacher FILE.gguf FOLDER"
    elif (folder / "params.json").is_file():
        got, hint = "a checkpoint in its author's own format", "give the model in the Hugging Face format"
    return CheckpointError(f"{folder / 'config.json'} is missing", expected=expected, got=got, hint=hint)


def no_weights(folder: Path) -> CheckpointError:
    """The error for a folder that has neither model.safetensors nor an index; it depends on what is there."""
    files = sorted(item.name for item in folder.iterdir())
    expected = f"{SINGLE_FILE}, or {INDEX_FILE} and its shards"
    tensors = [name for name in files if name.endswith(".safetensors")]
    pickles = [name for name in files if any(fnmatch.fnmatchcase(name, glob) for glob in _PICKLES)]
    if ADAPTER_CONFIG in files:
        hint: str | None = (
            "this is an adapter: give its base model as teacher.path, and this folder in teacher.adapters"
        )
    elif tensors:
        hint = "the index is missing: download it again" if len(tensors) > 1 else f"is it to be named {SINGLE_FILE}?"
    elif pickles:
        hint = _CONVERT.format(src=str(folder), dst=f"{folder}-safetensors")
    else:
        hint = None
    got = listed(tensors or pickles) if tensors or pickles else "no weight files"
    if pickles and not tensors:
        got = f"pickle files only, which are never opened: {got}"
    return CheckpointError(f"{folder} has no weights that can be read", expected=expected, got=got, hint=hint)


def listed(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
