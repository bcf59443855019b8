"""Opens what the student writes in a run (distill.on_policy), for one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdscale.config.distill.on_policy import OnPolicyConfig, PreferencesConfig
from kdscale.config.root import Config
from kdscale.data.packing import PackedSequence
from kdscale.data.readers.chat import chat_template
from kdscale.data.token_store import TokenStore
from kdscale.distill.load_models import Folders, RankSetup
from kdscale.distill.on_policy.given_pairs import GivenPairs, read_pairs
from kdscale.distill.on_policy.prompts import FilePrompts, PromptBook, TextPrompts, read_prompts
from kdscale.distill.on_policy.samples import Samples, Share
from kdscale.distill.on_policy.vllm import VllmWriter
from kdscale.distill.on_policy.writers import LocalWriter, Writer
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.schedule import total_steps
from kdscale.distill.step import StudentModule
from kdscale.errors import DataError
from kdscale.families import load_family
from kdscale.models.generation.drawing import Drawing, end_ids
from kdscale.models.loading import load_tokenizer
from kdscale.runs.folder import ON_POLICY
from kdscale.weights import read_config


def open_samples(
    cfg: Config,
    folders: Folders,
    setup: RankSetup,
    student: StudentModule,
    tied: Mapping[str, str],
    sequence: Callable[[int], PackedSequence],
    say: Callable[[str], None],
) -> Samples | GivenPairs | None:
    """What the student writes in place of text, or pairs of answers; None where the config asks for neither.

    `tied`: other names of a parameter. `sequence` gives the run's text by the number of a sequence. Raises DataError
    for prompts that cannot be used.
    """
    settings, distill = cfg.distill.own_text, cfg.distill
    if settings is None:
        return None
    mesh, store = Mesh.of(distill), TokenStore.open(folders.data)
    tokenizer: Any = load_tokenizer(folders.student, cfg.teacher.trust_remote_code)
    _check_room(settings, folders.student)
    pad_id = store.split("train").eos_id
    share = Share(
        total_steps(distill.tokens, distill.seq_len, distill.global_batch), distill.global_batch, distill.micro_batch,
        distill.seq_len, mesh.data_rank, mesh.data,
    )  # fmt: skip
    if isinstance(settings, PreferencesConfig) and settings.pairs:
        template, prefix = chat_template(cfg.data, tokenizer), store.split("train").prefix_ids
        pairs = read_pairs(settings, tokenizer, template, prefix, pad_id, say)
        return GivenPairs(settings, share, pairs, seed=cfg.seed, pad_id=pad_id)
    ends = tuple(end_ids(_generation_config(folders.student), tokenizer))
    drawing = Drawing(
        settings.max_new_tokens, settings.temperature, settings.top_p, student.vocab_size, ends, pad_id
    )  # fmt: skip
    return Samples(
        settings, share, _book(cfg, settings, store, tokenizer, sequence),
        _writer(cfg, settings, folders, setup, student, tied, drawing), folders.run / ON_POLICY.path,
        seed=cfg.seed, pad_id=pad_id, vocab_size=student.vocab_size, say=say,
        decode=lambda ids: str(tokenizer.decode(list(ids))),
    )  # fmt: skip


def _book(
    cfg: Config, settings: OnPolicyConfig, store: TokenStore, tokenizer: Any,
    sequence: Callable[[int], PackedSequence],
) -> PromptBook:  # fmt: skip
    train, slots = store.split("train"), settings.prompts_a_sequence(cfg.distill.seq_len)
    if not settings.prompts:
        return TextPrompts(train, store.split("heldout"), sequence, settings.prompt_tokens, slots)
    template = chat_template(cfg.data, tokenizer)
    return FilePrompts(read_prompts(settings, tokenizer, template, train.prefix_ids), slots, cfg.seed)


def _writer(
    cfg: Config, settings: OnPolicyConfig, folders: Folders, setup: RankSetup, student: StudentModule,
    tied: Mapping[str, str], drawing: Drawing,
) -> Writer:  # fmt: skip
    if settings.writer == "vllm":
        weights = Path(settings.vllm.weights) / cfg.name if settings.vllm.weights else folders.run / "work" / "vllm"
        return VllmWriter(
            settings.vllm, student.model, folders.student, weights, drawing, tied, cfg.prune.max_shard_bytes
        )
    return LocalWriter(
        student.model, folders.student, drawing, settings.micro_batch, device=setup.device, dtype=setup.dtype,
        grid=cfg.distill.fake_quantize, lora=cfg.distill.lora, trust_remote_code=cfg.teacher.trust_remote_code,
    )  # fmt: skip


def _generation_config(folder: Path) -> Any:
    """Of the checkpoint; an empty one where it has none."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def _check_room(settings: OnPolicyConfig, folder: Path) -> None:
    config = read_config(folder)
    limit = load_family(config, str(folder / "config.json")).language(config).get("max_position_embeddings")
    if isinstance(limit, int) and settings.answers_a_sequence > limit:
        raise DataError(
            f"distill.{settings.section}: a prompt and its answer",
            expected=f"at most {limit:,} tokens, as the student has",
            got=f"prompt_tokens {settings.prompt_tokens:,} and max_new_tokens {settings.max_new_tokens:,}",
            hint="lower one of them",
        )  # fmt: skip
