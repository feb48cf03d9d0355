"""
Makes the checkpoints of a release that every later release must load: `python tests/checkpoints/make.py`.

They go into a folder named after the version, with the LLMs that they name beside them, and what the models compute: the
logits of a response, and what they write. A folder of a version that was released is never written again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

import transformers_llm2slm
from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor

ROOT = Path(__file__).parent
TEXTS = ["A large model reads the prompt once.", "A small one writes the answer, token by token."]
IDS = {"pad_token_id": 0, "eos_token_id": 1}
VOCAB_SIZE = 64
SEED = 3  # one with which the models write more than one token over and over


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few dozen tokens: `bpe` (of bytes) or `unigram`, which cut the same text differently."""
    special = ["<pad>", "</s>", "<unk>"]
    if kind == "bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCAB_SIZE - 20, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def t5() -> PreTrainedConfig:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 1}
    return T5Config(vocab_size=VOCAB_SIZE, decoder_start_token_id=0, **sizes, **IDS)


def llama() -> PreTrainedConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, bos_token_id=None, **sizes, **IDS)


def save_model(config: PreTrainedConfig, tokens: PreTrainedTokenizerFast, folder: Path) -> None:
    """A random model whose weights are large enough for every part of it to show in the logits."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def make(
    name: str,
    target: Path,
    llm: tuple[Callable[[], PreTrainedConfig], str],
    slm: tuple[Callable[[], PreTrainedConfig], str],
    **options: Any,
) -> None:
    """One checkpoint in `target/checkpoint`, its LLM in `target/llm`, and what it computes in `target/expected.json`."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as temporary:
        sources = [Path(temporary, part) for part in ("llm", "slm")]
        for (family, kind), folder in zip((llm, slm), sources, strict=True):
            save_model(family(), tokenizer(kind), folder)
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*map(str, sources), **options)
        processor = LLM2SLMProcessor.from_llm_slm_pretrained(*map(str, sources), fusion=model.config.fusion)
        # Where they were made is nowhere else: a test says where the LLM is.
        config = model.config
        config.llm_name_or_path = config.llm_config.name_or_path = f"org/{name}-llm"
        config.slm_name_or_path = config.slm_config.name_or_path = f"org/{name}-slm"
        model.save_pretrained(target / "checkpoint")
        processor.save_pretrained(target / "checkpoint")
        (target / "llm").mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(sources[0] / file, target / "llm" / file)
    batch = processor(text=TEXTS, text_target=TEXTS[::-1], padding=True, return_tensors="pt")
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, labels=labels).logits
    expected = {
        "prompts": TEXTS,
        "responses": TEXTS[::-1],
        # Of the first and the last position that both responses have.
        "logits": [[[round(x, 6) for x in row[position].tolist()] for position in (0, 9)] for row in logits],
        "generated": [
            [token for token in row if token != model.config.pad_token_id]
            for row in model.generate(**batch, max_new_tokens=12, do_sample=False).tolist()
        ],
    }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--replace", action="store_true", help="write the folder of a version that is not released again"
    )
    root = ROOT / transformers_llm2slm.__version__
    if root.exists() and not parser.parse_args().replace:
        parser.error(f"{root} is there already. If this version was not released yet, pass --replace.")
    shutil.rmtree(root, ignore_errors=True)
    make("one-tokenizer", root / "one-tokenizer", (t5, "bpe"), (t5, "bpe"), fusion="add")
    make("two-tokenizers", root / "two-tokenizers", (llama, "unigram"), (llama, "bpe"), fusion="align")


if __name__ == "__main__":
    main()
