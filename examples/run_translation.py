#!/usr/bin/env python3
"""Train, evaluate and use an LLM-to-SLM model for translation, with the plain `Seq2SeqTrainer`.

    python examples/run_translation.py --help

The arguments are those of `Seq2SeqTrainingArguments` and of transformers' own example of this name, where they mean the
same, and those of the model; examples/README.md has commands. sacreBLEU and chrF are measured on what the model
generates.
"""

from dataclasses import dataclass

from example_utils import DataArguments, ModelArguments, option, parse_arguments, run_seq2seq
from transformers import Seq2SeqTrainingArguments

METRICS = ("bleu", "chrf")


@dataclass
class TranslationArguments(DataArguments):
    source_column: str = option("column of the texts; translation.en takes en of the column translation", "en")
    target_column: str = option("column of their translations", "de")


def main() -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, TranslationArguments, Seq2SeqTrainingArguments
    )
    run_seq2seq(
        model_args,
        data_args,
        training_args,
        METRICS,
        prompt_column=data_args.source_column,
        completion_column=data_args.target_column,
    )


if __name__ == "__main__":
    main()
