#!/usr/bin/env python3
"""Make training rows of plain text, by which an SLM cut from an LLM becomes a language model again before it learns a task.

    python examples/prepare_healing_rows.py --train_file examples/data/synopsis-train.jsonl.gz \\
        --max_words 60 --output_file healing.jsonl

The output has a line `{"prompt": ..., "completion": ...}` for each text, as the training commands read it: the text is cut in
two at a random word, and what stands before is read, what stands behind is written. No answers are needed, so the prompts of
a task serve, and any text like them. Train on it first, then on the task with `--model_name_or_path`; benchmarks/quality.md
has what it gives.
"""

import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from transformers_llm2slm.rows import load_rows

# Words that a text must have, half of them on each side of the cut.
FEWEST_WORDS = 4


@dataclass
class HealingArguments:
    """What can be chosen on the command line."""

    output_file: Path = field(metadata={"help": "JSON lines to write"})
    dataset_name: str | None = field(default=None, metadata={"help": "hub dataset with the texts"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    split: str = field(default="train", metadata={"help": "its split"})
    train_file: Path | None = field(default=None, metadata={"help": "file with the texts, in place of a dataset"})
    prompt_column: str = field(default="prompt", metadata={"help": "column of the texts; a.b takes b of column a"})
    max_samples: int | None = field(default=None, metadata={"help": "take only so many texts, from the first"})
    max_words: int | None = field(default=None, metadata={"help": "take only so many words of a text, from the first"})
    seed: int = field(default=42, metadata={"help": "of the places where texts are cut"})


def cut_in_two(text: str, places: random.Random) -> dict[str, str] | None:
    """
    The `prompt` and `completion` that a text makes, cut at a word by chance; `None` of one that is too short. White space
    at its ends is left out, so that there are words on both sides.
    """
    words = text.strip().split(" ")
    if len(words) < FEWEST_WORDS:
        return None
    place = places.randint(FEWEST_WORDS // 2, len(words) - FEWEST_WORDS // 2)
    return {"prompt": " ".join(words[:place]), "completion": " " + " ".join(words[place:])}


def write_rows(arguments: HealingArguments) -> dict[str, int]:
    """
    Write the output.

    Returns:
        `dict[str, int]`: `rows` written, and texts that were too `short`.

    Raises:
        ValueError: for arguments and data that can't be used.
        OSError: for files that can't be reached.
    """
    if arguments.output_file.exists():
        raise ValueError(f"{arguments.output_file} exists already: remove it, or choose another --output_file.")
    if arguments.max_words is not None and arguments.max_words < FEWEST_WORDS:
        raise ValueError(f"--max_words must be at least {FEWEST_WORDS}, got {arguments.max_words}.")
    rows = load_rows(
        arguments.train_file,
        dataset=arguments.dataset_name,
        dataset_config=arguments.dataset_config_name,
        split=arguments.split,
        prompt_column=arguments.prompt_column,
        completion_column=None,
        max_rows=arguments.max_samples,
    )
    places = random.Random(arguments.seed)
    texts = (" ".join(text.strip().split(" ")[: arguments.max_words]) for text in rows["prompt"])
    made = [cut_in_two(text, places) for text in texts]
    written = [row for row in made if row is not None]
    if not written:
        raise ValueError(f"None of the {len(made)} texts has {FEWEST_WORDS} words.")
    part = arguments.output_file.with_name(arguments.output_file.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    os.replace(part, arguments.output_file)
    return {"rows": len(written), "short": len(made) - len(written)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    (parsed,) = HfArgumentParser(HealingArguments, description=__doc__).parse_args_into_dataclasses(arguments)
    try:
        counts = write_rows(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{parsed.output_file}: {counts['rows']} rows.")
    if counts["short"]:
        print(f"{counts['short']} texts are left out: they have fewer than {FEWEST_WORDS} words.")


if __name__ == "__main__":
    main()
