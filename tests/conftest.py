"""Fixtures every test may use: a tiny random model on disk and a few deterministic documents."""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.hostile.nasty import COUNTS, counts_in_words

# A limit on a case's wall clock fails tests on a machine that is busy with something else; the hang limit is pytest's.
# The same cases in every run: what passes on one machine passes on the next.
settings.register_profile("kdscale", deadline=None, derandomize=True, database=None)
settings.load_profile("kdscale")
# Tests run side by side, a worker for each core: threads of a worker would wait for each other, and spin while they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the command line does for itself (cli/main.py), too late for those that import torch before it: forks of a server.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is first imported, which transformers does on its own. With a GPU its kernels are compiled.
if not (list(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

_WORDS = (
    "the river ran past an old mill and the children who lived there knew every stone of it by name while winter light "
    "fell slowly on fields of barley and the miller counted sacks of flour for a market that no one had seen in years"
).split()

_STAY_HERE = """#!/bin/sh
while [ "$1" = -o ] || [ "$1" = -T ]; do [ "$1" = -o ] && shift; shift; done
case "$1" in gone*) echo "ssh: connect to host $1: no route" >&2; exit 255;; esac
shift
exec sh -c "$*"
"""


@pytest.fixture
def fake_ssh(tmp_path: Path) -> Path:
    """An ssh that stays on this machine, whatever the host is called; `gone...` cannot be reached."""
    path = tmp_path / "stay-here"
    path.write_text(_STAY_HERE)
    path.chmod(0o755)
    return path


def _use_new_cache(factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDSCALE_CACHE", str(factory.mktemp("kdscale-cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of a session share no tokenised text with the user's runs."""
    yield from _use_new_cache(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def _own_cache_of_module(_own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share tokenised text within a module at most."""
    yield from _use_new_cache(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    rng = random.Random(7)
    return [" ".join(rng.choice(_WORDS) for _ in range(rng.randint(8, 60))).capitalize() + "." for _ in range(60)]


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_texts, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    """A random Llama (4 layers, hidden 96, 6 heads in 2 kv groups, tied head) saved as a standard checkpoint."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_tokenizer_file), eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=320,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.12,
    )
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests without looking for garbage, and never look through what they import again.

    Nothing of it goes away. To look through a million objects of modules again and again was a third of collecting,
    and half a second of every test that asks for it; in a fork it also copies every page that they are on.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish(session: Any) -> None:
    """Hand the counts of a worker of pytest-xdist to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["hostile"] = {where: dict(counts) for where, counts in COUNTS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up the counts of the workers."""
    for where, counts in getattr(node, "workeroutput", {}).get("hostile", {}).items():
        COUNTS.setdefault(where, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many cases of hostile input there were, and what became of them."""
    for line in counts_in_words():
        terminalreporter.write_line(line)
