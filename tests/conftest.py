"""Tiny random models of many families, with tokenizers trained on the spot. No network, no files but temporary ones."""

from __future__ import annotations

import copy
import dataclasses
import gc
import gzip
import json
import math
import pathlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from hub_server import HubServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.cli import main

torch.set_num_threads(1)

VOCAB_SIZE = 320
PROMPTS = [
    "translate English to German: The house is wonderful.",
    "summarize: A small model writes, naïve but quick, 12 tokens a second.",
    "Hello there!",
]
RESPONSES = ["Das Haus ist wunderbar.", "A quick small model.", "Hi"]
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Exports first, as they take longest: one of two workers makes each once, and the other takes over what is left."""
    items.sort(key=lambda item: "test_export" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector, which accelerate runs after each training, may pass it by."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def default_logging() -> None:
    """The command line and the benchmarks set these for their process, which the tests share."""
    logging.set_verbosity_warning()
    logging.enable_progress_bar()


# Tokenizers ----------------------------------------------------------------------------------------------------------


def train(tokenizer: Tokenizer, corpus: list[str], vocab_size: int, **options: object) -> None:
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False, **options)
    tokenizer.train_from_iterator(corpus, trainer)


def train_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A `bpe` (byte-level) or a `unigram` (white space marked) tokenizer that ends every text with `</s>`."""
    corpus = PROMPTS + RESPONSES + [transformers.PreTrainedModel.__doc__ or ""]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        train(tokenizer, corpus, VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        pieces = Tokenizer(models.BPE(unk_token="<unk>"))  # `UnigramTrainer` chooses others in each process
        pieces.pre_tokenizer = pre_tokenizers.Metaspace()
        train(pieces, corpus, VOCAB_SIZE - 40)
        vocabulary = sorted(pieces.get_vocab().items(), key=lambda piece: piece[1])
        tokenizer = Tokenizer(models.Unigram([(piece, -math.log(1 + rank)) for piece, rank in vocabulary], unk_id=3))
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# Families ------------------------------------------------------------------------------------------------------------


def t5_like(cls: str) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, cls)(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,  # 5.23 sizes the decoder's cache by the encoder's layers, so the decoder may not have more
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )


def bart_like(cls: str, **extra: object) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, cls)(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **IDS,
        **extra,
    )


def bert_like(cls: str, **extra: object) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, cls)(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        **IDS,
        **extra,
    )


def llama_like(cls: str, hidden_size: int = 48, **extra: object) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, cls)(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        **IDS,
        **extra,
    )


def t5gemma() -> PreTrainedConfig:
    module = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "max_position_embeddings": 128,
        **IDS,
    }
    return transformers.T5GemmaConfig(
        encoder=copy.deepcopy(module), decoder=copy.deepcopy(module), vocab_size=VOCAB_SIZE, **IDS
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5": t5_like("T5Config"),
    "mt5": t5_like("MT5Config"),
    "bart": bart_like("BartConfig", scale_embedding=True),
    "marian": bart_like("MarianConfig", scale_embedding=True, decoder_vocab_size=VOCAB_SIZE),
    "pegasus": bart_like("PegasusConfig", scale_embedding=True),
    "t5gemma": t5gemma,
    "bert": bert_like("BertConfig"),
    "roberta": bert_like("RobertaConfig"),
    "modernbert": bert_like("ModernBertConfig", global_attn_every_n_layers=2, local_attention=16),
    "deberta-v2": bert_like("DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "mpnet": bert_like("MPNetConfig"),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=128, **IDS
    ),
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=8,
        max_position_embeddings=128,
        **IDS,
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        word_embed_proj_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=128,
        **IDS,
    ),
    "llama": llama_like("LlamaConfig"),
    "qwen3": llama_like("Qwen3Config", hidden_size=40),
    "gemma3": llama_like("Gemma3TextConfig", sliding_window=16, query_pre_attn_scalar=8),
    "mistral": llama_like("MistralConfig", sliding_window=16),
    "phi3": llama_like("Phi3Config", hidden_size=32),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """An LLM and an SLM of the matrix, and how they are joined."""

    llm: str
    slm: str
    fusion: str
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return "-".join([f"{self.llm}->{self.slm}", self.fusion, *(f"{k}={v}" for k, v in self.options)])


# Each family stands on each side (that it has) at least twice, each fusion with both kinds of SLM and all kinds of LLM.
PAIRS = [
    Pair("t5", "t5", "add"),
    Pair("t5", "gpt2", "align"),
    Pair("mt5", "mt5", "replace", (("llm_layer", (0, 1, -1)),)),
    Pair("mt5", "llama", "llm-embed"),
    Pair("bart", "bart", "add", (("projector_norm", "layer_norm"),)),
    Pair("bart", "qwen3", "replace"),
    Pair("t5gemma", "t5gemma", "align"),
    Pair("t5gemma", "gemma3", "add"),
    Pair("bert", "t5", "align"),
    Pair("bert", "opt", "replace"),
    Pair("roberta", "bart", "llm-embed"),
    Pair("roberta", "mistral", "align"),
    Pair("modernbert", "marian", "add"),
    Pair("modernbert", "phi3", "align", (("llm_layer", (-1, 1)),)),
    Pair("deberta-v2", "pegasus", "align"),
    Pair("deberta-v2", "gpt-neo", "llm-embed"),
    Pair("mpnet", "mt5", "align", (("projector_norm", "rms_norm"),)),
    Pair("mpnet", "gpt2", "add"),
    Pair("gpt2", "t5gemma", "replace", (("slm_encoder", "skip"),)),
    Pair("gpt2", "gpt-neo", "add", (("projector_num_layers", 3),)),
    Pair("llama", "t5", "replace", (("slm_encoder", "skip"), ("llm_layer", 2))),
    Pair("llama", "llama", "add"),
    Pair("qwen3", "qwen3", "align", (("projector_num_layers", 1),)),
    Pair("qwen3", "marian", "replace"),
    Pair("gemma3", "pegasus", "add"),
    Pair("gemma3", "mistral", "llm-embed", (("llm_layer", 1),)),
    Pair("llama", "opt", "align"),
    Pair("t5", "phi3", "replace"),
    Pair("gpt2", "gemma3", "align"),
    Pair("llama", "qwen3", "kv"),
    Pair("gpt2", "gemma3", "kv"),
]
SMALL, SMALL_CAUSAL = Pair("t5", "t5", "add"), Pair("llama", "llama", "align")


@dataclasses.dataclass(frozen=True)
class Export:
    """A model that was exported, and the folder of its graphs and its processor."""

    model: LLM2SLMForConditionalGeneration
    folder: pathlib.Path


class Zoo:
    """Makes and keeps tiny checkpoints on disk: each family as an LLM's or an SLM's repository would be."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.exports: dict[tuple[Pair, str, bool], Export] = {}
        self.tokenizers = {kind: train_tokenizer(kind) for kind in ("bpe", "unigram")}

    def checkpoint(self, family: str, tokenizer: str, role: str) -> str:
        """Folder with a random model of a family and a tokenizer, ready for `from_pretrained`."""
        folder = self.root / f"{role}-{family}-{tokenizer}"
        if not folder.exists():
            torch.manual_seed(len(family) + (role == "slm"))
            config = FAMILIES[family]()
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            if type(config) not in auto._model_mapping or family in ("bert", "roberta", "modernbert", "deberta-v2"):
                auto = AutoModel
            model = auto.from_config(config)
            for parameter in model.parameters():  # not the near-zero of an untrained model: differences must show
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.tie_weights()
            model.save_pretrained(folder)
            self.tokenizers[tokenizer].save_pretrained(folder)
        return str(folder)

    def sources(self, pair: Pair) -> tuple[str, str]:
        """Folders of LLM and SLM."""
        llm_tokenizer = "bpe" if pair.fusion in ("add", "kv") else "unigram"
        return self.checkpoint(pair.llm, llm_tokenizer, "llm"), self.checkpoint(pair.slm, "bpe", "slm")

    def compose(self, pair: Pair, **kwargs: object) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMProcessor]:
        """A fresh model of a pair, and its processor."""
        llm, slm = self.sources(pair)
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in pair.options}
        torch.manual_seed(0)
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
            llm, slm, fusion=pair.fusion, **options | kwargs
        )
        return model, LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, fusion=pair.fusion)

    def export(self, pair: Pair, format: str = "onnx", int8: bool = False) -> Export:
        """What comes of exporting a fresh model of a pair in training mode; made once, so read only."""
        key = (pair, format, int8)
        if key not in self.exports:
            model, processor = self.compose(pair)
            folder = self.root / f"export-{len(self.exports)}"
            model.train().export(folder, format=format, int8=int8, processor=processor)
            self.exports[key] = Export(model, folder)
        return self.exports[key]


def make_batch(
    processor: LLM2SLMProcessor, prompts: list[str] = PROMPTS, responses: list[str] = RESPONSES, side: str = "right"
) -> BatchEncoding:
    """A padded batch with labels, padded on one side."""
    for tokenizer in (processor.tokenizer, processor.llm_tokenizer):
        tokenizer.padding_side = side
    return processor(text=prompts, text_target=responses, padding=True, return_tensors="pt")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A Hub on the loopback address, for clients in other processes: see `HubServer.environment`."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session", params=PAIRS, ids=str)
def composed(
    request: pytest.FixtureRequest, zoo: Zoo
) -> Iterator[tuple[Pair, LLM2SLMForConditionalGeneration, LLM2SLMProcessor]]:
    """Each pair of the matrix. Tests that change the model must work on a copy."""
    yield request.param, *zoo.compose(request.param)


@pytest.fixture
def small(zoo: Zoo) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMProcessor]:
    """One pair with one tokenizer and an encoder-decoder SLM, fresh, for tests that are not about families."""
    return zoo.compose(SMALL)


@pytest.fixture
def small_causal(zoo: Zoo) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMProcessor]:
    """One pair with two tokenizers and a decoder-only SLM, fresh."""
    return zoo.compose(SMALL_CAUSAL)


# The command line -------------------------------------------------------------------------------------------------------
ROWS = [{"prompt": f"{prompt} {i}", "completion": RESPONSES[i % 3]} for i, prompt in enumerate(PROMPTS * 4)]


def write_rows(file: pathlib.Path, rows: list[dict[str, object]] = ROWS) -> pathlib.Path:
    """Rows in a file of the kind that its name says."""
    import datasets

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(file, index=False)
    elif file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text(lines if file.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return file


def loaded(folder: pathlib.Path) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMProcessor]:
    return LLM2SLMForConditionalGeneration.from_pretrained(folder), LLM2SLMProcessor.from_pretrained(folder)


@pytest.fixture
def own_settings(tmp_path_factory, monkeypatch):
    """Data sets are cached in a temporary folder; what the command line sets for its process is set back."""
    import datasets
    from transformers.utils import logging

    cache = tmp_path_factory.mktemp("datasets")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, cache / name)
    monkeypatch.setenv("COLUMNS", "80")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def run(capsys):
    """Runs a command; gives its exit code, and what it wrote to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def error(run):
    """Runs a command that must fail; gives its text, which must be one line on stderr and nothing on stdout."""

    def error(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err.removeprefix("error: ").rstrip("\n")

    return error


@pytest.fixture(scope="session")
def sources(zoo):
    """Folders of an LLM and an SLM, with two tokenizers."""
    return zoo.sources(Pair("llama", "llama", "align"))


@pytest.fixture(scope="session")
def checkpoint(sources, tmp_path_factory):
    """A composed checkpoint with a decoder-only SLM; read only."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(*sources)
    model.save_pretrained(folder)
    LLM2SLMProcessor.from_llm_slm_pretrained(*sources).save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file
