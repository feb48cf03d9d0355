"""Marked sections of a Markdown text: what a program wrote is replaced in place, what a person wrote is left as it is.

A section stands between two HTML comments, `<!-- llm2slm:NAME -->` and `<!-- /llm2slm:NAME -->`; the first may say of which
weights its figures are: `<!-- llm2slm:NAME weights=FINGERPRINT -->`. Headings stand outside, so they can be changed too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SECTION = re.compile(
    r"<!-- llm2slm:(?P<name>[a-z-]+)(?: weights=(?P<weights>[\w:.-]+))? -->\r?\n"
    r"(?P<text>.*?)"
    r"(?:\r?\n)?<!-- /llm2slm:(?P=name) -->",
    re.DOTALL,
)


@dataclass(frozen=True)
class Section:
    """
    Args:
        text (`str`): What stands between the markers.
        weights (`str`, *optional*): Fingerprint of the weights that its figures are of.
    """

    text: str
    weights: str | None = None


def marked(name: str, section: Section) -> str:
    """A section between its markers. A comment in its text can't be taken for one of them."""
    weights = f" weights={section.weights}" if section.weights else ""
    text = section.text.replace("<!--", "&lt;!--")
    return f"<!-- llm2slm:{name}{weights} -->\n{text}\n<!-- /llm2slm:{name} -->"


def read_sections(text: str) -> dict[str, Section]:
    """The sections of a text by name, as they stand there. One that lacks a marker is none any more."""
    return {m["name"]: Section(m["text"].replace("\r\n", "\n"), m["weights"]) for m in _SECTION.finditer(text)}


def replace_sections(text: str, sections: Mapping[str, Section]) -> str:
    """
    `text` with new `sections` in place of those of the same name, and not a byte changed elsewhere.

    A section that `text` does not have is not added: a person has taken it away.
    """
    line_break = "\r\n" if "\r\n" in text else "\n"

    def replaced(match: re.Match[str]) -> str:
        if match["name"] not in sections:
            return match[0]
        return marked(match["name"], sections[match["name"]]).replace("\n", line_break)

    return _SECTION.sub(replaced, text)
