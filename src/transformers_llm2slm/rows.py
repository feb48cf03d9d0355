"""Rows to train and evaluate on: files and hub data sets, through `datasets`, as the columns `prompt` and `completion`,
or `messages`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluation import require_extra
from .processing_llm2slm import is_conversation

if TYPE_CHECKING:
    from datasets import Dataset

# File name endings and the builders of `datasets` that read them.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}


def load_rows(
    file: Path | None = None,
    *,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    prompt_column: str = "prompt",
    completion_column: str | None = "completion",
    context_column: str | None = None,
    messages_column: str | None = None,
    conversational: bool = False,
    max_rows: int | None = None,
    **hub: Any,
) -> Dataset:
    """
    Rows of text from a local file or a data set of the hub.

    Args:
        file (`Path`, *optional*): JSON lines, JSON or CSV (also with .gz), or Parquet.
        dataset, dataset_config, split (`str`, *optional*): A data set, its configuration and its split, in place of a
            file.
        prompt_column, completion_column (`str`): The columns to take; `translation.de` takes `de` of the column
            `translation`. `completion_column=None` takes prompts only.
        context_column (`str`, *optional*): A column that follows the prompt after an empty line, in rows where it has text.
        messages_column (`str`, *optional*): Take this column of conversations instead, as `messages`; each ends in the
            assistant's answer.
        conversational (`bool`, defaults to `False`): Let prompts and completions be lists of messages, with `"role"` and
            `"content"`, as well as text.
        max_rows (`int`, *optional*): Only so many rows, from the first.
        hub: `token`, `cache_dir` ... for the data set.

    Returns:
        `datasets.Dataset` with the columns `prompt` and, unless not wanted, `completion`, or with the column `messages`.

    Raises:
        ValueError: for a file of another kind, a column that there isn't, or a row that lacks something.
        OSError: for a file that there isn't.
    """
    require_extra("train", "datasets")

    if (file is None) == (dataset is None):
        raise ValueError("Rows come from a file or from a data set (`dataset`): give one of the two.")
    rows = _read_file(file) if file is not None else _read_hub(str(dataset), dataset_config, split, hub)
    source = str(file or dataset)
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{source} holds no rows.")

    columns = {"prompt": prompt_column} | ({"completion": completion_column} if completion_column else {})
    if context_column is not None:
        columns["context"] = context_column
    if messages_column is not None:
        columns, conversational = {"messages": messages_column}, True
    if any(column not in rows.column_names for column in columns.values()):
        rows = rows.flatten()
    for name, column in columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"{source} has no column {column!r}; its columns are {', '.join(rows.column_names)}: choose one with "
                f"`{name}_column`."
            )
        kind = getattr(rows.features[column], "dtype", type(rows[0][column]).__name__)
        is_text = kind in ("string", "large_string") and name != "messages"
        if not is_text and not (conversational and kind == "list"):
            expected = "a list of messages" if name == "messages" else "text"
            raise ValueError(f"The column {column!r} of {source} must be {expected}, found {kind}.")
    rows = rows.select_columns(list(columns.values())).rename_columns({c: name for name, c in columns.items()})
    if "context" in columns:
        rows = rows.map(_add_context, remove_columns="context", desc="Adding contexts")
    _check_values(rows, source)
    return rows


def _add_context(row: dict[str, str | None]) -> dict[str, str]:
    return {"prompt": "\n\n".join(part.strip() for part in (row["prompt"], row["context"]) if part and part.strip())}


def prompt_and_completion(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """
    Prompt and response of a row in one of TRL's formats.

    Args:
        row (`Mapping`): With `"prompt"` and `"completion"`, both text or both lists of messages; or with `"messages"`, of
            which the last is the response.
        where (`str`): Names the row in an error.

    Raises:
        ValueError: for a row without one of the two; it names the columns that there are.
    """
    messages = row.get("messages")
    if messages is not None and "prompt" not in row:
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise ValueError(
                f"{where} has no response to learn: its messages must be at least two, the last one of the assistant; "
                f"found the roles {roles}. Leave such rows out."
            )
        return messages[:-1], messages[-1:]
    for name in ("prompt", "completion"):
        value = row.get(name)
        if not isinstance(value, str) and not is_conversation(value):
            raise ValueError(
                f"{where} has no text in column {name!r}; its columns are {sorted(row)}. Rename your columns to "
                '"prompt" and "completion" (or "messages"), and set `remove_unused_columns=False` in the training '
                "arguments, or the Trainer drops them."
            )
    if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise ValueError(f"{where} has text and messages: give both its prompt and its completion as one of the two.")
    return row["prompt"], row["completion"]


def _read_file(file: Path) -> Dataset:
    import datasets

    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    kind = next((kind for ending, kind in FORMATS.items() if file.name.lower().endswith(ending)), None)
    if kind is None:
        raise ValueError(f"Can't tell what {str(file)!r} is: its name must end in one of {', '.join(FORMATS)}.")
    if file.stat().st_size == 0:
        raise ValueError(f"{str(file)!r} is empty.")
    # "NA" and "None" are words like any other.
    options = {"keep_default_na": False} if kind == "csv" else {}
    try:
        return datasets.load_dataset(kind, data_files=str(file), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{str(file)!r} can't be read as {kind}: {error.__cause__ or error}") from error


def _read_hub(dataset: str, dataset_config: str | None, split: str, hub: dict[str, Any]) -> Dataset:
    import datasets

    hub = {key: value for key, value in hub.items() if key in ("token", "cache_dir") and value is not None}
    return datasets.load_dataset(dataset, dataset_config, split=split, **hub)


def _check_values(rows: Dataset, source: str) -> None:
    """Raise a `ValueError` for a row without a prompt (of more than white space), a completion, or usable messages."""
    for start in range(0, len(rows), 1000):
        for name, values in rows[start : start + 1000].items():
            for index, value in enumerate(values, start=start):
                where = f"Row {index} of {source} (the first is 0)"
                if isinstance(value, str):
                    complete = name != "prompt" or bool(value.strip())
                else:
                    complete = is_conversation(value) and all(isinstance(m.get("content"), str) for m in value)
                if not complete:
                    missing = "messages with text" if name == "messages" else name
                    raise ValueError(f"{where} has no {missing}: leave such rows out.")
                if name == "messages":
                    prompt_and_completion({"messages": value}, where)
