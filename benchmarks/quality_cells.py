"""What `quality.py` trains and measures: a cell for each contestant, setting and seed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

SMOLLM2, MPNET, MINILM = "smollm2-135m-instruct", "all-mpnet-base-v2", "all-minilm-l6-v2"
ZERO_SHOT, TUNED, SLM, HYBRID = "LLM, zero-shot", "LLM, fine-tuned", "SLM alone", "LLM-to-SLM"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """
    Args:
        columns: Of the texts to read and to write, in the files of `examples/data`.
        suffix: What every prompt ends with.
        instruction: What the untrained LLM is told to do with a prompt.
        score: What it is judged by, a name of [`text_scores`].
        max_prompt_length: In tokens, the suffix not counted.
        max_new_tokens: Of an answer.
    """

    columns: tuple[str, str]
    suffix: str
    instruction: str
    score: str
    max_prompt_length: int
    max_new_tokens: int


TASKS = {
    "synopsis": Task(
        columns=("prompt", "completion"),
        suffix="\nSynopsis:\n",
        instruction="Describe this software package in one line of at most eight words.",
        score="rougeL",
        max_prompt_length=80,
        max_new_tokens=24,
    ),
    "ddtp-de": Task(
        columns=("en", "de"),
        suffix="\nGerman:\n",
        instruction="Translate this text into German.",
        score="chrf",
        max_prompt_length=60,
        max_new_tokens=48,
    ),
}


@dataclass(frozen=True)
class Cell:
    """
    One model, trained once and measured once.

    Args:
        task: A name of [`TASKS`].
        contestant: Which of the four kinds.
        llm: A name of `examples/prepare_models.py`.
        tuned_llm: Fine-tune the LLM on the task first: it is then what reads, frozen, and what the SLM is cut from.
        lora_rank: Of a fine-tuned LLM: train adapters of this rank at its linear layers instead of all of it.
        slm_layers: Layers of SmolLM2, or of the tuned LLM, that make the SLM; a number means the upper ones. Its embeddings and
            LM head are not trained.
        slm_shape: Make a new SLM of this shape instead: `t5-256x4` has the width 256, and 4 and 4 layers. Its tokenizer is
            trained on the task's texts.
        llm_layer, fusion, projector_init, projector_num_layers, projector_hidden_size, projector_norm, slm_encoder: As for
            `from_llm_slm_pretrained`; `None` leaves it to its defaults.
        freeze_slm: Train the projector alone.
        labels: What is learnt, the answers of the data or those of the fine-tuned LLM.
        distillation_weight: Share of the divergence from the fine-tuned LLM in the loss.
        heal_steps: Steps before, in which prompts are cut somewhere and their own text is the answer.
        steps, batch_size, rows: Training steps, rows in a step, and rows there are.
        learning_rate, projector_learning_rate: Peaks of AdamW's; the second is by default the first.
        max_prompt_length: By default the task's.
        shortlist: Write only tokens of the training answers, or of prompts and answers, by an LM head of their size.
        seed: Of new weights, the order of the rows, and what is cut for healing.
        split: What is measured on. Settings are chosen on the validation rows; the test rows are for the main table alone.
    """

    task: str
    contestant: str
    llm: str = SMOLLM2
    tuned_llm: bool = False
    lora_rank: int | None = None
    slm_layers: int | tuple[int, ...] | None = None
    slm_shape: str | None = None
    fusion: str | None = None
    llm_layer: int | tuple[int, ...] | None = None
    projector_init: str | None = None
    projector_num_layers: int | None = None
    projector_hidden_size: int | None = None
    projector_norm: str | None = None
    slm_encoder: str | None = None
    freeze_slm: bool = False
    labels: Literal["data", "llm"] = "data"
    distillation_weight: float = 0.0
    heal_steps: int = 0
    steps: int = 0
    batch_size: int = 16
    rows: int = 8000
    learning_rate: float = 1e-3
    projector_learning_rate: float | None = None
    max_prompt_length: int | None = None
    shortlist: Literal["answers", "prompts"] | None = None
    seed: int = 0
    split: Literal["test", "validation"] = "test"

    @property
    def prompt_length(self) -> int:
        return self.max_prompt_length or TASKS[self.task].max_prompt_length

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, but for task and contestant."""
        fields = dataclasses.fields(self)[2:]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {field.name: values[field.name] for field in fields if values[field.name] != field.default}

    @property
    def name(self) -> str:
        """File name of its results, without the folder and the ending."""

        def shown(value: Any) -> str:
            return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)

        parts = [f"{name}={shown(value)}" for name, value in self.settings().items()]
        return "_".join([self.contestant.replace(", ", "-").replace(" ", "-"), *parts])

    def with_changes(self, **changes: Any) -> Cell:
        return dataclasses.replace(self, **changes)
