"""The example that makes training rows of plain text: every word is kept, in order, and nothing is written where it fails."""

from __future__ import annotations

import importlib
import json
import pathlib
import random

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
TEXTS = ["A small model writes what a large one reads.", "two words", "one two  three\nfour five six", "a b c d"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("prepare_healing_rows")


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def made(script, texts, *flags):
    output = texts.with_name("rows.jsonl")
    script.main(["--train_file", str(texts), "--prompt_column", "text", "--output_file", str(output), *flags])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_prompt_and_completion_are_the_text(script, texts, capsys):
    rows = made(script, texts)
    assert [row["prompt"] + row["completion"] for row in rows] == [TEXTS[0], *TEXTS[2:]]
    assert rows[-1] == {"prompt": "a b", "completion": " c d"}
    assert "1 texts are left out" in capsys.readouterr().out


def test_white_space_at_the_ends_is_no_word(script, texts):
    """A prompt of nothing else would make the whole file one that can't be read."""
    texts.write_text(json.dumps({"text": "\n" + 40 * " " + "one two three four  "}) + "\n")
    for flags in ([], ["--max_words", "4"]):
        assert made(script, texts, *flags) == [{"prompt": "one two", "completion": " three four"}]
        texts.with_name("rows.jsonl").unlink()


def test_places_are_by_chance_and_the_same_for_a_seed(script):
    text = " ".join(map(str, range(40)))
    cuts = [[script.cut_in_two(text, places) for _ in range(20)] for places in map(random.Random, (1, 1, 2))]
    assert cuts[0] == cuts[1] != cuts[2]
    lengths = {len(row["prompt"].split(" ")) for row in cuts[0]}
    assert len(lengths) > 5 and min(lengths) >= 2 and max(lengths) <= 38


def test_max_words(script, texts):
    assert made(script, texts, "--max_words", "4")[0]["completion"] == " model writes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_words", "3"], "at least 4, got 3"),
        (["--prompt_column", "words"], "no column 'words'; its columns are text"),
    ],
)
def test_refuses(script, texts, flags, message):
    with pytest.raises(SystemExit, match=message):
        made(script, texts, *flags)
    assert not texts.with_name("rows.jsonl").exists()


def test_refuses_texts_without_enough_words_and_a_file_that_exists(script, texts):
    made(script, texts)
    with pytest.raises(SystemExit, match="exists already"):
        made(script, texts)
    texts.with_name("rows.jsonl").unlink()
    texts.write_text('{"text": "two words"}\n')
    with pytest.raises(SystemExit, match="None of the 1 texts has 4 words"):
        made(script, texts)
