"""What a browser and a screen reader need of a page, read from its HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_EMPTY = {"input", "meta", "link", "br", "img", "path", "circle", "hr"}
_NOT_LABELLED = {"hidden", "submit"}


@dataclass
class Document(HTMLParser):
    """A parsed page; `faults` says what is wrong with it."""

    text: str
    faults: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)  # values of inputs by name
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._ids: list[str] = []
        self._labels: set[str] = set()
        self._inputs: list[dict[str, str]] = []
        self._main = 0
        self.whole = self.text.lstrip().startswith("<!doctype html>")
        self._level = 0 if self.whole else 2  # a part stands below a title of its page
        self.feed(self.text)
        self.close()
        self._judge()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.faults += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.faults.append(f"{tag} inside the page")
        self._ids += [given["id"]] if "id" in given else []
        if tag == "label":
            self._labels.add(given.get("for", ""))
        if tag in ("input", "select", "textarea") and given.get("type") not in _NOT_LABELLED:
            self._inputs.append(given)
        if tag == "input" and "name" in given:
            self.fields[given["name"]] = given.get("value", "")
        if tag == "a":
            self.links.append(given.get("href", ""))
            if not given.get("href", "").startswith(("/", "#")):
                self.faults.append(f"a link to {given.get('href')}")
        if tag == "th" and "scope" not in given:
            self.faults.append("a th without a scope")
        if tag in ("div", "span") and "tabindex" in given and given.get("role") != "region":
            self.faults.append(f"{tag} takes the focus without a role")
        if tag == "figure" and not given.get("aria-label"):
            self.faults.append("a figure without words")
        if tag == "main":
            self._main += 1
        if tag in ("h1", "h2", "h3"):
            level = int(tag[1])
            if level > self._level + 1:
                self.faults.append(f"{tag} after h{self._level}")
            self._level = level
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _EMPTY:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def _judge(self) -> None:
        self.faults += [f"{tag} stays open" for tag in self._open if tag not in ("p", "li")]
        self.faults += [f"id {name} twice" for name in set(self._ids) if self._ids.count(name) > 1]
        for given in self._inputs:
            if given.get("id") not in self._labels and not given.get("aria-label") and "hidden" not in given:
                self.faults.append(f"{given} has no label")
        if self.whole and self._main != 1:
            self.faults.append("no main")

    @property
    def said(self) -> str:
        """The text."""
        return " ".join(" ".join(self.words).split())
