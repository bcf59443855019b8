"""The whole configuration: typed, strict, one place.

Precedence: the defaults below < the YAML file < `--set dotted.key=value`. Everything is checked before any work: an
unknown key, a wrong type or a value out of range is one ConfigError that names every offending field.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from kdscale.config_base import Count, Device, Dtype, Section
from kdscale.config_distill import FREE_SETTINGS, QUANTIZED, DistillConfig
from kdscale.config_observe import TrackingConfig
from kdscale.errors import ConfigError
from kdscale.files import sha256_json
from kdscale.units import TARGETS, parse_target


class TeacherConfig(Section):
    """The model to shrink: a folder with config.json, tokenizer and safetensors, or a hub id (`org/name`)."""

    path: str = Field(min_length=1)
    revision: str | None = None  # only for a hub id
    trust_remote_code: bool = False


class SourceConfig(Section):
    """One source of text: `builtin:classics`, a .jsonl/.jsonl.gz/.txt file, a folder or glob of these, or `hf:NAME`."""

    path: str = Field(min_length=1)
    field: str = "text"
    split: str = "train"  # only for hf:
    weight: Annotated[int, Field(ge=1)] = 1  # how often each document is repeated an epoch


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = Field(
        strict=False, min_length=1, default=(SourceConfig(path="builtin:classics"),)
    )
    # Documents are assigned to held-out by a hash of their text, so the split never moves when sources are added.
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    heldout_sources: tuple[SourceConfig, ...] = Field(strict=False, default=())  # if given, replaces the fraction
    max_document_tokens: Count | None = None


class ImportanceConfig(Section):
    calibration_tokens: Count = 32_768
    seq_len: Count = 512
    micro_batch: Count = 4
    dtype: Dtype = "auto"
    processes: Count = 1  # ranks on this machine that share the calibration sequences, also in compensation
    # of the calibration tokens, for prune.layer_method loss (which keeps a state a layer for each) and angular
    layer_tokens: Count = 16_384


FfnMethod = Literal["output_energy", "activation", "obs"]
HeadMethod = Literal["output_energy", "activation", "obs"]
HiddenMethod = Literal["auto", "pca", "activation"]
Compensation = Literal["none", "ridge", "two_stream"]
LayerMethod = Literal["block_influence", "loss", "angular", "last"]
LayerRepair = Literal["none", "linear"]


class SearchConfig(Section):
    """How the shapes that meet a budget are compared; each kind of score is asked of fewer shapes than the last."""

    # this many of the best predicted shapes are run masked on calibration text; 0 goes by the prediction alone
    masked_candidates: Annotated[int, Field(ge=0, le=64)] = 8
    masked_tokens: Count = 4_096
    # distil this many tokens into each finalist, keep the better half, double; None: no probes
    probe_tokens: Count | None = None
    probe_candidates: Annotated[int, Field(ge=2, le=16)] = 4
    # what a latency is measured at: a prompt this long, and one more token after it
    context_tokens: Count = 256


class PruneConfig(Section):
    """The budget and the axes. Fixed sizes win; axes left open are searched until the target is met."""

    # "4B" (absolute) or "50%" (of the teacher), of the parameters that `count` names
    target_params: str | None = None
    # upper limits instead: "8GiB" of weights on disk, "32KiB" of 16-bit KV cache a token, "12ms" a decoded token or a
    # prompt; each may also be a share of the teacher's
    target_bytes: str | None = None
    target_kv_bytes: str | None = None
    target_decode: str | None = None
    target_prefill: str | None = None
    count: Literal["non_embedding", "total"] = "total"
    tolerance: Annotated[float, Field(gt=0.0, le=0.2)] = 0.03
    # axes that may be cut when a target is given; sizes given below are fixed and need not be listed
    axes: tuple[Literal["ffn", "heads", "kv_heads", "hidden", "layers", "experts"], ...] = Field(
        strict=False, default=("ffn", "heads")
    )
    hidden: Count | None = None
    ffn: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    layers: Count | None = None
    experts: Count | None = None  # of a mixture of experts; how many each token is routed to does not change
    # smallest step on each axis; None picks 256/256/1 for real sizes and 32/32/1 for small models
    hidden_divisor: Count | None = None
    ffn_divisor: Count | None = None
    experts_divisor: Count | None = None  # None: 8 from 64 experts on, 1 below
    ffn_method: FfnMethod = "output_energy"
    head_method: HeadMethod = "output_energy"
    # auto: pca (the residual stream turned into its principal components) where the family allows, else activation
    hidden_method: HiddenMethod = "auto"
    layer_method: LayerMethod = "block_influence"
    # drop one contiguous run of layers (Llama-3.1 → 4B depth recipe) instead of the lowest-scored layers anywhere
    # (angular knows no other way)
    contiguous_layers: bool | None = None
    # linear: the down projection before dropped layers is refitted to give what they gave as well
    layer_repair: LayerRepair = "none"
    compensate: Compensation = "two_stream"
    # how much of the student's stream's error so far each projection is asked to undo (two_stream only)
    stream_correction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    ridge_lambda: Annotated[float, Field(gt=0.0)] = 1e-2
    max_shard_bytes: Count = 5_000_000_000
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _target_parses(self) -> PruneConfig:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one target, not {' and '.join(given)}; sizes may be fixed beside it")
        if given:
            parse_target(getattr(self, given[0]), TARGETS[given[0]])
        elif not any((self.hidden, self.ffn, self.heads, self.kv_heads, self.layers, self.experts)):
            raise ValueError(
                "give target_params or another target, or at least one of hidden, ffn, heads, kv_heads, layers, experts"
            )
        if self.layer_method == "angular" and self.contiguous_layers is False:
            raise ValueError("layer_method=angular drops one contiguous block; leave contiguous_layers out")
        return self

    @property
    def target(self) -> tuple[str, str] | None:
        """The target that was given, as (field, text)."""
        return next(((name, getattr(self, name)) for name in TARGETS if getattr(self, name) is not None), None)


class EvalConfig(Section):
    tokens: Count = 16_384
    seq_len: Count = 512
    micro_batch: Count = 4
    dtype: Dtype = "float32"
    prompts: tuple[str, ...] = Field(
        strict=False,
        default=(
            "The capital of France is",
            "Elizabeth was surprised, and said to her sister,",
            "And it came to pass in those days, that",
            "A computer program is",
        ),
    )
    sample_tokens: Count = 48
    # 0 is greedy, which small models answer with loops; the draws are seeded and the same for all three models
    sample_temperature: Annotated[float, Field(ge=0.0)] = 0.7
    sample_top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    efficiency: bool = True
    prefill_tokens: Count = 256
    decode_tokens: Count = 32


class RuntimeConfig(Section):
    device: Device = "auto"
    threads: Count | None = None  # CPU threads a process; None: cores / processes
    # seconds without progress after which a stage other than the distillation counts as hung, four times as many while
    # it loads; 0: none does
    watchdog_seconds: Annotated[float, Field(ge=0.0)] = 3600.0
    # calibration hidden states held in memory, a process; what is beyond goes to the run folder's disk
    activation_bytes: Count = 1_073_741_824


class StepConfig(Section):
    """One step on the way to the config's own student: what it says differently of prune and distill.

    The config's target and sizes are the last step's: none of them is inherited. All other fields are.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    prune: dict[str, Any]
    distill: dict[str, Any] = Field(default_factory=dict)


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str = Field(min_length=1)
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: TeacherConfig
    data: DataConfig = DataConfig()
    importance: ImportanceConfig = ImportanceConfig()
    prune: PruneConfig
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()
    # run before the config's own prune and distill, each from the student of the one before
    steps: tuple[StepConfig, ...] = Field(strict=False, default=())

    @model_validator(mode="after")
    def _steps_are_configs(self) -> Config:
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names):
            raise ValueError(f"steps: every name once, got {', '.join(names)}")
        for index, step in enumerate(self.steps):
            try:
                self.step(index)
            except ValidationError as error:
                raise ValueError(f"steps ({step.name}): " + "; ".join(map(_explain, error.errors()))) from error
        return self

    def step(self, index: int) -> Config:
        """The config of one of the steps: a run of its own under `steps/` in the run folder, on the same text."""
        step, tree = self.steps[index], self.resolved()
        inherited = {key: value for key, value in tree["prune"].items() if key not in _NOT_INHERITED}
        return Config.model_validate(
            {
                **tree,
                "name": f"{self.name}-{step.name}",
                "run_dir": f"{self.run_dir}/steps/{index + 1}-{step.name}",
                "prune": _merged(inherited, step.prune),
                "distill": _merged(tree["distill"], step.distill),
                "steps": (),
            }
        )

    def resolved(self) -> dict[str, Any]:
        """Plain values, every default written out: what is stored as run/config.yaml and hashed."""
        return self.model_dump(mode="json")

    def fingerprint(self, *sections: str) -> str:
        """Hash of the named top-level sections (all of them when none is named)."""
        plain = self.resolved()
        return sha256_json({key: plain[key] for key in sections or sorted(plain)})


# What makes one step's student another size than the next one's.
_NOT_INHERITED = {*TARGETS, "hidden", "ffn", "heads", "kv_heads", "layers", "experts"}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `dotted.key=value` overrides. Raises ConfigError (exit code 2)."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist", expected="a YAML file", hint="check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text", got=str(error)) from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds no settings", expected="a mapping", got=type(tree).__name__)
    for override in overrides:
        _apply_override(tree, override)
    return build_config(tree, str(path))


def build_config(tree: dict[str, Any], origin: str) -> Config:
    """Validate a plain mapping. Raises ConfigError listing every field that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(item)}" for item in error.errors())
        raise ConfigError(f"{origin} cannot be used:\n{problems}") from error


def dump_config(config: Config) -> str:
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(config.resolved(), stream)
    return stream.getvalue()


def config_differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted fields in which two resolved configs differ, as `field: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        out: list[str] = []
        for key in sorted({*old, *new}):
            out += config_differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return out
    return [] if old == new else [f"{prefix}: {old} → {new}"]


def may_change(difference: str) -> bool:
    """Whether a line of `config_differences` is about a setting with which a run may go on, whatever its value."""
    section, field, *_ = [*difference.partition(": ")[0].split("."), ""]
    return section == "distill" and field in FREE_SETTINGS and not any(name in difference for name in QUANTIZED)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{origin} is not valid YAML{where}", got=error.problem) from error
    except YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML", got=str(error)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override}", expected="dotted.key=value, e.g. prune.target_params=4B")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}", expected="a key inside a section", got=f"{parent} is a plain value")
    node[leaf] = _parse_yaml(raw, f"--set {key}")


def _explain(item: Any) -> str:
    """One line for one pydantic error: field, what was expected, what came, and the nearest known key."""
    location = [str(part) for part in item["loc"]]
    field = ".".join(location) or "config"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1)
        return f"{field}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")
    if item["type"] == "missing":
        return f"{field}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = item["input"]
    came = "" if isinstance(shown, dict | BaseModel) else f", got {shown!r} ({type(shown).__name__})"
    return f"{field}: {message}{came}"


def _known_keys(location: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in location:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        inner = field.annotation
        args = [arg for arg in getattr(inner, "__args__", ()) if isinstance(arg, type) and issubclass(arg, BaseModel)]
        model = args[0] if args else inner
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)
