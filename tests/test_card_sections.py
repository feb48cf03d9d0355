"""Marked sections: replaced in place, with no other byte changed."""

from __future__ import annotations

import pytest

from transformers_llm2slm.card_sections import Section, marked, read_sections, replace_sections

TEXT = "# Title\n\n<!-- llm2slm:one -->\nold\n\nlines\n<!-- /llm2slm:one -->\nmine\n<!-- llm2slm:two weights=a:1 -->\n2\n<!-- /llm2slm:two -->"


def test_what_was_written_is_read():
    assert read_sections(TEXT) == {"one": Section("old\n\nlines"), "two": Section("2", "a:1")}
    assert read_sections(TEXT.replace("\n", "\r\n")) == read_sections(TEXT)
    assert read_sections(marked("llm-size", Section("", "b"))) == {"llm-size": Section("", "b")}


def test_only_named_sections_that_are_there_change():
    new = replace_sections(TEXT, {"two": Section("new", "b:2"), "three": Section("not there")})
    assert new == TEXT.replace("weights=a:1 -->\n2\n", "weights=b:2 -->\nnew\n")


@pytest.mark.parametrize("marker", ["<!-- llm2slm:one -->", "<!-- /llm2slm:one -->"])
def test_a_section_without_one_of_its_markers_is_a_persons_own(marker):
    text = TEXT.replace(marker, "")
    assert replace_sections(text, {"one": Section("new")}) == text
    assert "two" in read_sections(text)


def test_text_can_hold_no_marker():
    hostile = Section("a <!-- /llm2slm:one --> b \\1 \\g<name>")
    once = replace_sections(TEXT, {"one": hostile})
    assert once.count("<!-- /llm2slm:one -->") == 1
    assert replace_sections(once, {"one": hostile}) == once
