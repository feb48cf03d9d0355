"""The trained pair of `speed.py`: real prompts, answered to their own end, and how often drafts are accepted there."""

from __future__ import annotations

import gzip
import json
import pathlib
import statistics
from typing import Any

import torch

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.contestants import (
    HYBRID,
    LLM,
    LOOKUP,
    LOOKUP_TOKENS,
    LOSSLESS,
    Contestant,
    Drafts,
    drafting,
    ratio,
)
from transformers_llm2slm.measurements import without_path
from transformers_llm2slm.speed import seconds_of, spread

MAX_NEW_TOKENS = 64
ASSISTED = "assisted"
# Those that write what the LLM would have written.
EXACT = (ASSISTED, LOOKUP, LOSSLESS)


def read_prompts(path: pathlib.Path, count: int) -> list[str]:
    """The first prompts of a file of JSON lines."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line, _ in zip(lines, range(count), strict=False)]


def contestants_for(
    model: LLM2SLMForConditionalGeneration, inputs: dict[str, Any], drafts: dict[str, Drafts]
) -> dict[str, Contestant]:
    """Those that answer one prompt, up to so many tokens; what they draft is added to `drafts`."""
    llm: Any = model.model.whole_llm
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    before = 1 if llm.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    padded = {} if llm.generation_config.pad_token_id is not None else {"pad_token_id": 0}

    def own(**more: Any) -> Contestant:
        options = greedy | padded | more
        return Contestant(lambda count: llm.generate(**prompt, max_new_tokens=count, **options)[:, before:])

    def hybrid(count: int) -> torch.Tensor:
        start = 1 if model.slm.config.is_encoder_decoder else 0
        return model.generate(**inputs, max_new_tokens=count, **greedy)[:, start:]

    def lossless(count: int) -> torch.Tensor:
        options = {"max_new_tokens": count, "return_dict_in_generate": True} | greedy | padded
        outputs = model.generate(**inputs, **options, mode="lossless")
        drafts[LOSSLESS].drafted += outputs.num_drafted
        drafts[LOSSLESS].accepted += outputs.num_accepted
        return outputs.sequences[:, 1 if llm.config.is_encoder_decoder else 0 :]

    return {
        LLM: own(),
        HYBRID: Contestant(hybrid),
        LOSSLESS: Contestant(lossless),
        ASSISTED: drafting(llm, own(assistant_model=model.slm), drafts=drafts[ASSISTED]),
        LOOKUP: drafting(llm, own(prompt_lookup_num_tokens=LOOKUP_TOKENS), drafts=drafts[LOOKUP]),
    }


def measure_trained(folder: pathlib.Path, prompts: pathlib.Path, count: int, rounds: int) -> dict[str, Any]:
    """
    Tokens per second over some prompts, each answered up to the end token or 64 tokens; for each prompt all contestants one
    after another. Everything is in float32, and assisted generation as transformers does it by default.

    Args:
        folder (`pathlib.Path`): A checkpoint whose LLM can be loaded.
        prompts (`pathlib.Path`): JSON lines with a `prompt`.
        count (`int`): How many of them.
        rounds (`int`): Times to go through them, after a first prompt to warm up.

    Returns:
        `dict`: `settings`, and for each contestant `tokens/s`, `times the LLM` (both with their spread over the rounds), the
        share of drafted tokens that was `accepted`, `tokens` per answer, and the share of answers that are `as the LLM's`.
    """
    model = LLM2SLMForConditionalGeneration.from_pretrained(
        folder, load_llm="whole", llm_dtype="float32", dtype="float32"
    ).eval()
    processor = LLM2SLMProcessor.from_pretrained(folder)
    texts = read_prompts(prompts, count)
    drafts: dict[str, Drafts] = {name: Drafts() for name in EXACT}
    fields = [dict(processor(text=[text], truncation=True, return_tensors="pt")) for text in texts]
    races = [contestants_for(model, inputs, drafts) for inputs in fields]
    answers: dict[str, list[torch.Tensor]] = {name: [contestant.write(8)] for name, contestant in races[0].items()}
    for counted in drafts.values():
        counted.drafted = counted.accepted = 0
    speeds: dict[str, list[float]] = {name: [] for name in answers}
    for index in range(rounds):
        answers, seconds = {name: [] for name in speeds}, dict.fromkeys(speeds, 0.0)
        for contestants in races:
            for name, contestant in contestants.items():
                seconds[name] += seconds_of(lambda: answers[name].append(contestant.write(MAX_NEW_TOKENS)))  # noqa: B023
        for name, written in answers.items():
            speeds[name].append(sum(answer.shape[1] for answer in written) / seconds[name])
        told = ", ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())
        print(f"  round {index + 1}: {told} tokens/s", flush=True)
    figures = {
        name: {
            "tokens/s": spread(values),
            "times the LLM": ratio(values, speeds[LLM]),
            "accepted": drafts[name].acceptance_rate if name in drafts else None,
            "tokens": statistics.mean(answer.shape[1] for answer in answers[name]),
            "as the LLM's": statistics.mean(map(torch.equal, answers[name], answers[LLM])) if name in EXACT else None,
        }
        for name, values in speeds.items()
    }
    settings = {
        "checkpoint": folder.name,
        "LLM": without_path(model.config.llm_name_or_path),
        "prompts": prompts.name,
        "number of prompts": len(texts),
        "prompt tokens": statistics.mean(inputs["input_ids"].shape[1] for inputs in fields),
        "new tokens at most": MAX_NEW_TOKENS,
        "dtype": "float32",
        "rounds": rounds,
    }
    return {"settings": settings, "figures": figures}
