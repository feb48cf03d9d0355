#!/usr/bin/env python3
"""Teach an LLM-to-SLM model to follow instructions, with TRL's plain `SFTTrainer`.

    python examples/run_instruction_sft.py --help

Rows are prompts and completions, as text or as lists of messages, or conversations (`--messages_column messages`), which
the LLM's chat template turns into text. The arguments are those of `SFTConfig` and those of the model; examples/README.md
has commands. As in TRL's own scripts, training needs no `--do_train`.
"""

from dataclasses import dataclass

from example_utils import (
    DataArguments,
    ModelArguments,
    evaluate,
    load_llm_again,
    option,
    parse_arguments,
    predict,
    prepare,
    seq2seq_trainer,
    train,
    write_card,
)
from transformers import Seq2SeqTrainingArguments
from trl import SFTConfig, SFTTrainer

from transformers_llm2slm import LLM2SLMModelCardMixin, lora_config, prepare_sft_config

METRICS = ("rouge1", "rougeL", "chrf", "exact_match")


@dataclass
class InstructionArguments(DataArguments):
    prompt_column: str = option("column of the prompts", "prompt")
    completion_column: str = option("column of the answers", "completion")
    context_column: str | None = option("column that follows the prompt, where it has text, as Alpaca's input")
    messages_column: str | None = option("column of conversations that end in an answer, in place of the two")
    use_peft: bool = option("train LoRA adapters in the SLM, and the projector; ends in a merged model", False)
    lora_r: int = option("rank of the adapters", 16)
    lora_alpha: int = option("their scale", 32)


class CardTrainer(LLM2SLMModelCardMixin, SFTTrainer):
    """`SFTTrainer`, whose checkpoints and pushes take our model card along."""


def main() -> None:
    model_args, data_args, training_args = parse_arguments(ModelArguments, InstructionArguments, SFTConfig)
    training_args.do_train = True
    model, collator, rows = prepare(
        model_args,
        data_args,
        training_args,
        prompt_column=data_args.prompt_column,
        completion_column=data_args.completion_column,
        context_column=data_args.context_column,
        messages_column=data_args.messages_column,
        conversational=True,
    )
    output_dir, peft_config = training_args.output_dir, None
    if data_args.use_peft:
        if not model.name_or_path:  # composed here: the adapter needs a base that it can name
            if training_args.process_index == 0:
                model.save_pretrained(f"{output_dir}/base")
                collator.processor.save_pretrained(f"{output_dir}/base")
            model.name_or_path = f"{output_dir}/base"
        peft_config = lora_config(model, r=data_args.lora_r, lora_alpha=data_args.lora_alpha)
    trainer = CardTrainer(
        model,
        prepare_sft_config(training_args, model),
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        data_collator=collator,
        processing_class=collator.processor,
        peft_config=peft_config,
    )
    results = {"train": train(trainer)}
    if training_args.do_eval:
        results["eval"] = evaluate(trainer)

    if data_args.use_peft:
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            adapted.save_pretrained(f"{output_dir}/adapter")
        model = adapted.merge_and_unload()
        if trainer.is_world_process_zero():
            model.save_pretrained(output_dir)
            collator.processor.save_pretrained(output_dir)
        trainer.accelerator.wait_for_everyone()
    else:
        trainer.save_model()

    if training_args.do_predict:
        if model.llm is None:
            load_llm_again(model, model_args, output_dir)
        generating = Seq2SeqTrainingArguments(
            output_dir,
            predict_with_generate=True,
            per_device_eval_batch_size=training_args.per_device_eval_batch_size,
            bf16=training_args.bf16,
            use_cpu=training_args.use_cpu,
            report_to="none",
            remove_unused_columns=False,
        )
        predictor = seq2seq_trainer(model, collator, {}, data_args, generating, METRICS)
        results["predict"] = predict(predictor, rows["test"])
    write_card(trainer, model, data_args, results)


if __name__ == "__main__":
    main()
