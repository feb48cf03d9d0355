"""
What exports and lower precision change: tokens and loss beside those of the model in eager float32.

    python benchmarks/export_quality.py [--checkpoint FOLDER --prompts FILE.jsonl] [--count 200] [--new-tokens 32] [--batch-size 8]

Two models, in float32 the reference of what follows:

- encoder-decoder: an SLM cut from an LLM of the size of T5 v1.1 base, with random weights that write varied text, and random
  token ids as prompts (see `lossless.py`).
- decoder-only: a trained checkpoint (`--checkpoint`) and texts (`--prompts`, column `prompt`, and `completion` if it has one), or
  the top 4 layers of a random LLM of the size of SmolLM2-135M and random token ids.

Each writes greedily for `--count` prompts. Told are the share of prompts for which every token is the reference's, the share of
tokens that are, by their places (so all behind a first other one count as others unless they agree by chance), and the loss: the
mean negative log-likelihood of given responses, in nats a token. Given are the file's completions, or else what the reference
wrote. The share of tokens that would be chosen next where what stands before is given is the fairer measure of a precision:
`next tokens`.

The contestants are the LLM alone in bfloat16, LLM and SLM in bfloat16, and the exports. The exit code is 1 if an export in
float32 writes another token than the reference anywhere. Where it does, how much the reference's logits there favour its own
token is reported. With `--count 4 --new-tokens 8 --small` it is a test of this script.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lossless import decoder_only, encoder_decoder
from speed_pairs import EXPORTS, export_label
from speed_rivals import WriteGivenText
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList
from transformers.utils import logging as transformers_logging

from transformers_llm2slm.exported import LLM2SLMExportedModel
from transformers_llm2slm.measurements import provenance, without_path

PROMPT_LENGTH = 64
REFERENCE, LLM_BF16, BF16 = "float32", "LLM in bfloat16", "bfloat16"
LIBRARIES = ("onnxruntime", "openvino", "nncf")
NOT_A_TOKEN = -100


@dataclass
class Batch:
    """
    Prompts as `generate` takes them, and `responses` (`torch.LongTensor` of shape `(batch_size, length)`, -100 behind their ends)
    to give to all; those that the reference writes, if `None`.
    """

    inputs: dict[str, Any]
    responses: torch.Tensor | None = None


# Prompts -----------------------------------------------------------------------------------------------------------------
def random_batches(model: Any, options: argparse.Namespace) -> Iterator[Batch]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1)
    for start in range(0, options.count, options.batch_size):
        shape = (min(options.batch_size, options.count - start), PROMPT_LENGTH)
        ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
        yield Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def text_batches(processor: Any, options: argparse.Namespace) -> Iterator[Batch]:
    """The first prompts of a file, with their completions."""
    with options.prompts.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(options.count), strict=False)]
    if len(rows) < options.count:
        raise SystemExit(f"{options.prompts} holds {len(rows)} rows, but --count is {options.count}.")
    for start in range(0, options.count, options.batch_size):
        some = rows[start : start + options.batch_size]
        inputs = dict(processor(text=[row["prompt"] for row in some], padding=True, return_tensors="pt"))
        if "completion" not in rows[0]:
            yield Batch(inputs)
            continue
        ids = processor.tokenizer([row["completion"] for row in some], add_special_tokens=False)["input_ids"]
        ends = [torch.tensor([*tokens, processor.tokenizer.eos_token_id][: options.new_tokens]) for tokens in ids]
        yield Batch(inputs, pad_sequence(ends, batch_first=True, padding_value=NOT_A_TOKEN))


# Measuring ---------------------------------------------------------------------------------------------------------------
def write(model: Any, batch: Batch, new_tokens: int, given: torch.Tensor | None = None) -> tuple[Any, torch.Tensor]:
    """Tokens that are written, of shape `(batch_size, new_tokens)`, and the logits that they are chosen by."""
    before = 1 if model.slm.config.is_encoder_decoder else 0
    length = new_tokens if given is None else given.shape[1]
    forced = None if given is None else LogitsProcessorList([WriteGivenText(given.clamp(min=0), before)])
    outputs = model.generate(
        **batch.inputs,
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=forced,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return outputs.sequences[:, before:], torch.stack(outputs.logits, dim=1).float()


def measure(model: Any, batches: list[Batch], references: list[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """What a contestant writes and thinks of given responses, beside the `references`, one for each batch."""
    loss = equal = prompts = chosen = written = given_tokens = 0.0
    differences = []
    for number, (batch, reference) in enumerate(zip(batches, references, strict=True)):
        own = reference["written"]
        sequences, _ = write(model, batch, own.shape[1])
        same = sequences == own
        equal, written = equal + same.sum().item(), written + same.numel()
        prompts += same.all(dim=1).sum().item()
        for row in (~same.all(dim=1)).nonzero()[:, 0].tolist():
            place = int((~same[row]).nonzero()[0])
            logits = reference["logits"][row, place]
            gap = float(logits[own[row, place]] - logits[sequences[row, place]])
            differences.append(
                {"prompt": number * len(batches[0].inputs["input_ids"]) + row, "place": place, "gap": gap}
            )
        given = reference["given"]
        _, logits = write(model, batch, own.shape[1], given)
        real = given != NOT_A_TOKEN
        loss += cross_entropy(logits[real], given[real], reduction="sum").item()
        chosen += (logits.argmax(-1) == reference["next"])[real].sum().item()
        given_tokens += real.sum().item()
    return {
        "prompts equal": prompts / sum(len(reference["written"]) for reference in references),
        "tokens equal": equal / written,
        "next tokens equal": chosen / given_tokens,
        "loss": loss / given_tokens,
        "first differences": differences,
    }


def references_of(model: Any, batches: list[Batch], new_tokens: int) -> list[dict[str, torch.Tensor]]:
    """What the reference writes, the logits by which it does, the responses to give to all, and what it would write in them."""
    found = []
    for batch in batches:
        written, logits = write(model, batch, new_tokens)
        given = written if batch.responses is None else batch.responses
        following = logits if batch.responses is None else write(model, batch, new_tokens, given)[1]
        found.append({"written": written, "logits": logits, "given": given, "next": following.argmax(-1)})
    return found


def contestants(model: Any, folder: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """The model, and one after another what is made of it; each export is gone before the next is made."""
    yield REFERENCE, model
    halved = copy.deepcopy(model)
    halved.llm.to(torch.bfloat16)
    yield LLM_BF16, halved
    yield BF16, halved.to(torch.bfloat16)
    del halved
    for format, int8 in EXPORTS:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            with contextlib.redirect_stdout(io.StringIO()):  # converters tell every step
                model.export(place, format=format, int8=int8)
            yield export_label(format, int8), LLM2SLMExportedModel.from_pretrained(place)


KINDS = {"encoder-decoder": encoder_decoder, "decoder-only": decoder_only}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a trained hybrid with a decoder-only LLM")
    parser.add_argument("--prompts", type=pathlib.Path, help="JSON lines, for --checkpoint")
    parser.add_argument("--count", type=int, default=200, help="prompts for each model, 200 by default")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of a response, 32 by default")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time, 8 by default")
    parser.add_argument("--kind", choices=KINDS, help="this model only; what is there of the other is left as it is")
    parser.add_argument("--small", action="store_true", help="tiny models in the place of random ones of real sizes")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/export_quality.json"))
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.prompts is None):
        parser.error("--checkpoint and --prompts go together")
    options.llm = None
    return options


def main() -> int:
    options = parse()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.onnx", "nncf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    command = f"python benchmarks/export_quality.py --count {options.count} --new-tokens {options.new_tokens}"
    named = {
        name: without_path(getattr(options, name)) for name in ("checkpoint", "prompts") if getattr(options, name)
    }
    output: pathlib.Path = options.output
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for kind in (options.kind,) if options.kind else KINDS:
        began = time.perf_counter()
        model, processor = KINDS[kind](options)
        batches = list(random_batches(model, options) if processor is None else text_batches(processor, options))
        references = references_of(model, batches, options.new_tokens)
        print(
            f"\n{kind}: {options.count} prompts\n{'':24}{'prompts':>10}{'tokens':>10}{'next':>10}{'loss':>10}{'change':>10}"
        )
        rows: dict[str, Any] = {}
        exact = True
        with tempfile.TemporaryDirectory() as folder:
            for name, contestant in contestants(model, pathlib.Path(folder)):
                row = rows[name] = measure(contestant, batches, references)
                row["change of the loss"] = row["loss"] - rows[REFERENCE]["loss"]
                shares = "".join(
                    f"{row[share]:10.2%}" for share in ("prompts equal", "tokens equal", "next tokens equal")
                )
                print(f"  {name:22}{shares}{row['loss']:10.4f}{row['change of the loss']:+10.4f}", flush=True)
                exact &= not (name.endswith(REFERENCE) and row["first differences"])
        told = named if processor is not None else {}
        report[f"{kind}, trained" if told else kind] = {
            **provenance(" ".join([command, *(f"--{name} {value}" for name, value in told.items())]), *LIBRARIES),
            "setting": {"count": options.count, "batch_size": options.batch_size, "new_tokens": options.new_tokens}
            | told,
            "figures": rows,
            "float32 exports equal": exact,
            "minutes": (time.perf_counter() - began) / 60,
        }
        print("\nExports in float32 write the same tokens." if exact else "\nAn export in float32 differs.")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result["float32 exports equal"] for result in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
