"""
What `generate` of a hybrid costs beyond its parts: the LLM reading the prompt once, and the SLM's own `generate`.

    python benchmarks/generate_overhead.py [--rounds 7] [--output benchmarks/results/generate_overhead.json]

Two pairs of real sizes with random weights, in float32, batch size 1, greedy, always 64 tokens long: nothing is downloaded
and every run does the same work. Each round times, one after the other and in turn which first,

    hybrid     model.generate(**prompt)
    encode     model.encode_prompt(**prompt): LLM, projector and fusion
    slm        model.slm.generate(**fused prompt), on what `encode` gave, with the linear layers that the hybrid writes with

so that a load that comes and goes on the machine meets all of them. The ratio is the median of hybrid over the median of
encode + slm; it must not exceed 1.03. Beside the time on the clock stands that of the processor, which other programs on
the machine don't count in. The first round is a warm-up and not counted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, T5Model
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMForConditionalGeneration
from transformers_llm2slm.few_rows import few_row_linears
from transformers_llm2slm.measurements import provenance

PROMPT_LENGTH = 128
NEW_TOKENS = 64
LIMIT = 1.03

T5_V1_1 = {
    "vocab_size": 32128,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
T5_LARGE = T5_V1_1 | {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
T5_SMALL = T5_V1_1 | {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}


def t5_large_to_t5_small() -> LLM2SLMForConditionalGeneration:
    """The encoder of T5 v1.1 large in front of a T5 v1.1 small."""
    # The LLM's decoder is dropped, so one layer of it will do.
    large, small = T5Config(num_decoder_layers=1, **T5_LARGE), T5Config(**T5_SMALL)
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        T5Model(large), T5ForConditionalGeneration(small), fusion="add"
    )


def smollm2_to_its_top_layers() -> LLM2SLMForConditionalGeneration:
    """A Llama of the size of SmolLM2-135M in front of its own top 6 layers."""
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        LlamaForCausalLM(smollm2_config()), slm_layers=6, fusion="replace"
    )


def smollm2_config() -> LlamaConfig:
    """The size of SmolLM2-135M: 30 layers."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


PAIRS: dict[str, Callable[[], LLM2SLMForConditionalGeneration]] = {
    "t5-v1.1-large -> t5-v1.1-small": t5_large_to_t5_small,
    "SmolLM2-135M -> its top 6 layers": smollm2_to_its_top_layers,
}


def timed(function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds that a call takes, on the clock (`wall`) and of the processor (`cpu`), and what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


@torch.no_grad()
def measure(model: LLM2SLMForConditionalGeneration, rounds: int) -> dict[str, Any]:
    """
    Times of one pair.

    Returns:
        `dict`: for `wall` and `cpu` the medians in seconds of `hybrid`, `encode`, `slm` and `encode + slm`, and the
        `ratio` of the first to the last; all `rounds`; and the `parameters` of each part.
    """
    torch.manual_seed(1)
    input_ids = torch.randint(3, model.config.vocab_size, (1, PROMPT_LENGTH))
    prompt_arguments = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fused = model.model.slm_prompt(model.encode_prompt(**prompt_arguments))
    sequences: dict[str, torch.Tensor] = {}

    def hybrid() -> dict[str, dict[str, float]]:
        times, sequences["hybrid"] = timed(lambda: model.generate(**prompt_arguments, **arguments))
        return {"hybrid": times}

    def parts() -> dict[str, dict[str, float]]:
        encode, _ = timed(lambda: model.encode_prompt(**prompt_arguments))
        with few_row_linears(model.slm):
            slm, sequences["slm"] = timed(lambda: model.slm.generate(**dict(fused), **arguments))
        return {"encode": encode, "slm": slm, "encode + slm": {clock: encode[clock] + slm[clock] for clock in encode}}

    counted = []
    for index in range(rounds + 1):
        row = hybrid() | parts() if index % 2 else parts() | hybrid()
        if not torch.equal(sequences["hybrid"], sequences["slm"]):
            raise RuntimeError("The hybrid wrote other tokens than its SLM from the same prompt.")
        if index:
            counted.append(row)
    result: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        medians = {name: statistics.median(row[name][clock] for row in counted) for name in sorted(counted[0])}
        result[clock] = medians | {"ratio": medians["hybrid"] / medians["encode + slm"]}
    sizes = {part: getattr(model, part).num_parameters() for part in ("llm", "slm")}
    sizes["projector"] = sum(parameter.numel() for parameter in model.projector.parameters())
    return result | {"rounds": counted, "parameters": sizes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are counted, 7 by default")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/generate_overhead.json")
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    results = {}
    columns = ("encode", "slm", "encode + slm", "hybrid", "ratio")
    print(f"{'pair':34} {'clock':5}" + "".join(f"{name:>14}" for name in columns) + "   (medians, seconds)")
    for name, compose in PAIRS.items():
        torch.manual_seed(0)
        result = results[name] = measure(compose().eval(), options.rounds)
        for clock in ("wall", "cpu"):
            row = "".join(f"{result[clock][column]:14.3f}" for column in columns)
            print(f"{name:34} {clock:5}{row}", flush=True)
    within = all(result["wall"]["ratio"] <= LIMIT for result in results.values())
    print(f"The limit of {LIMIT} is {'kept' if within else 'exceeded'}.")

    report = {
        **provenance(f"python benchmarks/generate_overhead.py --rounds {options.rounds}"),
        "setting": {
            "prompt_length": PROMPT_LENGTH,
            "new_tokens": NEW_TOKENS,
            "batch_size": 1,
            "dtype": "float32",
            "unit": "seconds",
        },
        "limit": LIMIT,
        "within_limit": within,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
