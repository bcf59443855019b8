"""Asks the model of this package to continue one prompt, and leaves with 0 if it does.

Copied by `kdscale package` into the package; it needs Python 3.9 or newer, and of kdscale nothing. The prompt goes to
the server at --url if this model is served there, else through transformers, else through xllamacpp (for a GGUF file).

Exit codes: 0 the answer holds text and finite numbers; 1 it does not, or the model cannot be loaded; 2 nothing is
installed or running that could answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "package.json"
TOKENS = 16
_TOKEN_VARIABLE = "VLLM_API_KEY"
_UNPRINTABLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != 10}


class Answer(NamedTuple):
    """What a model made of the prompt: its text, and the logarithm of each token's probability."""

    text: str
    log_probabilities: list[float]


class CannotTest(Exception):  # noqa: N818 (it says of the machine, not of the model, what is missing)
    """Nothing here can answer."""


def ask_server(url: str, package: dict[str, Any], timeout: float) -> Answer:
    """Through a server with OpenAI's API, such as `docker compose up` starts."""
    asked = {
        "model": package["served_name"], "prompt": package["prompt"], "max_tokens": TOKENS, "temperature": 0,
        "logprobs": 1, "ignore_eos": True,
    }  # fmt: skip
    return _of_completion(_request(url, "/v1/completions", asked, timeout))


def is_served(url: str, package: dict[str, Any]) -> bool:
    """Whether a server at `url` has this package's model."""
    try:
        models = _request(url, "/v1/models", None, 3.0)
        return package["served_name"] in [model.get("id") for model in models["data"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ask_transformers(folder: Path, package: dict[str, Any]) -> Answer:
    """Through the library transformers, on the first folder of weights that it can read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    reads_images = package.get("auto_class") == AutoModelForImageTextToText.__name__
    loader: Any = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    own_code = bool(package.get("own_code"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)
    model = loader.from_pretrained(folder, dtype="auto", trust_remote_code=own_code).eval()
    inputs = tokenizer(package["prompt"], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    ids = made.sequences[0, inputs["input_ids"].shape[1] :]
    rows = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(made.logits, ids)]  # noqa: B905
    return Answer(str(tokenizer.decode(ids, skip_special_tokens=True)), rows)


def ask_gguf(file: Path, package: dict[str, Any]) -> Answer:
    """Through llama.cpp in this process, by the package xllamacpp."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = 512
    settings.warmup = False
    settings.verbosity = -1
    if hasattr(settings, "api_keys"):  # it also listens on a port of this machine
        settings.api_keys = [secrets.token_hex(16)]
    server = xllamacpp.Server(settings)
    asked = {"prompt": package["prompt"], "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    answer = server.handle_completions(asked)
    return _of_completion(json.loads(answer) if isinstance(answer, (str, bytes)) else answer)


def _of_completion(answer: dict[str, Any]) -> Answer:
    if "choices" not in answer:
        raise ValueError("the server answered: " + json.dumps(answer)[:500])
    choice = answer["choices"][0]
    found = choice.get("logprobs") or {}
    values = found.get("token_logprobs") or [entry["logprob"] for entry in found.get("content") or []]
    return Answer(choice["text"], [float("nan") if value is None else float(value) for value in values])


def _request(url: str, path: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ValueError("--url must begin with http:// or https://")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data=data, headers={"Content-Type": "application/json"})
    if token := os.environ.get(_TOKEN_VARIABLE):
        request.add_unredirected_header("Authorization", "Bearer " + token)  # for this server alone
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        raise OSError(f"{url}{path} answered {error.code}: " + error.read(500).decode("utf-8", "replace")) from error


def problem_of(answer: Answer) -> str:
    """What is wrong with an answer; "" for a good one."""
    if not answer.text.strip():
        return "the answer holds no text"
    if not answer.log_probabilities:
        return "the answer says nothing of its tokens' probabilities"
    if not all(math.isfinite(value) and value <= 1e-3 for value in answer.log_probabilities):
        return "the answer holds probabilities that are no numbers"
    return ""


def ways(package: dict[str, Any], here: Path, url: str, timeout: float) -> dict[str, Any]:
    """How the model can be asked here, in the order to try: a name, and what asks."""
    found: dict[str, Any] = {}
    if url and is_served(url, package):
        found["server"] = lambda: ask_server(url, package, timeout)
    for form in package["forms"]:
        path = here / form["path"]
        if form["kind"] == "transformers" and _has("transformers", "torch"):
            found.setdefault("transformers", lambda path=path: ask_transformers(path, package))
        if form["kind"] == "gguf" and _has("xllamacpp"):
            found.setdefault("gguf", lambda path=path: ask_gguf(path, package))
    return found


def _has(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask the model of this package to continue one prompt.")
    parser.add_argument("--with", dest="way", choices=("server", "transformers", "gguf"), help="instead of the first")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="where it is served; the token in " + _TOKEN_VARIABLE
    )
    parser.add_argument("--form", help="such as int8: this form alone, and not through a server")
    parser.add_argument("--prompt", help="instead of the package's own")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for a server's answer")
    parsed = parser.parse_args(arguments)
    here = Path(__file__).resolve().parent
    package = json.loads((here / PACKAGE).read_text(encoding="utf-8"))
    package["prompt"] = parsed.prompt or package["prompt"]
    if parsed.form:
        package["forms"] = [form for form in package["forms"] if form["name"] == parsed.form]
    try:
        found = ways(package, here, "" if parsed.form else parsed.url, parsed.timeout)
        way = parsed.way or next(iter(found), "")
        if way not in found:
            raise CannotTest(
                f"{way or 'the model'}: nothing here can answer. Start the server (docker compose up), or install "
                "transformers and torch, or xllamacpp for a GGUF file."
            )
        answer = found[way]()
    except CannotTest as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001 (whatever stops the model is what the test is for)
        print(f"FAILED: {type(error).__name__}: {error}".translate(_UNPRINTABLE), file=sys.stderr)
        return 1
    print(f"{way}: {package['prompt']!r} → {answer.text!r}".translate(_UNPRINTABLE))
    problem = problem_of(answer)
    print(f"FAILED: {problem}" if problem else "OK")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
