"""Rows from files and data sets, and what is said of those that can't be taken."""

from __future__ import annotations

import pytest
from conftest import ROWS, write_rows

from transformers_llm2slm.rows import load_rows

pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_rows_of_every_kind_of_file(tmp_path, name):
    rows = [*ROWS[:2], {"prompt": "NA", "completion": "None"}]  # words, not missing values
    assert load_rows(write_rows(tmp_path / name, rows)).to_list() == rows


def test_rows_with_a_context(tmp_path):
    """It follows the prompt, in rows where it has text, as in Alpaca."""
    rows = [{"instruction": "Add.", "input": text, "output": "3"} for text in ("1 + 2", "", " ")]
    columns = {"prompt_column": "instruction", "completion_column": "output", "context_column": "input"}
    prompts = load_rows(write_rows(tmp_path / "rows.jsonl", rows), **columns)["prompt"][:]
    assert prompts == ["Add.\n\n1 + 2", "Add.", "Add."]
    with pytest.raises(
        ValueError, match="no column 'inputs'; its columns are instruction, input, output: .* `context_column`"
    ):
        load_rows(tmp_path / "rows.jsonl", **columns | {"context_column": "inputs"})


def test_rows_by_column(tmp_path):
    nested = [{"id": i, "translation": {"en": row["prompt"], "de": row["completion"]}} for i, row in enumerate(ROWS)]
    file = write_rows(tmp_path / "nested.jsonl", nested)
    columns = {"prompt_column": "translation.en", "completion_column": "translation.de"}
    assert load_rows(file, **columns).to_list() == ROWS
    assert load_rows(file, **columns | {"completion_column": None}, max_rows=2).to_list() == [
        {"prompt": row["prompt"]} for row in ROWS[:2]
    ]


def test_rows_of_a_data_set(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    assert load_rows(dataset=str(tmp_path), split="train[2:5]").to_list() == ROWS[2:5]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("rows.jsonl", '{"text": "a", "completion": "b"}', "has no column 'prompt'; its columns are text, completion"),
        ("rows.jsonl", '{"prompt": "a", "completion": 3}', "column 'completion' of .* must be text, found int64"),
        ("rows.jsonl", '{"prompt": "a", "completion": ["b"]}', "column 'completion' of .* must be text"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": " ", "completion": "c"}', "Row 1 .*no prompt"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "c"}', "Row 1 .*no completion"),
        ("rows.jsonl", '{"prompt": "a"', "can't be read as json: "),
        ("rows.csv", "prompt,completion\n", "can't be read as csv: .*no data"),
        ("rows.jsonl", "", r"rows\.jsonl' is empty"),
        ("rows.json", "[]", "can't be read as json|holds no rows"),
        ("rows.xlsx", "PK", "its name must end in one of .jsonl, .json,"),
    ],
)
def test_rows_that_can_not_be_taken(tmp_path, name, content, text):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=text):
        load_rows(tmp_path / name)


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_rows_of_conversations(tmp_path, name):
    """A column of conversations, or prompts and completions that are lists of messages."""
    rows = [{"talk": CHAT, "asked": CHAT[:1], "answered": CHAT[1:]}] * 2
    file = write_rows(tmp_path / name, rows)
    assert load_rows(file, messages_column="talk").to_list() == [{"messages": CHAT}] * 2
    columns = {"prompt_column": "asked", "completion_column": "answered"}
    expected = [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 2
    assert load_rows(file, **columns, conversational=True).to_list() == expected
    with pytest.raises(ValueError, match="column 'asked' of .* must be text, found list"):
        load_rows(file, **columns)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("Hello", "column 'messages' of .* must be a list of messages, found string"),
        (CHAT[:1], "Row 0 .*has no response to learn: .*found the roles user"),
        (CHAT[1:], "Row 0 .*has no response to learn: .*found the roles assistant"),
        ([{"role": "user"}, CHAT[1]], "Row 0 .*has no messages with text: leave such rows out"),
    ],
)
def test_conversations_that_can_not_be_taken(tmp_path, messages, text):
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=text):
        load_rows(file, messages_column="messages")


def test_rows_from_nowhere(tmp_path, rows_file):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_rows(tmp_path / "none.jsonl")
    for arguments in ({}, {"file": rows_file, "dataset": "squad"}):
        with pytest.raises(ValueError, match="give one of the two"):
            load_rows(**arguments)
