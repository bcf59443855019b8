"""The student's README.md: where it comes from, what was done to it, what was measured, how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdscale.config.distill.targets import TEXT
from kdscale.config.quantize import FormConfig
from kdscale.config.root import Config
from kdscale.escaping import for_markdown
from kdscale.models.multimodal.language_part import CLASS_OF, TEXT_ALONE, WITH_IMAGES, auto_class
from kdscale.packaging import front_matter
from kdscale.packaging.card_sections import Result, measured
from kdscale.packaging.origin import origin_of
from kdscale.units import format_size

Part = Literal["use", "measured"]  # what is written again into a card; the rest is left as people have it


def card_facts(cfg: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card says of a checkpoint (with this manifest) of the run of `cfg`."""
    settings, step, adapters = cfg.distill, int(manifest["step"]), cfg.teacher.adapters
    several = len(settings.objectives) > 1
    losses = [f"{entry.weight:g} × ({entry.formula})" if several else entry.formula for entry in settings.objectives]
    return {
        "teacher": Path(cfg.teacher.path).name,
        **({"adapters merged into it": ", ".join(Path(one).name for one in adapters)} if adapters else {}),
        **({"teachers": ", ".join(entry.in_words for entry in settings.teachers)} if settings.teachers else {}),
        "training tokens": step * settings.global_batch * settings.seq_len,
        "optimiser steps": step,
        "sequence length": settings.seq_len,
        "sequences a step": settings.global_batch,
        "learnt from": settings.needs.in_words(),
        "loss": " + ".join(losses),
        **({own.section.replace("_", " "): own.in_words} if (own := settings.own_text) is not None else {}),
        **({"trained": f"low-rank adapters, {settings.lora.in_words}"} if settings.lora is not None else {}),
        "learning rate": f"{settings.optimizer.lr:g} → {settings.optimizer.min_lr:g}, cosine",
        "computed in": f"{manifest['fingerprint']['distill']['dtype']} with fp32 master weights",
        "skipped steps": manifest["state"]["guard"]["total"],
        "seed": cfg.seed,
    }


def student_card(cfg: Config, manifest: Mapping[str, Any], sidecars: Path) -> str:
    """The card of a checkpoint's student; `sidecars`: a folder with the files that the student takes over."""
    facts, inherited = card_facts(cfg, manifest), origin_of(cfg, sidecars).fields()
    origin = "" if cfg.student is None else "A ready model, trained further"
    has_config = (sidecars / "config.json").is_file()
    loader = auto_class(sidecars) if has_config else TEXT_ALONE
    return model_card(facts, title=cfg.name, origin=origin, inherited=inherited, loader=loader)


# as what the hub lists a model that this class loads
_TASKS = {
    TEXT_ALONE: "text-generation", WITH_IMAGES: "image-text-to-text", CLASS_OF["masked_lm"]: "fill-mask",
    CLASS_OF["none"]: "feature-extraction", CLASS_OF["classes"]: "text-classification",
}  # fmt: skip


def model_card(
    facts: Mapping[str, Any], title: str = "Distilled student", origin: str = "",
    inherited: Mapping[str, Any] | None = None, loader: str = TEXT_ALONE,
) -> str:  # fmt: skip
    """README.md of the student: what it was made from and how; `facts` are shown in their order.

    `origin` begins the sentence that says what it learnt from; `inherited` goes into the front matter; `loader` is the
    class of transformers that loads it.
    """
    reads_images = loader == WITH_IMAGES
    origin = origin or "Pruned from a teacher and " + ("trained" if facts["learnt from"] == TEXT else "distilled")
    fields = {
        **(inherited or {}), "library_name": "transformers",
        "pipeline_tag": _TASKS[loader],
        "tags": ["kdscale", "pruned", "distilled"],
    }  # fmt: skip
    places = f"{_part('use', '')}\n\n{_part('measured', '')}"
    return front_matter.join(
        fields,
        f"\n# {for_markdown(title)}\n\n{origin} on {facts['learnt from']} with kdscale. "
        f"A standard checkpoint: load it with `{loader}.from_pretrained`. "
        + ("It learnt on text alone; the parts that read images are the teacher's. " if reads_images else "")
        + f"The teacher's licence and the licence of the training text apply.\n\n{places}\n\n## How it was made\n\n"
        f"{_table(facts)}",
    )


def quantized_card(cfg: Config, form: FormConfig, figures: Mapping[str, Any], sidecars: Path) -> str:
    """The card of a student in this form; `sidecars` as for `student_card`.

    `figures`: `weight_bytes` of the form, `student_bytes` before, and how many `tokens` it was calibrated on, or 0.
    """
    nearest = "each weight rounded to the nearest value"
    start = ", which began with those of GPTQ" if form.method != "gptq" and form.needs_calibration else ""
    methods = {"rtn": nearest, "distilled": f"{nearest}, after a training with rounded weights{start}"}
    in_words = methods.get(form.method, f"made by {form.method.upper()}")
    facts = {
        "linear maps of the layers": f"{form.bits} bits a weight, {in_words}",
        "scales": f"one for each {form.group_size or 'output'}" + (" inputs of an output" if form.group_size else ""),
        **({"calibrated on": f"{figures['tokens']:,} training tokens"} if figures["tokens"] else {}),
        "as they were": "embeddings, output head, norms and biases",
        "weights on disk": f"{format_size(figures['weight_bytes'])}, {format_size(figures['student_bytes'])} before",
        "format": "compressed-tensors",
    }
    fields = {
        **origin_of(cfg, sidecars).fields(), "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["kdscale", "pruned", "distilled", "quantized", "compressed-tensors"],
    }  # fmt: skip
    places = f"{_part('use', '')}\n\n{_part('measured', '')}"
    return front_matter.join(
        fields,
        f"\n# {for_markdown(f'{cfg.name}, {form.label}')}\n\nThe distilled student of a run of kdscale, with fewer "
        "bits a weight. `AutoModelForCausalLM.from_pretrained` loads it where the package compressed-tensors is "
        "installed, and restores the weights: memory and time are saved by engines that compute with them as they are. "
        f"The teacher's licence and the licence of the training text apply.\n\n{places}\n\n## How it was made\n\n"
        f"{_table(facts)}",
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {for_markdown(value if isinstance(value, str) else json.dumps(value, sort_keys=True))} |"
        for name, value in facts.items()
    )
    return f"| | |\n|---|---|\n{rows}\n"


def with_measurements(card: str, run: Path, name: str, where: str) -> str:
    """The card with all that the run folder holds of what was measured; the rest of the card stays as it is.

    `name`: the model's, in the front matter; `where` names the card in messages. Raises FileError for front matter or
    a file of the run that cannot be read.
    """
    fields, body = front_matter.split(card, where)
    text, results = measured(run)
    for key in ("metrics", "model-index"):
        fields.pop(key, None)
    if results:
        fields["metrics"] = list(dict.fromkeys(metric for result in results for metric in result.metrics))
        fields["model-index"] = [{"name": name, "results": _index(results)}]
    return front_matter.join(fields, with_part(body, "measured", text))


def with_part(card: str, part: Part, text: str) -> str:
    """The card with `text` in place of what it has in this part; at its end where it has no such part."""
    begin, end = _marks(part)
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    new = _part(part, text)
    if found.search(card):
        return found.sub(lambda match: new, card, count=1)
    return f"{card.rstrip()}\n\n{new}\n" if text else card


def _marks(part: Part) -> tuple[str, str]:
    return f"<!-- kdscale writes this part again: {part} -->", f"<!-- end of {part} -->"


def _part(part: Part, text: str) -> str:
    begin, end = _marks(part)
    return f"{begin}\n\n{text}\n\n{end}" if text else f"{begin}\n{end}"


def _index(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": result.task},
            "dataset": {"name": result.dataset, "type": result.dataset_type},
            "metrics": [{"type": name, "value": float(f"{value:.6g}")} for name, value in result.metrics.items()],
        }
        for result in results
    ]
