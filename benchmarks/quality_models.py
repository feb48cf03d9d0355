"""The models of `quality.py`: composed or made anew, with what makes batches for them and what writes with them."""

from __future__ import annotations

import gzip
import json
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from quality_cells import HYBRID, SLM, SMOLLM2, TASKS, TUNED, ZERO_SHOT, Cell
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from transformers_llm2slm import (
    LLM2SLMDataCollator,
    LLM2SLMForConditionalGeneration,
    LLM2SLMProcessor,
    fit_slm_embeddings,
    make_shortlist,
)

PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "examples"))

from demo import SLMAloneCollator, fast_dtype, loss_per_token  # noqa: E402, F401
from prepare_healing_rows import cut_in_two  # noqa: E402
from prepare_models import prepare  # noqa: E402

FIT_PROMPTS = 500
# bfloat16, of frozen LLMs and of autocast, where this machine is faster in it.
frozen_dtype = cache(fast_dtype)
VOCABULARY = 8192
COMPOSING = (
    "llm_layer",
    "projector_init",
    "projector_num_layers",
    "projector_hidden_size",
    "projector_norm",
    "slm_encoder",
)
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@cache
def llm_path(name: str) -> str:
    """The folder of a pretrained model; fetched if need be."""
    return str(prepare(name, PROJECT / "models"))


# Rows --------------------------------------------------------------------------------------------------------------------
@cache
def read_rows(task: str, split: str) -> list[dict[str, str]]:
    """The rows of `examples/data`, as `prompt` and `completion`; the prompt is as it stands there."""
    rows = []
    for name in ("train", "train-more") if split == "train" else (split,):
        with gzip.open(PROJECT / "examples" / "data" / f"{task}-{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    prompt, completion = TASKS[task].columns
    return [{"prompt": row[prompt], "completion": row[completion]} for row in rows]


def rows_for(cell: Cell, split: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Rows of one split, each prompt cut to what the cell reads, with the task's suffix."""
    rows = read_rows(cell.task, split)[: cell.rows if split == "train" else None]
    return [row | {"prompt": cut(row["prompt"], cell, tokenizer) + TASKS[cell.task].suffix} for row in rows]


def healing_rows(cell: Cell, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The prompts' own text in two: what stands before a place is read, and what stands behind it is written."""
    places = random.Random(cell.seed)
    texts = (cut(row["prompt"], cell, tokenizer) for row in read_rows(cell.task, "train")[: cell.rows])
    return [row for text in texts if (row := cut_in_two(text, places)) is not None]


def cut(text: str, cell: Cell, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer(text, truncation=True, max_length=cell.prompt_length)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True)


# Models ------------------------------------------------------------------------------------------------------------------
def make_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the task's training texts, which ends every text."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (text for row in read_rows(task, "train") for text in row.values())
    special = [PAD, END, UNKNOWN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def new_slm(shape: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small model with random weights, such as `t5-256x4`."""
    width, layers = map(int, shape.removeprefix("t5-").split("x"))
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64 * -(-len(tokenizer) // 64),
            d_model=width,
            d_ff=4 * width,
            d_kv=64,
            num_heads=width // 64,
            num_layers=layers,
            num_decoder_layers=layers,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=tokenizer.pad_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def processor_for(cell: Cell) -> LLM2SLMProcessor:
    """Of the hybrid, or, with the SLM's tokenizer, of the SLM alone."""
    llm_tokenizer = AutoTokenizer.from_pretrained(llm_path(cell.llm))
    if cell.slm_shape is not None:
        tokenizer = make_tokenizer(cell.task)
        return LLM2SLMProcessor(
            tokenizer,
            llm_tokenizer,
            fusion=cell.fusion or "align",
            slm_is_encoder_decoder=True,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    if cell.llm == SMOLLM2:
        return LLM2SLMProcessor(llm_tokenizer, fusion=cell.fusion or "replace", slm_is_encoder_decoder=False)
    tokenizer = AutoTokenizer.from_pretrained(llm_path(SMOLLM2))
    return LLM2SLMProcessor(tokenizer, llm_tokenizer, fusion="align", slm_is_encoder_decoder=False)


def arguments_of(cell: Cell, *names: str) -> dict[str, Any]:
    """Those of a cell's fields that are given, as `from_llm_slm_pretrained` takes them."""
    values = {name: getattr(cell, name) for name in names}
    return {n: list(value) if isinstance(value, tuple) else value for n, value in values.items() if value is not None}


def compose(cell: Cell, processor: LLM2SLMProcessor, llm: str) -> LLM2SLMForConditionalGeneration:
    """The hybrid before training: projector and SLM in float32, the LLM in bfloat16 where that is fast."""
    options = arguments_of(cell, *COMPOSING)
    few = cell.with_changes(rows=min(cell.rows, FIT_PROMPTS))
    prompts = [row["prompt"] for row in rows_for(few, "train", processor.llm_tokenizer)]
    if cell.slm_shape is not None:
        options["slm"] = new_slm(cell.slm_shape, processor.tokenizer)
    elif cell.llm == SMOLLM2:
        options |= arguments_of(cell, "slm_layers") | {"slm_dtype": torch.float32}
    else:
        of_smollm2 = Cell(cell.task, HYBRID, slm_layers=cell.slm_layers)
        options["slm"] = compose(of_smollm2, processor_for(of_smollm2), llm_path(SMOLLM2)).slm
    if cell.projector_init == "fit":
        options["fit_prompts"] = prompts
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, fusion=processor.fusion, processor=processor, llm_dtype=frozen_dtype(), **options
    )
    if model.config.slm_layers and model.config.slm_layers[0] > 0:
        fit_slm_embeddings(model, processor, prompts)
    return model


@dataclass
class Contestant:
    """
    Args:
        model: What is trained, or, of the LLM as it is, what writes.
        collator: Makes batches of rows.
        write: From prompts, and arguments of `generate`, to texts.
        processor: Of the model.
    """

    model: Any
    collator: Callable[[Sequence[Any]], dict[str, Any]]
    write: Callable[..., list[str]]
    processor: LLM2SLMProcessor


def contestant_for(cell: Cell, llm: pathlib.Path | None = None) -> Contestant:
    """The model of a cell, before training. The LLM is by default as it was published, which is as large and as fast as fine-tuned."""
    set_seed(cell.seed)
    processor, task = processor_for(cell), TASKS[cell.task]
    llm_folder = llm_path(cell.llm) if llm is None else str(llm)
    if cell.contestant in (ZERO_SHOT, TUNED):
        dtype = frozen_dtype() if cell.contestant == ZERO_SHOT else torch.float32
        model = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=dtype)
        if cell.lora_rank:
            model = get_peft_model(model, LoraConfig(r=cell.lora_rank, target_modules="all-linear"))
    elif cell.slm_shape is not None and cell.contestant == SLM:
        model = new_slm(cell.slm_shape, processor.tokenizer)
    else:
        model = compose(cell, processor, llm_folder)
        if cell.contestant == SLM:
            model = model.slm
    for vocabulary in vocabularies(model, cell):
        vocabulary.requires_grad_(False)
    if cell.freeze_slm:
        model.slm.requires_grad_(False)
    if cell.shortlist:
        columns = ("completion",) if cell.shortlist == "answers" else ("prompt", "completion")
        texts = [row[column] for row in read_rows(cell.task, "train")[: cell.rows] for column in columns]
        model.shortlist = make_shortlist(processor, texts)
    if cell.contestant == HYBRID:
        collator = LLM2SLMDataCollator(processor, max_response_length=task.max_new_tokens)
        return Contestant(model, collator, hybrid_writer(model, processor), processor)
    alone = SLMAloneCollator(processor, task.max_new_tokens)
    instruction = task.instruction if cell.contestant == ZERO_SHOT else None
    return Contestant(model, alone, alone_writer(model, processor, alone, instruction), processor)


def vocabularies(model: Any, cell: Cell) -> list[nn.Module]:
    """Embeddings and LM head of a cut SLM. Most of its parameters are there, and few rows train the others better alone."""
    if cell.slm_shape is not None or cell.contestant not in (SLM, HYBRID):
        return []
    slm = model.slm if cell.contestant == HYBRID else model
    return [slm.get_input_embeddings(), slm.get_output_embeddings()]


# Writing -----------------------------------------------------------------------------------------------------------------
def hybrid_writer(model: LLM2SLMForConditionalGeneration, processor: LLM2SLMProcessor) -> Callable[..., list[str]]:
    def write(prompts: Sequence[str], **kwargs: Any) -> list[str]:
        batch = processor(text=list(prompts), padding=True, return_tensors="pt")
        return processor.batch_decode(model.generate(**batch, **kwargs), skip_special_tokens=True)

    return write


def alone_writer(
    model: PreTrainedModel, processor: LLM2SLMProcessor, collator: SLMAloneCollator, instruction: str | None
) -> Callable[..., list[str]]:
    """Of a model by itself; instructed, it is asked in a chat, and the first line of its answer counts."""

    def write(prompts: Sequence[str], **kwargs: Any) -> list[str]:
        if instruction:
            chats = [[{"role": "user", "content": f"{instruction}\n\n{prompt}"}] for prompt in prompts]
            prompts = processor.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        batch = collator.prompts(prompts)
        start = 0 if processor.slm_is_encoder_decoder else batch["input_ids"].shape[1]
        texts = processor.batch_decode(model.generate(**batch, **kwargs)[:, start:], skip_special_tokens=True)
        return [text.strip().partition("\n")[0] for text in texts] if instruction else texts

    return write


@torch.no_grad()
def write_all(contestant: Contestant, prompts: Sequence[str], new_tokens: int, batch_size: int = 50) -> list[str]:
    """Greedy texts for all prompts, each on one line, in batches of prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        written = contestant.write([prompts[row] for row in rows], max_new_tokens=new_tokens, do_sample=False)
        texts |= {row: " ".join(text.split()) for row, text in zip(rows, written, strict=True)}
    return [texts[row] for row in range(len(prompts))]


def as_dataset(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows with the prompt's `length` in tokens, which batches are grouped by."""
    lengths = [len(ids) for ids in tokenizer([row["prompt"] for row in rows])["input_ids"]]
    return Dataset.from_list([row | {"length": length} for row, length in zip(rows, lengths, strict=True)])
