#!/usr/bin/env python3
"""Train, evaluate and use an LLM-to-SLM model for summarisation, with the plain `Seq2SeqTrainer`.

    python examples/run_summarization.py --help

The arguments are those of `Seq2SeqTrainingArguments` and of transformers' own example of this name, where they mean the
same, and those of the model; examples/README.md has commands. ROUGE is measured on what the model generates.
"""

from dataclasses import dataclass

from example_utils import DataArguments, ModelArguments, option, parse_arguments, run_seq2seq
from transformers import Seq2SeqTrainingArguments

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass
class SummarizationArguments(DataArguments):
    text_column: str = option("column of the texts", "prompt")
    summary_column: str = option("column of their summaries", "completion")


def main() -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, SummarizationArguments, Seq2SeqTrainingArguments
    )
    run_seq2seq(
        model_args,
        data_args,
        training_args,
        METRICS,
        prompt_column=data_args.text_column,
        completion_column=data_args.summary_column,
    )


if __name__ == "__main__":
    main()
