"""Models that answer side by side: what they say, what they remember, and `kdscale chat` in and out of a terminal."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.config.data import DataConfig
from kdscale.errors import ConfigError, DataError, LackOfMemoryError
from kdscale.eval import sizes
from kdscale.eval.chat import Answer, Chat
from kdscale.eval.samples import Sampling, continue_prompts
from kdscale.models.loading import load_model, load_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "data": DataConfig()}


@pytest.fixture(scope="module")
def models(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random models with a chat template, of other weights each."""
    from safetensors.torch import load_file, save_file

    folder, made = tmp_path_factory.mktemp("chat"), {}
    for name, factor in {"teacher": 1.0, "distilled": -1.0}.items():
        made[name] = Path(shutil.copytree(tiny_llama_dir, folder / name))
        (made[name] / "chat_template.jinja").write_text(TEMPLATE)
        weights = load_file(made[name] / "model.safetensors")
        weights["model.norm.weight"] *= factor
        save_file(weights, made[name] / "model.safetensors", metadata={"format": "pt"})
    return made


def last(chat: Chat, question: str, tokens: int = 6, **sampling: Any) -> dict[str, Answer]:
    return deque(chat.ask(question, chat.names, tokens, Sampling(**sampling)), maxlen=1).pop()


def alone(path: Path, text: str, tokens: int = 6) -> str:
    model = load_model(path, dtype=torch.float32, device=torch.device("cpu"))
    return continue_prompts(model, load_tokenizer(path), [text], tokens, Sampling())[0]


def test_each_model_answers_as_it_does_alone_and_remembers_its_own_words(models: dict[str, Path]) -> None:
    chat = Chat(models, **OPTIONS)
    first = {name: answer.text for name, answer in last(chat, "the mill").items()}
    assert first == {name: alone(path, "[user]the mill\n[assistant]") for name, path in models.items()}
    assert first["teacher"] != first["distilled"]
    second = {name: answer.text for name, answer in last(chat, "why").items()}
    talk = "[user]the mill\n[assistant]{}\n[user]why\n[assistant]"
    assert second == {name: alone(path, talk.format(first[name])) for name, path in models.items()}
    chat.forget()
    assert {name: answer.text for name, answer in last(chat, "the mill").items()} == first


def test_models_that_do_not_fit_together_say_the_same(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    together = last(Chat(models, **OPTIONS), "winter", temperature=0.8, top_p=0.9, seed=3)
    monkeypatch.setattr(sizes, "_SHARE_OF_FREE_MEMORY", 0.0)
    chat = Chat(models, **OPTIONS)
    assert not chat.together
    in_turn = last(chat, "winter", temperature=0.8, top_p=0.9, seed=3)
    assert {name: answer.text for name, answer in in_turn.items()} == {
        name: answer.text for name, answer in together.items()
    }
    assert not chat._loaded


def test_what_was_said_before_a_stop_is_remembered(models: dict[str, Path]) -> None:
    chat = Chat({"teacher": models["teacher"]}, **OPTIONS)
    steps = chat.ask("the mill", ["teacher"], 50, Sampling())
    said = [next(steps)["teacher"].text for _ in range(3)][-1]
    steps.close()  # type: ignore[attr-defined]
    after = last(chat, "and")["teacher"].text
    assert after == alone(models["teacher"], f"[user]the mill\n[assistant]{said}\n[user]and\n[assistant]")


def test_without_a_template_a_model_goes_on_from_the_text(tiny_llama_dir: Path) -> None:
    chat = Chat({"teacher": tiny_llama_dir}, **OPTIONS)
    assert not chat.templated
    first = last(chat, "The miller")["teacher"].text
    assert first == alone(tiny_llama_dir, "The miller")
    assert last(chat, "and")["teacher"].text == alone(tiny_llama_dir, f"The miller{first}\nand")


def test_a_lack_of_memory_is_said_and_the_next_question_is_answered(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(models, **OPTIONS)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace")

    with monkeypatch.context() as patch:
        patch.setattr("kdscale.eval.chat.load_model", fails)
        with pytest.raises(LackOfMemoryError, match=r"can't allocate memory[\s\S]*/models"):
            last(chat, "the mill")
    assert last(chat, "the mill")["teacher"].text


def test_a_conversation_longer_than_the_context_is_said(models: dict[str, Path]) -> None:
    chat = Chat({"teacher": models["teacher"]}, **OPTIONS)
    with pytest.raises(DataError, match=r"fewer than 512 tokens[\s\S]*/reset"):
        last(chat, "the mill " * 400)
    assert last(chat, "the mill")["teacher"].text  # and it was not remembered
    with pytest.raises(ConfigError, match="nobody"):
        next(chat.ask("x", ["nobody"], 1, Sampling()))
