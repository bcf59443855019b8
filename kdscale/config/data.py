"""`data`: the text to train and measure on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kdscale.config.fields import Count, Section


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A format that text is read from: one row of READERS.

    `read` names the function ("module:function") that reads it: it takes the file (of the hub: the source's path) and
    the SourceConfig, and yields (where, content): where it is, for messages, and a text, a record or token ids.
    """

    name: str
    suffixes: tuple[str, ...] = ()  # of its files' names
    companion: str | None = None  # in place of the suffix: the file beside each file that belongs to it
    scheme: str | None = None  # what its paths begin with; it has no files of its own then
    read: str
    help: str

    def claims(self, name: str) -> bool:
        """Whether a file of this name is one of its own."""
        return name.endswith(self.suffixes)


READERS: dict[str, Reader] = {
    row.name: row
    for row in (
        Reader(
            name="text",
            suffixes=(".txt",),
            read="kdscale.data.readers.text:read",
            help="A document each; one of 128 KiB or more is cut into documents of about 64 Ki characters, at blank "
            "lines where there are some.",
        ),
        Reader(
            name="jsonl",
            suffixes=(".jsonl", ".jsonl.gz"),
            read="kdscale.data.readers.jsonl:read",
            help="A JSON object a line, its text in `field`, or a chat's messages (`chat: true`).",
        ),
        Reader(
            name="parquet",
            suffixes=(".parquet",),
            read="kdscale.data.readers.arrow:read_parquet",
            help="A record a row, its text in the column `field`, or a chat's messages (`chat: true`).",
        ),
        Reader(
            name="arrow",
            suffixes=(".arrow",),
            read="kdscale.data.readers.arrow:read_arrow",
            help="A folder that `save_to_disk` of the library `datasets` wrote (its part `split` where it has "
            "several), or files of one. Columns as in Parquet.",
        ),
        Reader(
            name="megatron",
            suffixes=(".idx",),
            companion=".bin",
            read="kdscale.data.readers.megatron:read",
            help="Megatron's indexed data set: token ids, which are taken as they are and must come from the teacher's "
            "tokenizer; the `.bin` file lies beside.",
        ),
        Reader(
            name="hub",
            scheme="hf:",
            read="kdscale.data.readers.hub:read",
            help="`hf:NAME` or `hf:NAME#CONFIG`: the part `split` of a data set on the hub, streamed; nothing is kept "
            "on disk but its tokens.",
        ),
    )
}


def file_suffixes() -> tuple[str, ...]:
    """The ends of the names of all files that can be read."""
    return tuple(suffix for reader in READERS.values() for suffix in reader.suffixes)


RESPONSES_SOURCE = "responses:"  # the path that stands for what the stage responses leaves


class PromptSourceConfig(Section):
    """A file of prompts, one on each line: a `.txt`, a `.jsonl` or `.jsonl.gz` of records, or `builtin:questions`."""

    path: str = Field(min_length=1)
    # of a record: the prompt, as text; a record with `messages` is a chat, whose last answer is left out
    field: str = "prompt"


class SourceConfig(Section):
    """One source of text: `builtin:classics`, a file, a folder or glob of files in formats of READERS, or `hf:NAME`."""

    path: str = Field(min_length=1)
    field: str | None = None  # that holds the text; None: `text`, or `messages` of a chat
    chat: bool = False  # whether `field` holds a conversation, of which the answers are learned
    source_field: str | None = "source"  # names where each record comes from; None: the file's name does
    # of a record: the class that its text is of, by its number or by its name in the teacher's config; null or absent:
    # it is not known. For teachers that tell classes
    class_field: Annotated[str, Field(min_length=1)] | None = None
    split: str = "train"  # of a data set that has several
    weight: Annotated[int, Field(ge=1, le=10_000)] = 1  # how often each document is repeated per epoch
    tag: Annotated[str, Field(min_length=1)] | None = (
        None  # names the source elsewhere; None: each document's label does
    )

    @property
    def field_name(self) -> str:
        """The field that holds the text or the conversation."""
        return self.field or ("messages" if self.chat else "text")

    @property
    def name(self) -> str:
        """What a blend calls it."""
        return self.tag or self.path

    @model_serializer(mode="wrap")
    def _without_unknown_classes(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What runs of older versions wrote has no such field: their text is still the same."""
        written: dict[str, Any] = dump(self)
        return {name: value for name, value in written.items() if name != "class_field" or value is not None}

    @model_validator(mode="after")
    def _hub_sets_have_names(self) -> SourceConfig:
        if self.path.startswith("hf:") and not self.path.removeprefix("hf:").strip():
            raise ValueError("path: expected hf:NAME, the name of a data set on the hub")
        return self


class BlendConfig(Section):
    """How much of the training text comes from which sources, whatever their sizes."""

    # Shares by the tag of a source, or by its path where it has none; their sum may be any number.
    weights: dict[str, Annotated[float, Field(gt=0.0, le=1e9)]] = Field(strict=False, min_length=1, max_length=1000)
    tokens: Count | None = None  # of which each share is tokenised at most; the rest of a source is not read

    def shares(self) -> dict[str, float]:
        """The weights as shares of 1."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}


class DataConfig(Section):
    """What is trained and measured on, and how documents are held out."""

    sources: tuple[SourceConfig, ...] = Field(
        strict=False, min_length=1, max_length=1000, default=(SourceConfig(path="builtin:classics"),)
    )
    # Held-out documents are chosen by a hash of their text, so the split stays the same when sources are added.
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    heldout_sources: tuple[SourceConfig, ...] = Field(
        strict=False, max_length=1000, default=()
    )  # if given, used instead of the fraction
    blend: BlendConfig | None = None  # None: all documents, each as often as its source's weight says
    deduplicate: bool = False  # whether a text that came before, but for case and white space, is left out
    # Whether training documents are looked through for runs of evaluation text, and what is done with such documents.
    leaks: Literal["off", "report", "drop", "fail"] = "off"
    leak_tokens: Annotated[int, Field(ge=4, le=1024)] = 13  # length of a run
    leak_sources: tuple[SourceConfig, ...] = Field(
        strict=False, max_length=1000, default=()
    )  # beside the held-out text
    max_document_tokens: Count | None = None
    # Whether each document is cut into its sentences, which then count as documents, for encoders that embed sentences;
    # those of one document are all trained on, or all held out.
    sentences: bool = False
    # Whether what the tokenizer puts around a text (BOS) begins each document and each window that continues one.
    add_special: Literal["auto", "never"] = "auto"
    chat_template: str | None = None  # a Jinja file, in place of the tokenizer's own template
    processes: Annotated[int, Field(ge=1, le=256)] | None = None  # that tokenise; None: one per core for much text
    share: bool = True  # tokenised text with other runs of this user, in a cache folder

    @property
    def has_chats(self) -> bool:
        """Whether any source holds conversations."""
        return any(source.chat for source in self.all_sources)

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Every source that is read, for whatever purpose."""
        return *self.sources, *self.heldout_sources, *(self.leak_sources if self.leaks != "off" else ())

    @model_validator(mode="after")
    def _sentences_are_of_texts(self) -> DataConfig:
        if self.sentences and self.has_chats:
            raise ValueError("sentences: a conversation is not cut into sentences; leave chat or sentences out")
        if (self.sentences or self.has_chats) and any(source.class_field is not None for source in self.all_sources):
            raise ValueError("sources: class_field is of whole texts; leave sentences and chat out")
        return self

    @model_validator(mode="after")
    def _the_blend_names_all_sources(self) -> DataConfig:
        if self.blend is None:
            return self
        names, weights = {source.name for source in self.sources}, set(self.blend.weights)
        if unknown := sorted(weights - names):
            raise ValueError(f"blend.weights: no source has the tag or path {unknown}; there are {sorted(names)}")
        if missing := sorted(names - weights):
            raise ValueError(f"blend.weights: expected a weight for each source, got none for {missing}")
        if repeated := [source.path for source in self.sources if source.weight != 1]:
            raise ValueError(f"sources: weight (a number of repeats) does not go with blend, got it for {repeated}")
        return self
