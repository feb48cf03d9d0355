#!/usr/bin/env python3
"""Let a whole LLM answer the training prompts, for the SLM to learn its answers.

    python examples/generate_teacher_labels.py --model_name_or_path google/flan-t5-large \\
        --dataset_name wmt/wmt14 --dataset_config_name de-en --prompt_column translation.en \\
        --prompt_template "translate English to German: {prompt}" --keep_template --num_beams 4 \\
        --output_file answers.jsonl

The output has a line `{"prompt": ..., "completion": ...}` for each row, in the order of the rows, as the training commands
read it. This is sequence-level distillation (Kim and Rush, 2016, arXiv 1606.07947), with which LLM-to-SLM's translation
models were trained (Bergner et al., 2024, arXiv 2402.16844).

A run that was stopped, in whatever way, goes on where it was when it is started again with the same arguments: finished
batches are kept in OUTPUT_FILE.partial until the output is complete.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from transformers_llm2slm.rows import load_rows


@dataclass
class LabelArguments:
    """What can be chosen on the command line."""

    model_name_or_path: str = field(metadata={"help": "LLM with LM head, hub id or folder"})
    output_file: Path = field(metadata={"help": "JSON lines to write"})
    dataset_name: str | None = field(default=None, metadata={"help": "hub dataset with the prompts"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    split: str = field(default="train", metadata={"help": "its split"})
    train_file: Path | None = field(default=None, metadata={"help": "file with the prompts, in place of a dataset"})
    prompt_column: str = field(default="prompt", metadata={"help": "column of the prompts; a.b takes b of column a"})
    max_samples: int | None = field(default=None, metadata={"help": "answer only so many rows, from the first"})
    prompt_template: str = field(default="{prompt}", metadata={"help": "what the LLM is given for a prompt"})
    keep_template: bool = field(default=False, metadata={"help": "write prompts to the output as in the template"})
    apply_chat_template: bool = field(default=False, metadata={"help": "ask in the LLM's chat format"})
    system_prompt: str | None = field(default=None, metadata={"help": "system message of the chat"})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "the LLM reads so many tokens of a row's prompt, template not counted"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of an answer"})
    num_beams: int = field(default=1, metadata={"help": "beams of the search"})
    do_sample: bool = field(default=False, metadata={"help": "sample, in place of taking the likeliest answer"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling"})
    top_p: float = field(default=1.0, metadata={"help": "of sampling"})
    batch_size: int = field(default=16, metadata={"help": "rows answered at once"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    seed: int = field(default=42, metadata={"help": "of sampling"})


# The work ----------------------------------------------------------------------------------------------------------------
def check(arguments: LabelArguments) -> None:
    """Raise a `ValueError` for arguments that contradict each other, before anything is loaded."""
    if "{prompt}" not in arguments.prompt_template:
        raise ValueError(
            f"--prompt_template must say where the prompt goes, {{prompt}}: {arguments.prompt_template!r}."
        )
    if arguments.system_prompt is not None and not arguments.apply_chat_template:
        raise ValueError("--system_prompt is a message of a chat: add --apply_chat_template.")
    if not arguments.do_sample and (arguments.temperature, arguments.top_p) != (1.0, 1.0):
        raise ValueError("--temperature and --top_p belong to sampling: add --do_sample.")
    for name in ("batch_size", "max_new_tokens", "max_prompt_length", "num_beams", "temperature"):
        if (value := getattr(arguments, name)) is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value}.")
    if arguments.output_file.exists():
        raise ValueError(f"{arguments.output_file} exists already: remove it, or choose another --output_file.")


def load_llm(arguments: LabelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The whole LLM, on GPUs if there are any, and its tokenizer."""
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    device_map = "auto" if torch.cuda.is_available() else None  # over several GPUs, if one is too small
    llm = auto.from_pretrained(arguments.model_name_or_path, dtype=arguments.dtype, device_map=device_map)
    # A decoder-only LLM goes on from the end of the prompt, so its padding goes before it.
    side = "right" if config.is_encoder_decoder else "left"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, padding_side=side)
    if tokenizer.pad_token is None:  # padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.apply_chat_template and tokenizer.chat_template is None:
        raise ValueError(
            f"{arguments.model_name_or_path} has no chat template: leave --apply_chat_template out and write the "
            "instruction into --prompt_template."
        )
    return llm.eval(), tokenizer


def to_questions(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, arguments: LabelArguments) -> list[str]:
    """The texts that the LLM is given: each prompt, cut, in the template and, if wanted, in a chat."""
    if arguments.max_prompt_length is not None:
        # The prompt is cut, never the instruction around it.
        encoded = tokenizer(list(prompts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [offsets[: arguments.max_prompt_length][-1][1] for offsets in encoded["offset_mapping"]]
        prompts = [prompt[:end] for prompt, end in zip(prompts, ends, strict=True)]
    questions = [arguments.prompt_template.replace("{prompt}", prompt) for prompt in prompts]
    if not arguments.apply_chat_template:
        return questions
    system = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt is not None else []
    chats = [[*system, {"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def answer(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], arguments: LabelArguments
) -> tuple[list[str], int]:
    """The LLM's answers to a batch, and how many of them `max_new_tokens` cut short."""
    # A chat template writes the special tokens itself.
    batch = tokenizer(
        list(questions), add_special_tokens=not arguments.apply_chat_template, padding=True, return_tensors="pt"
    ).to(llm.device)
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.do_sample else {}
    sequences = llm.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        do_sample=arguments.do_sample,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    ends = llm.generation_config.eos_token_id
    ends = torch.tensor(ends if ends is not None else [], device=sequences.device).reshape(-1)
    written = sequences[:, 1 if llm.config.is_encoder_decoder else batch["input_ids"].shape[1] :]
    cut = int((~torch.isin(written, ends).any(dim=1)).sum())
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)], cut


def write_answers(arguments: LabelArguments) -> dict[str, int]:
    """
    Answer all prompts and write the output.

    Returns:
        `dict[str, int]`: `rows` written, `empty` answers left out, answers `cut` short, and `prompts` that differ.

    Raises:
        ValueError: for arguments, data or a partial output that don't belong together.
        OSError: for files and models that can't be reached.
    """
    check(arguments)
    rows = load_rows(
        arguments.train_file,
        dataset=arguments.dataset_name,
        dataset_config=arguments.dataset_config_name,
        split=arguments.split,
        prompt_column=arguments.prompt_column,
        completion_column=None,
        max_rows=arguments.max_samples,
    )
    row_prompts = rows["prompt"][:]
    prompts = list(dict.fromkeys(row_prompts))
    settings = {
        name: str(value) for name, value in asdict(arguments).items() if name not in ("output_file", "keep_template")
    }
    settings["SHA-256 of the prompts"] = hashlib.sha256(json.dumps(row_prompts).encode()).hexdigest()
    partial = arguments.output_file.with_name(arguments.output_file.name + ".partial")
    finished = read_partial(partial, settings)

    llm, tokenizer = load_llm(arguments)
    questions = to_questions(prompts, tokenizer, arguments)
    lengths = [len(ids) for ids in tokenizer(questions, verbose=False)["input_ids"]]
    # The longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -lengths[index])
    batches = [order[start : start + arguments.batch_size] for start in range(0, len(order), arguments.batch_size)]
    done = sum(len(batch["completions"]) for batch in finished.values())
    with (
        partial.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=done, unit="prompt") as progress,
    ):
        if file.tell() == 0:
            append(file, settings)
        for number, indices in enumerate(batches):
            if number in finished:
                continue
            # A batch is the same whether or not those before it are run again.
            set_seed(arguments.seed + number)
            completions, cut = answer(llm, tokenizer, [questions[index] for index in indices], arguments)
            finished[number] = {"batch": number, "rows": indices, "completions": completions, "cut": cut}
            append(file, finished[number])
            progress.update(len(indices))

    answers = {
        index: completion
        for batch in finished.values()
        for index, completion in zip(batch["rows"], batch["completions"], strict=True)
    }
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    written = partial.with_suffix(".complete")
    counts = {"rows": 0, "empty": 0, "cut": sum(batch["cut"] for batch in finished.values()), "prompts": len(prompts)}
    with written.open("w", encoding="utf-8") as file:
        for prompt in row_prompts:
            completion = answers[index_of[prompt]]
            counts["rows" if completion else "empty"] += 1
            if completion:
                if arguments.keep_template:
                    prompt = arguments.prompt_template.replace("{prompt}", prompt)
                append(file, {"prompt": prompt, "completion": completion})
    os.replace(written, arguments.output_file)
    partial.unlink()
    return counts


# Files -------------------------------------------------------------------------------------------------------------------
def append(file: Any, entry: dict[str, Any]) -> None:
    """Write one line, and have the system take it at once."""
    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    file.flush()


def read_partial(file: Path, settings: dict[str, str]) -> dict[int, dict[str, Any]]:
    """
    The finished batches by number. The first line holds the settings; a last line that was being written when a run was
    killed is taken out.

    Raises:
        ValueError: if the file was made with other settings; the text names them.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(file, sum(map(len, lines[:-1])))
        del lines[-1]
    if len(lines) < 2:  # settings without answers bind nobody
        file.unlink(missing_ok=True)
        return {}
    found, *batches = map(json.loads, lines)
    different = [name for name in settings | found if settings.get(name) != found.get(name)]
    if different:
        changes = "; ".join(f"{name} was {found.get(name)}, is {settings.get(name)}" for name in different)
        raise ValueError(
            f"{file} holds answers made with other settings: {changes}. Go on with the same settings, or remove the file to "
            "begin anew."
        )
    return {batch["batch"]: batch for batch in batches}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    (parsed,) = HfArgumentParser(LabelArguments, description=__doc__).parse_args_into_dataclasses(arguments)
    try:
        counts = write_answers(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{parsed.output_file}: {counts['rows']} rows, {counts['prompts']} different prompts.")
    if counts["empty"]:
        print(f"{counts['empty']} rows are left out: their answers are empty.")
    if counts["cut"]:
        print(f"{counts['cut']} answers were cut short at {parsed.max_new_tokens} tokens: raise --max_new_tokens?")


if __name__ == "__main__":
    main()
