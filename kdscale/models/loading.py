"""Loads whole models and tokenizers through plain transformers.

Safetensors only; no code from the checkpoint unless the user's flag allows it; no request to the hub.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from kdscale.errors import CheckpointError, ConfigError, DataError, KdscaleError
from kdscale.families import dropped_heads, head_kind
from kdscale.files import read_json
from kdscale.models.multimodal.language_part import (
    CLASS_OF,
    is_carried,
    language_config,
    loading_options,
    quiet_about_other_parts,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdscale.families import Family
    from kdscale.runtime.progress import Reporter
    from kdscale.weights import Checkpoint


@contextmanager
def explain_library_errors(path: Path | str, what: str = "model") -> Iterator[None]:
    """Turn whatever transformers raises while it builds `what` from the files in `path` into a CheckpointError.

    The libraries raise nearly every class of exception for a value that they cannot use. Lack of memory stays as it is.
    """
    from kdscale.runtime.device import is_lack_of_memory

    try:
        yield
    except KdscaleError:
        raise
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        text = " ".join(str(error).split())[:500]
        raise CheckpointError(
            f"{path}: transformers cannot build the {what} from these files",
            expected=f"a {what} that plain transformers loads",
            got=f"{type(error).__name__}: {text}" if text else type(error).__name__,
            hint="correct the field that the message names, or download the files again",
        ) from error


def check_loadable(path: Path, trust_remote_code: bool = False) -> None:
    """Build the model without its weights: finds, before any work, values that only transformers refuses.

    Raises CheckpointError.
    """
    from transformers import GenerationConfig

    model_on_meta(path, trust_remote_code=trust_remote_code)
    if (path / "generation_config.json").is_file():
        with explain_library_errors(path, "generation config"):
            generation = GenerationConfig.from_pretrained(path, local_files_only=True)
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(generation, field)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int for token in ids):
                where = f"{path / 'generation_config.json'}: {field}"
                raise CheckpointError(where, expected="a token id or a list of them", got=repr(value))


def model_on_meta(path: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder with its parameters on the meta device and its buffers computed as usual."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with explain_library_errors(path), init_empty_weights(include_buffers=False), no_init_weights():
        config = language_config(path, trust_remote_code)
        if hasattr(config, "quantization_config"):  # the weights are read as plain ones
            del config.quantization_config
        model: Any = auto_class(config.to_dict()).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model


def built_config(config: Mapping[str, Any]) -> Any:
    """transformers' config of what a config.json says; infinite numbers are there as transformers writes them."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_with_infinities(dict(config)))


def _with_infinities(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _with_infinities(item) for key, item in value.items()}


def auto_class(config: dict[str, Any]) -> Any:
    """The class of transformers that makes a model of this config: with the head that its architecture has."""
    import transformers

    return getattr(transformers, CLASS_OF[head_kind(config)])


def check_writes_text(folder: Path, what: str) -> None:
    """Raises ConfigError for an encoder, where `what` asks for a model that writes text."""
    from kdscale.weights import read_config

    if head_kind(read_config(folder)) != "causal_lm":
        raise ConfigError(what, expected="a model that writes text", got=f"an encoder, {folder}")


def load_model(
    path: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model in eval mode; onto a GPU tensor by tensor, so that no rank holds a copy in host memory.

    On a CPU, weights in the dtype of the file stay mapped, and ranks share their pages. Quantised weights are read as
    the plain ones that they stand for. Raises CheckpointError when tensors are missing, unexpected or mismatched.
    """
    from transformers.utils import logging

    from kdscale.weights import read_config

    if quantization_of(path) is not None:
        return _load_decoded(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    logging.disable_progress_bar()
    with explain_library_errors(path), quiet_about_other_parts(path):
        loaded: Any = auto_class(read_config(path)).from_pretrained(
            path,
            config=language_config(path, trust_remote_code),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **loading_options(path),
            **({} if device.type == "cpu" else {"device_map": {"": device}}),
        )
    model, info = loaded
    depth = model.config.get_text_config().num_hidden_layers
    heads = dropped_heads(model.config.model_type, depth)  # transformers' model has none of them
    elsewhere = is_carried(path)
    complaints = {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    complaints["unexpected_keys"] = {
        name
        for name in complaints["unexpected_keys"]
        if not elsewhere(name) and not any(fnmatch.fnmatchcase(name, glob) for glob in heads)
    }
    wrong = {key: sorted(map(str, names)) for key, names in complaints.items() if names}
    if wrong:
        raise CheckpointError(f"{path} does not load cleanly", expected="every tensor exactly once", got=str(wrong))
    if device.type != "cpu":
        _take_buffers(model, model_on_meta(path, dtype=dtype, trust_remote_code=trust_remote_code))
    return cast("PreTrainedModel", model.eval())


def quantization_of(path: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a model's folder; None for one that is not quantised.

    Raises CheckpointError for a format that cannot be read.
    """
    from kdscale.weights import config_on_disk
    from kdscale.weights.quantised import FIELD, format_of

    config = config_on_disk(path)
    return None if format_of(config, str(path / "config.json")) is None else dict(config[FIELD])


def _load_decoded(path: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    """The causal LM of a quantised checkpoint, plain, parameter by parameter through kdscale's own reader."""
    import torch

    from kdscale.models.parameter_map import ParameterReader

    weights = ParameterReader.open(path)
    model: Any = model_on_meta(path, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    if wrong := sorted(set(parameters) ^ weights.names()):
        raise CheckpointError(f"{path} does not load cleanly", expected="every tensor exactly once", got=str(wrong[:8]))
    read = {}
    for name, parameter in parameters.items():
        read[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        weights.fill(name, 0, read[name].view(-1))
    model.load_state_dict(read, strict=False, assign=True)
    model.tie_weights()
    return cast("PreTrainedModel", model.to(device).eval())


def _take_buffers(model: Any, original: Any) -> None:
    """Copy the buffers that are in no file, such as rotary frequencies, from a model that computed them on the CPU.

    Another device rounds otherwise, and the same weights kept elsewhere must give the same bits.
    """
    stored = model.state_dict().keys()
    computed = dict(original.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in stored:
            buffer.copy_(computed[name])


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the checkpoint's own tokenizer.

    Raises CheckpointError when there is none, when the class in tokenizer_config.json does not fit its vocabulary, and
    when transformers rebuilds tokenizer.json into one that gives other ids.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        _check_same_ids(path, tokenizer)
    except KdscaleError:
        raise
    except BaseException as error:  # tokenizers raises bare Exception or panics, e.g. for an unfit class
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path} has no usable tokenizer",
            expected="tokenizer.json, and in tokenizer_config.json a tokenizer_class that fits it",
            got=f"{type(error).__name__}: {str(error)[:500]}",
            hint="take both files from the model as published; PreTrainedTokenizerFast fits every tokenizer.json",
        ) from error
    return tokenizer


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """The content of the checkpoint's tokenizer_config.json, empty where there is none. Raises CheckpointError."""
    file = path / "tokenizer_config.json"
    content = read_json(file, CheckpointError) if file.is_file() else {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}", expected="a JSON object", got=type(content).__name__)
    return content


class SpecialTokens(NamedTuple):
    """Ids that a tokenizer puts before and after a sequence."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


NO_SPECIAL_TOKENS = SpecialTokens()


def special_tokens(tokenizer: Any, tokenizer_config: Mapping[str, Any]) -> SpecialTokens:
    """What the tokenizer itself adds around a text, usually one BOS before it.

    `tokenizer_config` is the content of tokenizer_config.json. Where it asks for BOS or EOS (as DeepSeek's does), these
    are added even though transformers 5 leaves them out for some classes. Raises DataError when the tokenizer does more
    to a text than to add tokens around it.
    """
    plain, full = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    for first in range(len(full) - len(plain) + 1):
        if full[first : first + len(plain)] == plain:
            prefix, suffix = tuple(full[:first]), tuple(full[first + len(plain) :])
            bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
            if tokenizer_config.get("add_bos_token") is True and bos is not None and bos not in prefix:
                prefix = (int(bos), *prefix)
            if tokenizer_config.get("add_eos_token") is True and eos is not None and eos not in suffix:
                suffix = (*suffix, int(eos))
            return SpecialTokens(prefix, suffix)
    raise DataError(
        "the tokenizer's special tokens cannot be told from the text",
        expected=f"ids {plain} of 'a' with tokens before or after them",
        got=f"ids {full}",
        hint="data.add_special: never leaves them out",
    )


# No text begins with a space: whether a leading one counts is where correct classes differ.
_PROBES = ("Hello world,  it's 2 spaces.\n\n\tnaïve café, 東京 🙂 123456", "def f(x):\n    return x == 10\n")


def _check_same_ids(path: Path, tokenizer: Any) -> None:
    """Raises CheckpointError when the loaded tokenizer and its own tokenizer.json disagree on a text."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast or not (path / "tokenizer.json").is_file():
        return
    written = Tokenizer.from_file(str(path / "tokenizer.json"))
    written.no_truncation()
    written.no_padding()
    for text in _PROBES:
        expected = written.encode(text, add_special_tokens=False).ids
        got = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if got != expected:
            raise CheckpointError(
                f"{path}: transformers reads this tokenizer as another one than tokenizer.json says",
                expected=f"ids {expected[:16]} of {text!r}, as tokenizer.json gives",
                got=f"ids {got[:16]} from the class {type(tokenizer).__name__}",
                hint='update transformers, or set "tokenizer_class": "PreTrainedTokenizerFast" in its config',
            )


def open_teacher(
    folder: Path, reporter: Reporter | None = None, *, keep_heads: bool = False
) -> tuple[Checkpoint, Family]:
    """Open the teacher and its family and check the headers; reads no weights. Raises CheckpointError.

    `reporter`, if there is one, prints what of the checkpoint is left out. With `keep_heads` the student has the heads
    too that it would do without; raises ConfigError where there are none to keep.
    """
    from kdscale.families import load_family
    from kdscale.weights import Checkpoint

    teacher = Checkpoint.open(folder)
    family = load_family(teacher.config, str(folder / "config.json"))
    if keep_heads:
        family = family.keeping_heads(teacher.config)
    for notice in teacher.verify_against(family):
        if reporter is not None:
            reporter.say(f"  note: {notice}")
    if keep_heads and not any(family.kept_head(name) for name in teacher.carried):
        raise ConfigError(
            "prune.keep_mtp", expected="a teacher with a head that predicts several tokens ahead",
            got=f"none in {folder}", hint="leave prune.keep_mtp out",
        )  # fmt: skip
    return teacher, family
