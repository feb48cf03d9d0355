"""What the clients of `test_hub.py` do, each in a process of its own: calls come in and answers go out as lines of JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any

import torch
import transformers
from conftest import PROMPTS, RESPONSES
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

from transformers_llm2slm import (
    LLM2SLMDataCollator,
    LLM2SLMForConditionalGeneration,
    LLM2SLMProcessor,
    cli,
    lora_config,
)

TASK = "text2text-generation"


def answers(model: Any, processor: LLM2SLMProcessor) -> dict[str, Any]:
    """By what one model is told from another: the texts it writes, logits, and which LLM it reads with."""
    inputs = processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    prompts = processor(text=PROMPTS, padding=True, return_tensors="pt")
    written = model.generate(**prompts, max_new_tokens=8)
    return {
        "texts": processor.batch_decode(written, skip_special_tokens=True),
        "logits": logits[:, 0].flatten().tolist(),
        "llm": [model.config.llm_name_or_path, model.config.llm_revision],
    }


# Writing -------------------------------------------------------------------------------------------------------------


def push(name: str, models: list[str | None], pushing: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Compose a model of two repositories, and push it and its processor with the arguments `pushing`."""
    torch.manual_seed(kwargs.pop("seed", 0))
    options = {
        key: kwargs.pop(key) for key in ("slm_layers", "fusion", "projector_init", "fit_prompts") if key in kwargs
    }
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*models, **options, **kwargs)
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(*models, fusion=model.config.fusion, **kwargs)
    model.push_to_hub(name, **pushing)
    pushing.pop("max_shard_size", None)
    processor.push_to_hub(name, **pushing)
    return answers(model, processor)


def push_with_llm(name: str, base: str, folder: str) -> dict[str, Any]:
    """Save a model as one that needs nothing else, and push it while saving."""
    model, processor = AutoModel.from_pretrained(base), AutoProcessor.from_pretrained(base)
    model.save_pretrained(folder, save_llm=True, push_to_hub=True, repo_id=name)
    processor.save_pretrained(folder, push_to_hub=True, repo_id=name)
    return answers(model, processor)


def push_adapter(name: str, base: str) -> dict[str, Any]:
    """Push an adapter that changes the SLM and the projector, and that alone."""
    from peft import get_peft_model

    model = AutoModel.from_pretrained(base)
    adapted = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(0.1)
    adapted.push_to_hub(name)
    return answers(adapted.eval(), AutoProcessor.from_pretrained(base))


def train(name: str, base: str, folder: str) -> dict[str, Any]:
    """Train a little with the `Trainer`, which pushes as it saves."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model, processor = AutoModel.from_pretrained(base), AutoProcessor.from_pretrained(base)
    arguments = Seq2SeqTrainingArguments(
        output_dir=folder,
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        push_to_hub=True,
        hub_model_id=name,
        hub_always_push=True,
    )
    rows = [{"prompt": prompt, "completion": response} for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    trainer = Seq2SeqTrainer(
        model, arguments, train_dataset=rows, data_collator=LLM2SLMDataCollator(processor), processing_class=processor
    )
    trainer.train()
    trainer.push_to_hub()
    return answers(model.eval(), processor)


# Reading -------------------------------------------------------------------------------------------------------------


def load(name: str, loader: str = "AutoModel", base: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """A model and its processor by one of the ways to load them; an adapter by the name of its `base` too."""
    if loader in ("pipeline", "pipeline of a model"):
        model = name if loader == "pipeline" else AutoModel.from_pretrained(name, **kwargs)
        pipe = pipeline(TASK, model=model, **(kwargs if loader == "pipeline" else {}))
        written = [answer["generated_text"] for answer in pipe(PROMPTS, max_new_tokens=8)]
        return answers(pipe.model, pipe.processor) | {"texts": written}
    if loader == "PeftModel":
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, **kwargs), name, **kwargs)
    else:
        model = getattr(transformers, loader).from_pretrained(name, **kwargs)
    return answers(model, AutoProcessor.from_pretrained(base or name, **kwargs))


def config(name: str, **kwargs: Any) -> list[Any]:
    loaded = AutoConfig.from_pretrained(name, **kwargs)
    return [loaded.model_type, loaded.llm_name_or_path, loaded.llm_revision]


def run(*arguments: str) -> str:
    """What the command `llm2slm` prints."""
    sys.argv = ["llm2slm", *arguments]
    printed, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(complaints.getvalue()) from end
    return printed.getvalue()


# Calls ---------------------------------------------------------------------------------------------------------------

FUNCTIONS = {function.__name__: function for function in (push, push_with_llm, push_adapter, train, load, config, run)}


def main() -> None:
    torch.set_num_threads(1)
    answers_out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed must not come between the answers
    for line in sys.stdin:
        name, positional, keywords = json.loads(line)
        try:
            answer = {"result": FUNCTIONS[name](*positional, **keywords)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers_out, flush=True)


if __name__ == "__main__":
    main()
