"""Training runs of `test_distributed.py`, in one process or in those that `accelerate launch` starts: see `run`."""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from transformers import AutoModel, AutoProcessor, Seq2SeqTrainer, Seq2SeqTrainingArguments

from transformers_llm2slm import LLM2SLMDataCollator
from transformers_llm2slm.data_collator import STATES_COLUMN

GLOBAL_BATCH_SIZE, SAVE_STEPS, MAX_STEPS = 4, 2, 4


def shard_on_cpu() -> None:
    """Let accelerate shard here as on GPUs: on CPUs it runs DDP instead, whatever its configuration file says."""
    init = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = __init__


def run(folder: pathlib.Path, name: str, states: str | None = None, resume_from: str | None = None) -> None:
    """
    Train what lies in `folder` (model, processor and `rows.json`) into its subfolder `name`, all batches of equal size.

    With `states`, a file of the LLM's states for each row, the model is loaded without its LLM.
    """
    torch.set_num_threads(1)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / name),
        max_steps=MAX_STEPS,
        save_steps=SAVE_STEPS,
        logging_steps=1,
        learning_rate=3e-3,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
    )
    arguments.per_device_train_batch_size = GLOBAL_BATCH_SIZE // arguments.world_size
    processor = AutoProcessor.from_pretrained(folder)
    rows = json.loads((folder / "rows.json").read_text())
    if states is not None:
        rows = [row | {STATES_COLUMN: value} for row, value in zip(rows, torch.load(folder / states), strict=True)]
    trainer = Seq2SeqTrainer(
        model=AutoModel.from_pretrained(folder, load_llm=states is None),
        args=arguments,
        train_dataset=rows,
        data_collator=LLM2SLMDataCollator(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume_from and str(folder / resume_from))
    trainer.save_model()


if __name__ == "__main__":
    shard_on_cpu()
    for arguments in json.loads(sys.argv[1]):
        run(pathlib.Path(arguments.pop("folder")), **arguments)
    # A process that ends with its group's threads alive may crash, or break what the other one still receives.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
