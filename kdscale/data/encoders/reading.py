"""What an encoder cannot do, or a decoder, of which each is asked in the same config."""

from __future__ import annotations

from pathlib import Path

from kdscale.config.distill.settings import EIGHT_BITS
from kdscale.config.evaluation.settings import EvalConfig
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.models.loading import open_teacher


def check_reading(config: Config, teacher: Path) -> None:
    """Raises ConfigError for what an encoder cannot do, or a decoder, of which each is asked in the same config."""
    family, distill, prompts = open_teacher(teacher)[1], config.distill, EvalConfig.model_fields["prompts"].default
    of_tokens = [entry.name for entry in distill.objectives if entry.reads_vocabulary]
    whole = [entry.name for entry in distill.objectives if entry.pools]
    kept = "an encoder, which writes no text" if family.is_encoder else "a decoder, which sees what came before alone"
    if not family.is_encoder:
        rows = {
            "distill.masking": distill.masking is not None,
            "data.sentences": config.data.sentences,
            f"distill.objectives: {', '.join(whole)}": bool(whole),
        }
    else:
        others = sorted({one.teacher_placement for one in distill.by_teacher().values()} - {"replicated"})
        rows = {
            **{name: getattr(config, name) is not None for name in ("responses", "correct", "quantize", "bias")},
            "distill.on_policy": distill.on_policy is not None,
            "distill.teachers": bool(distill.teachers),
            f"distill.teacher_placement: {', '.join(others)}": bool(others),
            "distill.teacher_dtype: 8 bits": distill.teacher_dtype in EIGHT_BITS,
            "distill.fake_quantize": distill.fake_quantize is not None,
            "distill.tensor_parallel": distill.tensor_parallel > 1,
            "distill.sequence_parallel": distill.sequence_parallel > 1,
            "targets": config.targets is not None,
            "eval.downstream": config.eval.downstream is not None,
            "eval.prompts": config.eval.prompts not in ((), prompts),
            "eval.draft or distill.lora": config.eval.draft is not None or distill.lora is not None,
            "prune.target_kv_bytes, target_decode or target_prefill": any(
                getattr(config.prune, f"target_{kind}") is not None for kind in ("kv_bytes", "decode", "prefill")
            ),
        }
    if wrong := [name for name, asked in rows.items() if asked]:
        raise ConfigError("; ".join(wrong), expected="settings that go with the teacher", got=kept, hint="leave it out")
    if family.head == "classes" and (count := family.fixed_sizes["classes"]) < 2:
        raise ConfigError(
            f"{teacher / 'config.json'}: id2label", expected="two classes or more, of which one is told of a text",
            got=f"{count}: a score of a text, or of a pair of texts (a reranker)",
        )  # fmt: skip
    if family.head != "classes" and any(source.class_field is not None for source in config.data.all_sources):
        raise ConfigError(
            "data.sources.class_field", expected="a teacher that tells classes (…ForSequenceClassification)",
            got=f"{family.data.architectures[0]}, which tells none", hint="leave it out",
        )  # fmt: skip
    of_classes = [entry.name for entry in distill.objectives if entry.of_classes]
    there = f"{family.data.architectures[0]}, " if family.is_encoder else f"a decoder ({family.name}), "
    if of_classes and family.head != "classes":
        raise ConfigError(
            f"distill.objectives: {of_classes[0]}",
            expected="a teacher that tells classes (…ForSequenceClassification)",
            got=f"{there}which tells none",
        )  # fmt: skip
    if not of_classes and family.head == "classes":
        raise ConfigError(
            "distill.objectives", expected="classification among them",
            got=f"{there}which tells classes; {', '.join(entry.name for entry in distill.objectives)} reads none",
        )  # fmt: skip
    if family.is_encoder and of_tokens and family.head != "masked_lm":
        raise ConfigError(
            f"distill.objectives: {', '.join(of_tokens)}", expected="sentence_embeddings, hidden_states or attention",
            got=f"{there}which has no head over the vocabulary",
        )  # fmt: skip
    if family.is_encoder and of_tokens and distill.masking is None:
        raise ConfigError(
            "distill.masking", expected="{}, or shares of its own: the objectives tell hidden tokens", got="none"
        )
