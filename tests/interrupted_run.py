"""A training run of `test_trainer.py`, which starts it in a process of its own to kill it: see `main`."""

from __future__ import annotations

import json
import pathlib
import sys
import time

import torch
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from transformers_llm2slm import LLM2SLMDataCollator

SAVE_STEPS, HANG_AT, MAX_STEPS = 3, 8, 10


class WriteLosses(TrainerCallback):
    """Append each step's loss to a file at once; from step `hang_at` on, wait to be killed."""

    def __init__(self, file: pathlib.Path, hang_at: int | None):
        self.file = file
        self.hang_at = hang_at

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            with self.file.open("a") as file:
                file.write(json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\n")
        if state.global_step == self.hang_at:
            time.sleep(600)


def run(folder: pathlib.Path, name: str, hang_at: int | None = None, resume: bool = False) -> Trainer:
    """Train what lies in `folder` (model, processor and `rows.json`), with all that is random: order and dropout."""
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        max_steps=MAX_STEPS,
        save_steps=SAVE_STEPS,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
    )
    trainer = Trainer(
        model=AutoModel.from_pretrained(folder),
        args=arguments,
        train_dataset=json.loads((folder / "rows.json").read_text()),
        data_collator=LLM2SLMDataCollator(processor),
        processing_class=processor,
        callbacks=[WriteLosses(folder / f"{name}.jsonl", hang_at)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]), sys.argv[2], hang_at=HANG_AT)
