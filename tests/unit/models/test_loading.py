"""Loading a tokenizer: one that transformers reads otherwise than tokenizer.json says is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, pre_tokenizers

from kdscale.errors import CheckpointError
from kdscale.models.loading import load_model, load_tokenizer, model_on_meta


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, tmp_path)
    return tmp_path


def rebuilt_by_class(folder: Path, tokenizer_class: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class}))


def test_a_tokenizer_that_gives_its_own_ids_is_loaded(folder: Path) -> None:
    assert load_tokenizer(folder)("the river")["input_ids"]


def test_other_ids_than_the_file_gives_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers below 5.22 did with byte-level files of the class LlamaTokenizerFast: every space was dropped."""
    original = transformers.AutoTokenizer.from_pretrained

    def drop_spaces(*args: Any, **options: Any) -> Any:
        tokenizer = original(*args, **options)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", drop_spaces)
    with pytest.raises(CheckpointError, match=r"as another one(.|\n)*expected: ids \[(.|\n)*got: +ids \["):
        load_tokenizer(folder)


def test_a_class_that_rebuilds_the_file_is_refused(folder: Path) -> None:
    """A byte-level file with its own way to split, named GPT2Tokenizer: transformers puts GPT-2's in its place."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    every_character = pre_tokenizers.Split(Regex("."), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([every_character, byte_level])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder)
    rebuilt_by_class(folder, "GPT2Tokenizer")
    with pytest.raises(CheckpointError, match="from the class GPT2Tokenizer"):
        load_tokenizer(folder)


def test_a_bare_exception_of_the_library_is_translated(folder: Path) -> None:
    rebuilt_by_class(folder, "BertTokenizer")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {"type": "Nonsense"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"no usable tokenizer(.|\n)*tokenizer_class"):
        load_tokenizer(folder)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_device_gets_its_tensors_one_by_one_and_the_buffers_of_the_cpu(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not through a copy in host memory, and with rotary frequencies of the same bits as a skeleton's."""
    original = transformers.AutoModelForCausalLM.from_pretrained
    asked: list[Any] = []

    def elsewhere(*args: Any, **options: Any) -> Any:
        asked.append(options.pop("device_map", None))
        model, info = original(*args, **options)
        model.model.rotary_emb.inv_freq *= 1.001  # as another device computes them
        return model, info

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", elsewhere)
    device = torch.device("meta")
    loaded = load_model(tiny_llama_dir, dtype=torch.float32, device=device)
    assert asked == [{"": device}]
    expected = model_on_meta(tiny_llama_dir).model.rotary_emb.inv_freq
    assert torch.equal(loaded.model.rotary_emb.inv_freq, expected)
    load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    assert asked[1:] == [None]


def test_every_parameter_goes_to_the_device(tiny_llama_dir: Path) -> None:
    loaded = load_model(tiny_llama_dir, dtype=torch.bfloat16, device=torch.device("meta"))
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in loaded.parameters())
