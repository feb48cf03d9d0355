"""The model card by a `Trainer`: a mix-in that writes ours where the trainer would write its own."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint_files import holds_weights_of
from .measurements import QUALITY, TRAINING, Record, metrics_of, provenance, without_path, write_record
from .modeling_llm2slm import LLM2SLMForConditionalGeneration

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class LLM2SLMModelCardMixin(_Trainer):
    """
    Lets a `Trainer`, `Seq2SeqTrainer` or TRL's `SFTTrainer` write our model card, where it would write its own.

    A trainer writes its card in [`~Trainer.push_to_hub`] right before the upload, and TRL's at every checkpoint, over what
    is there. Ours says what the two models are and what was trained, and is updated in place, see [`write_model_card`]. What
    the trainer knows (arguments, steps, the last evaluation) is also recorded beside the weights, in `measurements.json`,
    for later cards.

    An adapter of PEFT keeps the trainer's and PEFT's card.

    Example:

    ```python
    >>> class MyTrainer(LLM2SLMModelCardMixin, Seq2SeqTrainer): ...
    >>> trainer = MyTrainer(model, args, train_dataset=rows, data_collator=collator, processing_class=processor)
    >>> trainer.train()
    >>> trainer.push_to_hub(dataset="org/rows", license="apache-2.0")
    ```
    """

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | list[str] | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
        training: Mapping[str, Any] | None = None,
        evaluation_data: Mapping[str, Any] | None = None,
        command: str | None = None,
    ) -> None:
        """
        Write or update the card in the output folder. The arguments are those of the trainers that this is mixed into;
        `tasks`, `dataset_tags` and `dataset_args` have nothing to say here.

        Args:
            language, license, tags: For the metadata.
            model_name (`str`, *optional*): Name of the model; by default that of the repository or the folder.
            finetuned_from (`str` or `list[str]`, *optional*): Hub ids of LLM and SLM, if the model names local copies.
            dataset, dataset_name (`str`, *optional*): Hub id of the training data, or a few words about it.
            training (`Mapping`, *optional*): More settings for the list of those that the trainer has.
            evaluation_data (`Mapping`, *optional*): What it was evaluated on: `name`, `split`, `config`.
            command (`str`, *optional*): The command that trained and evaluated, fit to be shown to others.
        """
        from .model_card import write_model_card

        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, LLM2SLMForConditionalGeneration):
            given = {"model_name": model_name, "tags": tags, "language": language, "license": license}
            super().create_model_card(**{name: value for name, value in given.items() if value is not None})
            return
        named = dataset or dataset_name
        named = named if named is None or isinstance(named, str) else ", ".join(named)
        records = trainer_state_records(self, named, training, evaluation_data, command)
        folder = Path(self.args.output_dir)
        saved = holds_weights_of(folder, model)  # not while training goes on, when TRL writes cards too
        if saved:
            for record in records:
                write_record(folder, record)
        write_model_card(
            folder,
            model,
            dataset=named,
            repo_id=self.hub_model_id or model_name,
            base_model=finetuned_from,
            license=license,
            language=language,
            tags=[tags] if isinstance(tags, str) else tags or (),
            records=None if saved else records,
        )


def trainer_state_records(
    trainer: _Trainer,
    dataset: str | None = None,
    training: Mapping[str, Any] | None = None,
    evaluation_data: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> list[Record]:
    """
    What a trainer knows after training, as records for [`write_record`]: its arguments and state, and the metrics of its
    evaluation if that was of the weights that it holds now.

    Args:
        trainer (`Trainer`): The trainer.
        dataset (`str`, *optional*): Hub id of the training data, or a few words about it.
        training (`Mapping`, *optional*): More settings for the list of those that the trainer has.
        evaluation_data (`Mapping`, *optional*): What it was evaluated on: `name`, `split`, `config`.
        command (`str`, *optional*): The command that trained and evaluated, fit to be shown to others.
    """
    # The user's own class is of no use to others; the library's says what was run.
    kind = next(kind for kind in type(trainer).__mro__ if kind.__module__.startswith(("transformers.", "trl.")))
    libraries = ("accelerate", "datasets", *(["trl"] if kind.__module__.startswith("trl.") else []))
    by = provenance(command or f"{kind.__name__}.evaluate", *libraries)
    command_used = {"command": f"`{command}`"} if command else {}
    records: list[Record] = [
        {
            "kind": TRAINING,
            "data": {"name": without_path(dataset)} if dataset else {},
            "settings": training_settings(trainer) | dict(training or {}) | command_used,
            **by,
        }
    ]
    state = trainer.state
    steps = {state.global_step}
    if trainer.args.load_best_model_at_end and state.best_global_step:
        steps = {state.best_global_step}
    evaluated = [entry for entry in state.log_history if "eval_loss" in entry and entry.get("step") in steps]
    if evaluated and (metrics := metrics_of(evaluated[-1], "eval")):
        data = {"split": "validation", **(evaluation_data or {}), **_rows(trainer.eval_dataset)}
        records.append({"kind": QUALITY, "data": data, "metrics": metrics, **by})
    return records


def training_settings(trainer: _Trainer) -> dict[str, Any]:
    """The arguments of a trainer that tell how the model came about, and what came of them."""
    args, state = trainer.args, trainer.state
    losses = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    found = {
        **_rows(trainer.train_dataset),
        "steps": state.global_step,
        "epochs": state.epoch,
        "rows in a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "learning rate schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warm-up steps": args.get_warmup_steps(state.max_steps) or None,
        "optimizer": getattr(args.optim, "value", args.optim),
        "weight decay": args.weight_decay or None,
        "label smoothing": args.label_smoothing_factor or None,
        "mixed precision": precision,
        "seed": args.seed,
        # DeepSpeed's third stage leaves every process with empty parameters.
        "parameters trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) or None,
        "training loss": losses[-1] if losses else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _rows(dataset: Any) -> dict[str, int]:
    """Number of rows of a data set that has a length."""
    return {"rows": len(dataset)} if isinstance(dataset, Sized) else {}


__all__ = ["LLM2SLMModelCardMixin"]
