"""
Lossless mode against the LLM alone: equal tokens, how many drafts are accepted, how fast, how often the prompt is read.

    python benchmarks/lossless.py [--llm NAME_OR_FOLDER | --checkpoint FOLDER] [--prompts FILE.jsonl] [--count 200]
        [--new-tokens 20] [--output benchmarks/results/lossless.json]

An LLM of each kind, in float32, batch size 1, greedy. For each prompt the LLM's own `generate` and the hybrid's
`generate(mode="lossless")` run one after the other, in turn which first, so that a load that comes and goes on the machine
meets both; their tokens must be equal. Where they aren't, the difference of the LLM's logits for the two tokens is reported:
the LLM computes several tokens in one pass by other kernels than one, so a difference of some 1e-4 is a tie of floats. The exit
code is 1 if any output differs, a prompt was read more than once, or the samples are not the LLM's.

- encoder-decoder: the size of T5 v1.1 base, random weights, random token ids as prompts. The SLM is cut from the LLM; so that it
  agrees with the LLM most of the time, as a trained one does, what the LLM's other layers add is damped.
- decoder-only: an LLM (`--llm`, SmolLM2-135M-Instruct by default) and an untrained cut of its top 4 layers, or a trained hybrid
  with the LLM that its checkpoint names (`--checkpoint`), with texts as prompts (`--prompts`, column `prompt`; descriptions of
  software packages by default).
- samples: the distribution of the second and third sampled tokens, for tiny LLMs of both kinds with a vocabulary of 6 tokens,
  against the exact one, by a chi-square test.
- assisted generation: the same drafts by transformers' own `assistant_model=`, 5 tokens each, from an SLM that reads the same
  prompt for itself (the LLM's bottom layers), so that only what surrounds the two models differs; and that transformers drafts
  before the LLM has read the prompt, which the hybrid can't, so it takes a round less. Responses are twice as long as above.

With `--count 4 --new-tokens 8 --samples 100 --small` it is a test of this script: both LLMs are tiny and random then.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from generate_overhead import T5_V1_1, smollm2_config, timed
from speed_trained import read_prompts
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.measurements import provenance, without_path

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "examples"))

from prepare_models import prepare  # noqa: E402

PROMPT_LENGTH = 64
T5_BASE = T5_V1_1 | {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
SMALL = {"num_layers": 4, "d_model": 64, "d_ff": 128, "num_heads": 2}
# What the layers that the SLM lacks add to the states, as a share of what they would: about 3 of 4 drafted tokens are right.
T5_DAMPING, LLAMA_DAMPING = 0.05, 0.0005
Prompt = Mapping[str, torch.Tensor]


# Pairs -------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def damp(layers: Sequence[torch.nn.Module], kept: Sequence[int], damping: float) -> None:
    """Scale what all but the `kept` layers add to the states."""
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if index not in kept and name.endswith(("o.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(damping)


@torch.no_grad()
def random_t5(small: bool) -> T5ForConditionalGeneration:
    """A random T5 that writes varied tokens, with probabilities like those of a trained one."""
    llm = T5ForConditionalGeneration(T5Config(**(T5_BASE | SMALL if small else T5_BASE)))
    llm.shared.weight.mul_(0.05)  # else each token is followed by itself, as the LM head is tied
    llm.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(100.0)  # look at single tokens
    llm.decoder.final_layer_norm.weight.mul_(4.0)  # be sure
    return llm


@torch.no_grad()
def random_llama(small: bool) -> LlamaForCausalLM:
    """The same for a Llama."""
    config = smollm2_config()
    if small:
        config.update({"hidden_size": 72, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 8})
    llm = LlamaForCausalLM(config)
    for layer in llm.model.layers:
        layer.self_attn.q_proj.weight.mul_(4.0)
        layer.self_attn.k_proj.weight.mul_(4.0)
    llm.model.norm.weight.mul_(10.0)
    return llm


def cut(llm: Any, kept: Sequence[int], damping: float, **options: Any) -> LLM2SLMForConditionalGeneration:
    """A hybrid whose SLM is the `kept` layers of a random LLM that is damped elsewhere, and that never ends a response."""
    damp(llm.decoder.block if llm.config.is_encoder_decoder else llm.model.layers, kept, damping)
    llm.generation_config.eos_token_id = None
    llm.generation_config.pad_token_id = 0
    return LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm.eval(), slm_layers=list(kept), fusion="replace", load_llm="whole", **options
    )


def encoder_decoder(options: argparse.Namespace) -> tuple[LLM2SLMForConditionalGeneration, Any]:
    torch.manual_seed(0)
    llm = random_t5(options.small)
    return cut(llm, (0, llm.config.num_decoder_layers - 1), T5_DAMPING), None


def decoder_only(options: argparse.Namespace) -> tuple[LLM2SLMForConditionalGeneration, Any]:
    """The hybrid and, where it has one, what makes its input of a text."""
    compose = LLM2SLMForConditionalGeneration
    if options.checkpoint:
        processor = LLM2SLMProcessor.from_pretrained(options.checkpoint)
        model = compose.from_pretrained(options.checkpoint, load_llm="whole", dtype="float32", llm_dtype="float32")
        return model.eval(), processor
    if options.llm:
        model = compose.from_llm_slm_pretrained(
            options.llm, slm_layers=4, fusion="replace", load_llm="whole", dtype="float32"
        )
        tokenizer = AutoTokenizer.from_pretrained(options.llm)
        return model.eval(), tokenizer
    torch.manual_seed(0)
    llm = random_llama(options.small)
    layers = llm.config.num_hidden_layers
    return cut(llm, range(layers - 4, layers), LLAMA_DAMPING), None


def prompts_for(model: LLM2SLMForConditionalGeneration, maker: Any, options: argparse.Namespace) -> list[Prompt]:
    """`--count` prompts and one to warm up with: texts of the file where there is something to tokenize them, else random."""
    if maker is None or options.prompts is None:
        generator = torch.Generator().manual_seed(1)
        size = min(model.config.vocab_size, model.model.whole_llm.config.vocab_size)
        shape = (options.count + 1, 1, PROMPT_LENGTH)
        ids = torch.randint(3, size, shape, generator=generator)
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    texts = read_prompts(options.prompts, options.count + 1)
    if len(texts) < options.count + 1:
        raise SystemExit(
            f"{options.prompts} holds {len(texts)} prompts, but --count {options.count} takes {options.count + 1}: one is to "
            f"warm up. Pass --count {len(texts) - 1}, or another file."
        )
    return [dict(maker(text=[text], return_tensors="pt")) for text in texts]


# Greedy ------------------------------------------------------------------------------------------------------------------
def own_tokens(llm: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What the LLM's own `generate` writes, without prompt or start token."""
    sequences = llm.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    return sequences[:, 1 if llm.config.is_encoder_decoder else ids.shape[1] :]


@contextmanager
def counted_readings(model: LLM2SLMForConditionalGeneration) -> Iterator[list[int]]:
    """The lengths of all passes over a prompt: of the LLM's encoder, or of passes of a decoder with an empty cache."""
    llm = model.model.whole_llm
    readings: list[int] = []

    def count(_: torch.nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        # transformers calls it `past_key_values` up to 5.23.
        cache = arguments.get("cache", arguments.get("past_key_values"))
        if llm.config.is_encoder_decoder or cache is None or cache.get_seq_length() == 0:
            readings.append((args[0] if args else arguments["input_ids"]).shape[1])

    parts = [part.get_encoder() if llm.config.is_encoder_decoder else part.base_model for part in (llm, model.llm)]
    hooks = [
        part.register_forward_pre_hook(count, with_kwargs=True) for part in {id(part): part for part in parts}.values()
    ]
    try:
        yield readings
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def first_difference(
    llm: PreTrainedModel, ids: torch.Tensor, own: torch.Tensor, other: torch.Tensor
) -> dict[str, Any]:
    """Where two responses part, and by how much the LLM's logits there favour its own token."""
    pairs = zip(own[0].tolist(), other[0].tolist(), strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(own.shape[1], other.shape[1]))
    found: dict[str, Any] = {"position": position, "lengths": [own.shape[1], other.shape[1]]}
    if position < min(own.shape[1], other.shape[1]):
        written = own[:, :position]
        if llm.config.is_encoder_decoder:
            start = torch.full((1, 1), llm.config.decoder_start_token_id)
            logits = llm(input_ids=ids, decoder_input_ids=torch.cat([start, written], dim=1)).logits[0, -1]
        else:
            logits = llm(torch.cat([ids, written], dim=1)).logits[0, -1]
        tokens = [int(own[0, position]), int(other[0, position])]
        found |= {"tokens": tokens, "logit gap": float(logits[tokens[0]] - logits[tokens[1]])}
    return found


def compare(model: LLM2SLMForConditionalGeneration, prompts: Sequence[Prompt], new_tokens: int) -> dict[str, Any]:
    """
    The LLM alone and lossless mode on every prompt but the first, which warms up.

    Returns:
        `dict`: `prompts`, `tokens`, `differing` with `differences`, `acceptance_rate`, `tokens_per_round` (a round is a pass of
        the LLM), `readings` (prompt passes per call), and for each clock the tokens per second of both, the ratio of the totals
        and the median of the ratios of the prompts.
    """
    llm = model.model.whole_llm
    arguments = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    differences, readings, rows = [], [], []
    num_tokens = num_drafted = num_accepted = 0
    for index, prompt in enumerate(prompts):
        ids = prompt["input_ids"]

        def lossless(prompt: Prompt = prompt) -> tuple[dict[str, float], Any]:
            with counted_readings(model) as lengths:
                result = timed(
                    lambda: model.generate(**prompt, mode="lossless", return_dict_in_generate=True, **arguments)
                )
            readings.append(lengths)
            return result

        def alone(ids: torch.Tensor = ids) -> tuple[dict[str, float], torch.Tensor]:
            return timed(lambda: own_tokens(llm, ids, **arguments))

        if index % 2:
            (own_time, own), (lossless_time, outputs) = alone(), lossless()
        else:
            (lossless_time, outputs), (own_time, own) = lossless(), alone()
        written = outputs.sequences[:, 1:] if llm.config.is_encoder_decoder else outputs.sequences
        if not torch.equal(own, written):
            differences.append({"prompt": index, **first_difference(llm, ids, own, written)})
        if index:
            rows.append((own_time, lossless_time))
            num_tokens += own.shape[1]
            num_drafted += outputs.num_drafted
            num_accepted += outputs.num_accepted
        if index % 20 == 0:
            print(f"  {index} of {len(prompts) - 1} prompts", file=sys.stderr, flush=True)
    count = len(prompts) - 1
    once = all(len(lengths) == 1 for lengths in readings)
    result = {
        "prompts": count,
        "prompt_length": statistics.mean(prompt["input_ids"].shape[1] for prompt in prompts[1:]),
        "tokens": num_tokens,
        "differing": len(differences),
        "differences": differences,
        "drafted": num_drafted,
        "accepted": num_accepted,
        "acceptance_rate": num_accepted / max(num_drafted, 1),
        "tokens_per_round": num_tokens / (num_tokens - num_accepted),
        "prompt_read_once": once,
        "most_readings": max(len(lengths) for lengths in readings),
        "parameters": {"llm": llm.num_parameters(), "slm": model.slm.num_parameters()},
    }
    for clock in ("wall", "cpu"):
        own_seconds, seconds = (sum(row[side][clock] for row in rows) for side in (0, 1))
        result[clock] = {
            "llm_tokens_per_second": num_tokens / own_seconds,
            "lossless_tokens_per_second": num_tokens / seconds,
            "ratio": own_seconds / seconds,
            "median_ratio": statistics.median(row[0][clock] / row[1][clock] for row in rows),
        }
    return result


# Samples -----------------------------------------------------------------------------------------------------------------
VOCABULARY = 6


def tiny_llms() -> dict[str, Callable[[int], PreTrainedModel]]:
    """For each kind, a tiny LLM or SLM of so many layers."""
    shared = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    llama = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "decoder_start_token_id": 0}
    return {
        "encoder-decoder": lambda layers: T5ForConditionalGeneration(T5Config(num_layers=layers, **t5, **shared)),
        "decoder-only": lambda layers: LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **llama, **shared)),
    }


@torch.no_grad()
def exact_marginals(llm: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The probabilities of the second and of the third token of a response, over all that may come before."""

    def after(written: torch.Tensor) -> torch.Tensor:
        prompts = ids.expand(len(written), -1)
        if llm.config.is_encoder_decoder:
            start = torch.zeros(len(written), 1, dtype=torch.long)
            logits = llm(input_ids=prompts, decoder_input_ids=torch.cat([start, written], dim=1)).logits
        else:
            logits = llm(torch.cat([prompts, written], dim=1)).logits
        return logits[:, -1].double().softmax(dim=-1)

    every = torch.arange(VOCABULARY)
    first = after(torch.empty(1, 0, dtype=torch.long))[0]
    second = first[:, None] * after(every[:, None])
    third = second.reshape(-1, 1) * after(torch.cartesian_prod(every, every))
    return [second.sum(0), third.sum(0)]


def chi_square_test(samples: torch.Tensor, probabilities: torch.Tensor) -> dict[str, float]:
    """Pearson's statistic of samples of a token, and how probable one as large or larger is."""
    expected = probabilities * len(samples)
    counts = torch.bincount(samples, minlength=len(probabilities))
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(probabilities) - 1) / 2, dtype=torch.double)
    return {"chi_square": float(statistic), "p": float(torch.special.gammaincc(half, statistic / 2))}


def sample_test(make: Callable[[int], PreTrainedModel], num_samples: int) -> dict[str, Any]:
    """Samples of lossless mode against the LLM's exact distribution, and against that of the SLM for comparison."""
    models = []
    for seed, layers in ((0, 6), (1, 1)):
        torch.manual_seed(seed)
        models.append(make(layers).eval())
        for parameter in models[-1].parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.35)
    llm, slm = models
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, slm, fusion="replace", load_llm="whole"
    ).eval()
    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(2)
    arguments = {
        "max_new_tokens": 4,
        "do_sample": True,
        "top_k": 0,
        "mode": "lossless",
        "return_dict_in_generate": True,
    }
    outputs = [model.generate(input_ids=ids, **arguments) for _ in range(num_samples)]
    samples = torch.cat([output.sequences[:, -4:] for output in outputs])
    drafted = sum(output.num_drafted for output in outputs)
    tests = [
        chi_square_test(samples[:, position], probabilities)
        for position, probabilities in zip((1, 2), exact_marginals(llm, ids), strict=True)
    ]
    foreign = chi_square_test(samples[:, 1], torch.full((VOCABULARY,), 1 / VOCABULARY, dtype=torch.double))
    return {
        "samples": num_samples,
        "degrees_of_freedom": VOCABULARY - 1,
        "second_token": tests[0],
        "third_token": tests[1],
        "second_token_against_uniform": foreign,
        "acceptance_rate": sum(output.num_accepted for output in outputs) / max(drafted, 1),
        "passed": all(test["p"] > 1e-4 for test in tests),
    }


# Assisted generation -----------------------------------------------------------------------------------------------------
def beside_assisted_generation(options: argparse.Namespace, draft_length: int = 5) -> dict[str, Any]:
    """Median seconds of transformers' assisted generation and of lossless mode, with equal drafts of a fixed length."""
    torch.manual_seed(0)
    model = cut(random_llama(options.small), range(4), 0.01, llm_layer=0)
    llm, slm = model.model.whole_llm, model.slm
    slm.generation_config.update(
        num_assistant_tokens=draft_length,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    arguments = {"max_new_tokens": 2 * options.new_tokens, "do_sample": False}
    ways = {
        "llm": lambda ids: own_tokens(llm, ids, **arguments),
        "assisted": lambda ids: own_tokens(llm, ids, assistant_model=slm, **arguments),
        "lossless": lambda ids: model.generate(
            input_ids=ids, mode="lossless", num_assistant_tokens=draft_length, **arguments
        ),
    }
    rows: list[dict[str, dict[str, float]]] = []
    for index in range(options.assisted_count + 1):
        ids = torch.randint(3, llm.config.vocab_size, (1, PROMPT_LENGTH))
        names = list(ways)[index % 3 :] + list(ways)[: index % 3]
        results = {name: timed(lambda name=name, ids=ids: ways[name](ids)) for name in names}
        if index:
            rows.append({name: times for name, (times, _) in results.items()})
    figures: dict[str, Any] = {"draft_length": draft_length, "prompts": options.assisted_count}
    for clock in ("wall", "cpu"):
        medians = {name: statistics.median(row[name][clock] for row in rows) for name in ways}
        ratio = statistics.median(row["assisted"][clock] / row["lossless"][clock] for row in rows)
        figures[clock] = medians | {"assisted over lossless": ratio}
    return figures


# -------------------------------------------------------------------------------------------------------------------------
COLUMNS = ("prompts", "tokens", "differing", "accepted", "per round", "readings", "LLM tok/s", "lossless", "ratio")


def print_row(name: str, result: Mapping[str, Any]) -> None:
    speed = result["wall"]
    cells = (
        f"{result['prompts']}",
        f"{result['tokens']}",
        f"{result['differing']}",
        f"{result['acceptance_rate']:.2f}",
        f"{result['tokens_per_round']:.2f}",
        f"{result['most_readings']}",
        f"{speed['llm_tokens_per_second']:.2f}",
        f"{speed['lossless_tokens_per_second']:.2f}",
        f"{speed['ratio']:.2f}",
    )
    print(f"{name:16}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
    for difference in result["differences"]:
        print(f"  differs: {difference}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--llm", help="a decoder-only LLM, of which an untrained cut drafts; SmolLM2-135M-Instruct by default"
    )
    group.add_argument("--checkpoint", help="a trained hybrid with a decoder-only LLM")
    parser.add_argument(
        "--prompts",
        type=pathlib.Path,
        default=PROJECT / "examples" / "data" / "synopsis-validation.jsonl.gz",
        help="JSON lines (also .gz) with a column `prompt`, for the decoder-only LLM",
    )
    parser.add_argument("--count", type=int, default=200, help="prompts for each kind of LLM, 200 by default")
    parser.add_argument("--new-tokens", type=int, default=20, help="the longest response, 20 by default")
    parser.add_argument("--samples", type=int, default=1000, help="sampled responses of each kind, 1000 by default")
    parser.add_argument(
        "--assisted-count", type=int, default=15, help="prompts beside assisted generation, 15 by default"
    )
    parser.add_argument("--small", action="store_true", help="tiny models in the place of random ones of real sizes")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/lossless.json"))
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.monotonic()
    command = f"python benchmarks/lossless.py --count {options.count} --new-tokens {options.new_tokens}"
    if not (options.llm or options.checkpoint or options.small):
        options.llm = str(prepare("smollm2-135m-instruct", PROJECT / "models"))
    names = {"llm": options.llm, "checkpoint": options.checkpoint, "prompts": options.prompts}
    named = {name: without_path(value) for name, value in names.items() if value is not None}
    report: dict[str, Any] = {
        **provenance(" ".join([command, *(f"--{name} {value}" for name, value in named.items())])),
        "setting": {"batch_size": 1, "dtype": "float32", "new_tokens": options.new_tokens, **named},
        "greedy": {},
        "samples": {},
    }
    print(" " * 16 + "".join(f"{column:>11}" for column in COLUMNS))
    for kind, compose in {"encoder-decoder": encoder_decoder, "decoder-only": decoder_only}.items():
        model, maker = compose(options)
        result = report["greedy"][kind] = compare(model, prompts_for(model, maker, options), options.new_tokens)
        print_row(kind, result)
    for kind, make in tiny_llms().items():
        result = report["samples"][kind] = sample_test(make, options.samples)
        tests = ", ".join(f"p = {result[name]['p']:.3f}" for name in ("second_token", "third_token"))
        print(f"{kind:16}{result['samples']} samples, second and third token: {tests}", flush=True)
    if options.assisted_count:
        figures = report["assisted_generation"] = beside_assisted_generation(options)
        seconds = ", ".join(f"{name} {figures['wall'][name]:.3f} s" for name in ("llm", "assisted", "lossless"))
        print(f"equal drafts of {figures['draft_length']} tokens: {seconds}", flush=True)

    exact = all(result["differing"] == 0 and result["prompt_read_once"] for result in report["greedy"].values())
    sampled = all(result["passed"] for result in report["samples"].values())
    report |= {"lossless": exact and sampled, "minutes": (time.monotonic() - started) / 60}
    print("Lossless." if exact and sampled else "Not lossless: see above.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if exact and sampled else 1


if __name__ == "__main__":
    sys.exit(main())
