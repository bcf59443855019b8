"""Downstream tasks on a tiny model: the harness's own figures, the same items for all, ranks that share requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdscale.errors import CheckpointError, ConfigError, DataError
from kdscale.eval.downstream.harness import ScoreSettings, prepare, score
from kdscale.models.loading import load_model, load_tokenizer
from tests.integration.eval.conftest import TaskMaker
from tests.integration.forks import fork_ranks


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> tuple[Any, Any]:
    model = load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    return model, load_tokenizer(tiny_llama_dir)


def test_scores_are_those_of_the_harness_itself(tiny: tuple[Any, Any], task_maker: TaskMaker) -> None:
    """Its own class for transformers models and its own evaluator, in fp64, give the same likelihoods and scores."""
    import copy

    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny
    file = task_maker(more="num_fewshot: 2\n")
    prepared = prepare([str(file)], ScoreSettings())
    ours = score(model, tokenizer, prepared, ScoreSettings(batch_size=3))["toy"]
    reference = HFLM(pretrained=copy.deepcopy(model).double(), tokenizer=copy.copy(tokenizer), batch_size=1)
    task = prepared[0].parts[0].task
    task.set_fewshot_seed(1234)
    theirs = evaluate(lm=reference, task_dict={"tasks": {"toy": task}}, bootstrap_iters=0)  # type: ignore[typeddict-item]
    samples = theirs["samples"]["toy"]
    assert ours.metric == "acc_norm"
    assert ours.num_fewshot == 2
    assert ours.chance == 0.5
    assert ours.scores.tolist() == [sample["acc_norm"] for sample in samples]
    expected = []
    for sample in samples:
        values = [
            answer[0] / len(choice)
            for answer, choice in zip(sample["filtered_resps"], sample["doc"]["choices"], strict=True)
        ]
        right = sample["doc"]["label"]
        expected.append(values[right] - values[1 - right])
    assert ours.margins is not None
    np.testing.assert_allclose(ours.margins, expected, atol=1e-5)


def test_a_model_of_nan_has_no_accuracy(tiny_llama_dir: Path, tiny: tuple[Any, Any], task_maker: TaskMaker) -> None:
    model = load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    model.get_input_embeddings().weight.data[:] = torch.nan
    with pytest.raises(CheckpointError, match="no finite likelihood"):
        score(model, tiny[1], [str(task_maker())])


def test_a_limit_draws_the_same_items_for_every_model(tiny: tuple[Any, Any], task_maker: TaskMaker) -> None:
    file = str(task_maker(items=20))
    drawn = prepare([file], ScoreSettings(limit=7, seed=3))[0].parts[0].chosen
    assert len(drawn) == 7
    assert drawn == prepare([file], ScoreSettings(limit=7, seed=3))[0].parts[0].chosen
    assert drawn != prepare([file], ScoreSettings(limit=7, seed=4))[0].parts[0].chosen
    scores = score(*tiny, [file], ScoreSettings(limit=7, seed=3))["toy"]
    assert scores.ids == tuple(map(str, drawn))
    assert scores.available == 20


def test_texts_that_a_model_writes_are_scored(tiny: tuple[Any, Any], tmp_path: Path, task_maker: TaskMaker) -> None:
    file = task_maker()
    text = file.read_text().replace("multiple_choice", "generate_until").replace("doc_to_choice", "description")
    text = text.replace('"{{choices}}"', '""').replace("{metric: acc}, {metric: acc_norm}", "{metric: exact_match}")
    file.write_text(f"{text}generation_kwargs: {{max_gen_toks: 4, until: ['.']}}\n")
    scores = score(*tiny, [str(file)])["toy"]
    assert scores.metric == "exact_match"
    assert scores.margins is None
    assert set(scores.scores) <= {0.0, 1.0}


def test_drawn_texts_are_the_same_again(tiny: tuple[Any, Any]) -> None:
    """Whatever was drawn before: in another try of the stage, and for another model."""
    from lm_eval.api.instance import Instance

    from kdscale.eval.downstream.language_model import LanguageModel

    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": ["never"]}
    asked = [Instance("generate_until", {}, (text, how), 0) for text in ("the river", "an old mill")]
    model = LanguageModel(*tiny, batch_size=2)
    before = torch.get_rng_state()
    first = model.generate_until(asked)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert model.generate_until(asked) == first
    assert first[0] != first[1]


def test_ranks_share_the_requests_and_each_gets_all_scores(
    tiny: tuple[Any, Any], task_maker: TaskMaker, tmp_path: Path
) -> None:
    file = str(task_maker(items=7))
    alone = score(*tiny, [file])["toy"]

    def work(rank: int) -> None:
        from torch import distributed

        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        got = score(*tiny, [file], ScoreSettings(batch_size=1))["toy"]
        assert got.margins is not None
        (tmp_path / str(rank)).write_text(json.dumps([list(got.scores), list(got.margins), list(got.ids)]))

    assert fork_ranks(2, work) == [0, 0]
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second
    assert first[0] == alone.scores.tolist()
    np.testing.assert_allclose(first[1], alone.margins, atol=1e-5)
    assert first[2] == list(alone.ids)


def test_all_that_is_wrong_with_tasks_is_said_at_once_and_before_a_model(task_maker: TaskMaker) -> None:
    good, unlabelled = task_maker("good"), task_maker("unlabelled")
    data = unlabelled.with_suffix(".jsonl")
    data.write_text(data.read_text().replace('"label": 1', '"label": 7'))
    with pytest.raises(ConfigError) as error:
        prepare([str(good), "/nowhere/x.yaml", str(unlabelled), "builtin:nothing"], ScoreSettings())
    text = str(error.value)
    assert "/nowhere/x.yaml" in text
    assert "unlabelled: items without a right answer" in text
    assert "item 1 has 2 choices and the answer 7" in text
    assert "builtin:nothing" in text


def test_a_template_cannot_run_code(task_maker: TaskMaker, tmp_path: Path) -> None:
    file = task_maker()
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "owned") + "') }}"
    file.write_text(file.read_text().replace("{{question}}", escape))
    with pytest.raises((ConfigError, DataError), match=r"SecurityError|unsafe"):
        prepare([str(file)], ScoreSettings())
    assert not (tmp_path / "owned").exists()


def test_nothing_of_the_harness_reaches_the_terminal(
    tiny: tuple[Any, Any], task_maker: TaskMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    score(*tiny, [str(task_maker(more="num_fewshot: 1\n"))])
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_is_not_there_is_said_once_for_all_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asked once: libraries try each address for 20 seconds."""
    import huggingface_hub

    offline: list[bool] = []

    class Manager:
        all_tasks = ("piqa", "winogrande", "boolq")

        def load(self, names: list[str]) -> Any:
            offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
            raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("kdscale.eval.downstream.harness._manager", Manager)
    with pytest.raises(ConfigError) as error:
        prepare(["piqa", "boolq", "winogrand"], ScoreSettings())
    text = str(error.value)
    assert "the hub cannot be reached for the data of piqa, boolq" in text
    assert "'winogrand' is no task" in text and "did you mean winogrande" in text
    assert offline == [False, True]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
