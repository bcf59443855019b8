"""A quantised form of a student as a standard model folder in the compressed-tensors format.

The weights of the layers' linear maps become the form's tensors, everything else is copied bit for bit; config.json
gets a `quantization_config`, by which transformers and serving engines know what to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdscale.errors import SelfCheckError
from kdscale.families import Family
from kdscale.families.linear_maps import is_linear_map
from kdscale.files import remove_leftovers, write_json, write_text
from kdscale.models.loading import model_on_meta
from kdscale.quantize.forms import Form, Quantized
from kdscale.quantize.matrices import WEIGHT
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint, ShardWriter, TensorInfo, copy_sidecars, without_own_classes

_BLOCK_BYTES = 1 << 26


def open_writer(
    student: Checkpoint, family: Family, form: Form, out_dir: Path, max_shard_bytes: int, journal: Path | None = None
) -> ShardWriter:
    """A writer for the tensors of a form, in the order in which the student has what they stand for."""
    of_maps = set(quantized_names(student, family))
    specs: dict[str, TensorInfo] = {}
    for name in student.names:
        specs |= form.tensors(name, student.spec(name)) if name in of_maps else {name: student.spec(name)}
    remove_leftovers(out_dir)
    return ShardWriter(out_dir, specs, max_shard_bytes, journal=journal)


def quantized_names(student: Checkpoint, family: Family) -> list[str]:
    """The weights that are quantised, as they are called on disk."""
    return [name for name, spec in family.tensors(student.config).items() if is_linear_map(spec)]


def write_weights(
    writer: ShardWriter,
    student: Checkpoint,
    family: Family,
    form: Form,
    made: Iterable[Mapping[str, Quantized]] | None,
    device: torch.device,
    reporter: Reporter,
) -> None:
    """Write what an earlier writer has not; `made`: the quantised weights, layer by layer (None: all are rounded).

    Every layer is committed before the next is asked for. Raises SelfCheckError for a value that is not finite.
    """
    names = quantized_names(student, family)
    done = {*names, *writer.written}
    for name in student.names:
        if name not in done:
            writer.add_blocks(name, student.blocks(name, _BLOCK_BYTES))
    writer.commit()
    if made is not None:
        for layer in made:
            for name, quantized in layer.items():
                _add(writer, form, name, quantized)
            writer.commit()
        return
    with reporter.bar(f"quantise to {form.settings.label}", total=len(names), unit="map") as bar:
        for name in names:
            _add(writer, form, name, form.round(student.tensor(name).to(device)))
            bar.advance(1)
        writer.commit()


def _add(writer: ShardWriter, form: Form, name: str, quantized: Quantized) -> None:
    if not bool(torch.isfinite(quantized.scales_OG).all()):
        raise SelfCheckError(f"{name} cannot be quantised", expected="finite weights", got="NaN or infinite values")
    for stored, tensor in form.encode(name, quantized).items():
        if stored not in writer.written:
            writer.add(stored, tensor)


def finish_folder(student: Checkpoint, family: Family, form: Form, out_dir: Path, card: str, code: bool) -> None:
    """Put config.json, tokenizer and the like, and the model card beside the weights of a form."""
    config = student.config if code else without_own_classes(student.config)
    write_json(
        out_dir / "config.json", {**config, "quantization_config": quantization_config(student, family, form, code)}
    )
    copy_sidecars(student.path, out_dir, code=code)
    write_text(out_dir / "README.md", card)


def quantization_config(student: Checkpoint, family: Family, form: Form, code: bool = False) -> dict[str, Any]:
    """What config.json says of the form. Every linear map of the model that is not quantised is named in it."""
    from compressed_tensors.quantization import QuantizationConfig

    specs = family.tensors(student.config).values()
    modules = {spec.parameter.removesuffix(WEIGHT) for spec in specs if is_linear_map(spec)}
    model = model_on_meta(student.path, trust_remote_code=code)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": {**form.scheme(), "format": form.file_format}},
            "format": form.file_format,
            "quantization_status": "compressed",
            "ignore": [name for name in linears if name not in modules],
        }
    )
    plain: dict[str, Any] = config.model_dump(mode="json")
    return plain
