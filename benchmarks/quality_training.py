"""How `quality.py` trains a cell and measures it: the plain `Seq2SeqTrainer`, cached states, greedy texts."""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from quality_cells import HYBRID, TASKS, ZERO_SHOT, Cell
from quality_models import (
    Contestant,
    alone_writer,
    as_dataset,
    contestant_for,
    frozen_dtype,
    healing_rows,
    loss_per_token,
    rows_for,
    write_all,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from transformers_llm2slm import LogitDistillationMixin, cache_llm_states
from transformers_llm2slm.evaluation import text_scores

CURVE_POINTS, CURVE_ROWS = 5, 200


class DistillationTrainer(LogitDistillationMixin, Seq2SeqTrainer):
    pass


def run(
    cell: Cell, work_dir: pathlib.Path, teacher: Callable[[], pathlib.Path]
) -> tuple[dict[str, Any], PreTrainedModel]:
    """
    Train a cell and measure it.

    Args:
        cell: What to train.
        work_dir: For cached states, what the trainer writes, and the trained weights.
        teacher: Gives the folder of the fine-tuned LLM of the cell's task, where the cell learns from it.

    Returns:
        `settings`, `parameters` trained, `metrics`, `curve`, `seconds` of each part, and `answers`, in the order of the rows;
        and the model.
    """
    contestant = contestant_for(cell, teacher() if cell.tuned_llm else None)
    model, curve, seconds = contestant.model, [], {}
    if cell.steps:
        curve, seconds = learn(cell, contestant, work_dir, teacher)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    began = time.perf_counter()
    measured = rows_for(cell, cell.split, contestant.processor.llm_tokenizer)
    answers = write_all(contestant, [row["prompt"] for row in measured], TASKS[cell.task].max_new_tokens)
    seconds["writing"] = time.perf_counter() - began
    references = [" ".join(row["completion"].split()) for row in measured]
    metrics = text_scores(answers, references)
    if cell.contestant != ZERO_SHOT:
        metrics["loss"] = loss_per_token(model, contestant.collator, Dataset.from_list(measured))
    return {
        "task": cell.task,
        "contestant": cell.contestant,
        "settings": cell.settings(),
        "bfloat16": frozen_dtype() is torch.bfloat16,
        "parameters": sum(parameter.numel() for parameter in trained) if cell.steps else 0,
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "curve": curve,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "answers": answers,
    }, model


def learn(
    cell: Cell, contestant: Contestant, work_dir: pathlib.Path, teacher: Callable[[], pathlib.Path]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """
    Train in place; returns the losses on the way and the seconds of each part.

    The weights are kept in the work folder, for the cells that train alike and are measured otherwise.
    """
    alike = cell.with_changes(split="test", shortlist=None)
    file = work_dir / "trained" / f"{alike.task}_{alike.name}.safetensors"
    trained = {name: parameter for name, parameter in contestant.model.named_parameters() if parameter.requires_grad}
    if not file.exists():
        curve, seconds = teach(cell, contestant, work_dir, teacher)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        record = json.dumps({"curve": curve, "seconds": seconds})
        save_file({name: parameter.detach() for name, parameter in trained.items()}, part, {"record": record})
        part.replace(file)
        return curve, seconds
    with safe_open(file, "pt") as stored, torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored.get_tensor(name))
        record = json.loads(stored.metadata()["record"])
    return record["curve"], record["seconds"]


def teach(
    cell: Cell, contestant: Contestant, work_dir: pathlib.Path, teacher: Callable[[], pathlib.Path]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Heal, if the cell says so, and train; returns what [`learn`] does."""
    tokenizer = contestant.processor.llm_tokenizer
    # In less than an epoch, rows that no step comes to would be read for nothing.
    rows = rows_for(cell, "train", tokenizer)[: cell.steps * cell.batch_size]
    validation = rows_for(cell, "validation", tokenizer)[:CURVE_ROWS]
    curve: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    work_dir.mkdir(parents=True, exist_ok=True)
    if cell.labels == "llm":
        rows = llm_labels(cell, rows, teacher(), work_dir)
    for name, steps in (("healing", cell.heal_steps), ("training", cell.steps)):
        if steps == 0:
            continue
        began = time.perf_counter()
        chosen = rows if name == "training" else healing_rows(cell, tokenizer)[: steps * cell.batch_size]
        datasets = [with_states(part, cell, contestant, work_dir) for part in (chosen, validation)]
        seconds[f"reading for {name}"] = time.perf_counter() - began
        began = time.perf_counter()
        teacher_model = None
        if cell.distillation_weight and name == "training":
            teacher_model = AutoModelForCausalLM.from_pretrained(teacher(), dtype=frozen_dtype())
        # Of its own, as several may train side by side.
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            history = train(cell, contestant, *datasets, steps, folder, teacher_model)
        curve += [entry | {"part": name} for entry in history]
        seconds[name] = time.perf_counter() - began
    return curve, seconds


def with_states(rows: Sequence[dict[str, str]], cell: Cell, contestant: Contestant, work_dir: pathlib.Path) -> Dataset:
    """Rows to train on, for a hybrid with the LLM's states of their prompts, which are read once for all cells that can share."""
    dataset = as_dataset(rows, contestant.processor.llm_tokenizer)
    if cell.contestant != HYBRID:
        return dataset
    config = contestant.model.config
    layers = "-".join(map(str, config.llm_layers))
    kind = {"kv": "kv", "llm-embed": "embed"}.get(config.fusion, "states")
    tuned = "-tuned" if cell.tuned_llm else ""
    folder = work_dir / "states" / f"{cell.task}_{cell.llm}{tuned}_{kind}_{layers}"
    return cache_llm_states(dataset, contestant.model, contestant.processor, folder)


def train(
    cell: Cell,
    contestant: Contestant,
    rows: Dataset,
    validation: Dataset,
    steps: int,
    folder: str,
    teacher: PreTrainedModel | None,
) -> list[dict[str, float]]:
    """Train in place; returns the losses on the way, `loss` of training rows and `eval_loss`."""
    points = max(1, steps // CURVE_POINTS)
    settings = Seq2SeqTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=cell.batch_size,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        learning_rate=cell.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=points,
        eval_strategy="steps",
        eval_steps=points,
        prediction_loss_only=True,
        bf16=frozen_dtype() is torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=cell.seed,
        data_seed=cell.seed,
    )
    options: dict[str, Any] = {
        "train_dataset": rows,
        "eval_dataset": validation,
        "data_collator": contestant.collator,
        "processing_class": contestant.processor,
        "optimizers": (optimizer_for(cell, contestant.model), None),
    }
    if teacher is None:
        trainer = Seq2SeqTrainer(contestant.model, settings, **options)
    else:
        options |= {"teacher": teacher, "distillation_weight": cell.distillation_weight}
        trainer = DistillationTrainer(contestant.model, settings, **options)
    trainer.train()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    kept = ("step", "loss", "eval_loss", "distillation_loss")
    history = [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]
    return [entry for entry in history if len(entry) > 1]


def optimizer_for(cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay, with a rate of its own for the projector."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_projector = "projector." in name and cell.projector_learning_rate is not None
            rate = cell.projector_learning_rate if of_projector else cell.learning_rate
            groups.setdefault(rate, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()], weight_decay=0.0
    )


def llm_labels(
    cell: Cell, rows: Sequence[dict[str, str]], teacher: pathlib.Path, work_dir: pathlib.Path
) -> list[dict[str, str]]:
    """The rows with the answers of the fine-tuned LLM, which are written once."""
    file = work_dir / f"labels-{cell.task}-{cell.prompt_length}.json"
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [row["prompt"] for row in rows if row["prompt"] not in known]
    if missing:
        tuned = contestant_for(Cell(cell.task, ZERO_SHOT, llm=cell.llm))
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=frozen_dtype()).eval()
        tuned.write = alone_writer(model, tuned.processor, tuned.collator, instruction=None)  # type: ignore[arg-type]
        for start in range(0, len(missing), 500):
            prompts = missing[start : start + 500]
            known |= dict(zip(prompts, write_all(tuned, prompts, TASKS[cell.task].max_new_tokens), strict=True))
            file.write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
    return [row | {"completion": known[row["prompt"]]} for row in rows]
