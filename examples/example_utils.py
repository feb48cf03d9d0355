"""What the example scripts share: arguments, rows, the model, metrics, and the steps of a run."""

import gc
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from huggingface_hub import upload_folder
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from transformers_llm2slm import (
    LLM2SLMDataCollator,
    LLM2SLMForConditionalGeneration,
    LLM2SLMModelCardMixin,
    LLM2SLMProcessor,
    cache_llm_states,
    fit_slm_embeddings,
)
from transformers_llm2slm.cli.arguments import integers
from transformers_llm2slm.configuration_llm2slm import decoder_text_config
from transformers_llm2slm.evaluation import text_scores
from transformers_llm2slm.measurements import (
    QUALITY,
    metrics_of,
    provenance,
    shareable_command,
    without_path,
    write_record,
)
from transformers_llm2slm.model_card import write_model_card
from transformers_llm2slm.rows import load_rows
from transformers_llm2slm.structure import position_limit
from transformers_llm2slm.trainer_card import trainer_state_records

logger = logging.getLogger(__name__)

FIT_PROMPTS = 300  # what a start in closed form is fitted on
DEFAULT_NEW_TOKENS = 128
COMPOSING = ("fusion", "llm_layer", "slm_encoder", "projector_init", "fit_slm_embeddings")
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}


# Arguments ---------------------------------------------------------------------------------------------------------------
def option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """A checkpoint (`--model_name_or_path`), or an LLM and an SLM to compose; and how the LLM's states are cached."""

    model_name_or_path: str | None = option("LLM-to-SLM checkpoint to start from, hub id or folder")
    llm_name_or_path: str | None = option("LLM, hub id or folder; with --model_name_or_path: where its LLM lies")
    slm_name_or_path: str | None = option("SLM, hub id or folder")
    slm_layers: str | None = option("cut the SLM from the LLM: so many of its layers, or these, as in 0,5,11")
    fusion: Literal["add", "align", "replace", "llm-embed", "kv"] | None = option(
        "default: add or align, by the tokenizers"
    )
    llm_layer: str | None = option(
        "hidden layer of the LLM to read, or several, as in 4,8,-1; default: the last, or of a cut what its layers had below them"
    )
    slm_encoder: Literal["keep", "skip"] | None = option("whether an encoder-decoder SLM keeps its encoder")
    projector_init: Literal["random", "zero", "identity", "fit"] | None = option(
        f"where the projector starts; fit: ridge regression on the first {FIT_PROMPTS} training prompts"
    )
    fit_slm_embeddings: bool = option("start the embeddings of an SLM cut from the LLM from training prompts", False)
    freeze_slm_embeddings: bool = option("train the SLM without its embeddings and LM head", False)
    llm_dtype: Literal["float32", "bfloat16", "float16"] | None = option("default: as stored")
    llm_quantization: Literal["int8", "nf4"] | None = option("quantise the LLM by bitsandbytes")
    slm_dtype: Literal["float32", "bfloat16", "float16"] = option("of SLM and projector; see also --bf16", "float32")
    cache_llm_states: str | None = option("run the LLM once over the rows, keep its states in this folder")
    cache_dtype: Literal["float16", "bfloat16", "float32", "int8"] = option("of the cached states", "float16")
    cache_num_workers: int | None = option("processes that fill the cache, by Ray; default: this one")

    def llm_options(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` for the LLM."""
        options: dict[str, Any] = {"llm_dtype": self.llm_dtype}
        if self.llm_quantization is not None:
            options["llm_quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[self.llm_quantization])
        if self.model_name_or_path is not None:
            options["llm_name_or_path"] = self.llm_name_or_path
        return {name: value for name, value in options.items() if value is not None}


@dataclass
class DataArguments:
    """A data set of the hub, or files: JSON lines, JSON or CSV (also .gz), or Parquet. A file goes before a split."""

    dataset_name: str | None = option("data set of the hub, or its folder")
    dataset_config_name: str | None = option("its configuration")
    train_split: str = option("its split to train on; slices, as in train[:90%%], are taken", "train")
    validation_split: str = option("its split for --do_eval", "validation")
    test_split: str = option("its split for --do_predict", "test")
    train_file: str | None = option("file to train on")
    validation_file: str | None = option("file for --do_eval")
    test_file: str | None = option("file for --do_predict")
    max_train_samples: int | None = option("only so many rows, from the first")
    max_eval_samples: int | None = option("the same for --do_eval")
    max_predict_samples: int | None = option("the same for --do_predict")
    prompt_prefix: str = option('what every prompt begins with, as in "summarize: "', "")
    prompt_suffix: str = option("what every prompt ends with, however far it is cut", "")
    max_prompt_length: int | None = option("cut prompts to so many LLM tokens; default: what the models take")
    max_response_length: int | None = option(
        f"cut responses to so many SLM tokens, and generate no more; default: not cut, {DEFAULT_NEW_TOKENS} generated"
    )
    num_beams: int | None = option("beams for generation; default: as the model says")

    def __post_init__(self) -> None:
        # A shell hands over a backslash and an n.
        self.prompt_prefix, self.prompt_suffix = (
            t.replace("\\n", "\n") for t in (self.prompt_prefix, self.prompt_suffix)
        )

    @property
    def name(self) -> str | None:
        """What the model card says about the data."""
        return self.dataset_name or self.train_file

    def source(self, file: str | None, split: str) -> dict[str, str]:
        """What a record of measurements says about the rows of `file` or, without one, of `split`."""
        if file is not None:
            return {"name": Path(file).name, "split": split}
        named = {"name": without_path(self.dataset_name), "config": self.dataset_config_name, "split": split}
        return {key: value for key, value in named.items() if value is not None}


def parse_arguments(*types: type) -> list[Any]:
    """Arguments of the command line, or of the JSON file that is its only argument. The last are the trainer's."""
    parser = HfArgumentParser(types)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        parsed = parser.parse_json_file(sys.argv[1])
    else:
        parsed = parser.parse_args_into_dataclasses()
    training_args: TrainingArguments = parsed[-1]
    training_args.remove_unused_columns = False  # the collator reads the columns, not the model
    level = training_args.get_process_log_level()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(level)
    # What a cache will take, for instance.
    logging.getLogger("transformers_llm2slm").setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 says at every layer and step that it casts
    transformers_logging.set_verbosity(level)
    set_seed(training_args.seed)
    return list(parsed)


# Rows --------------------------------------------------------------------------------------------------------------------
def read_rows(
    data: DataArguments, training_args: TrainingArguments, processor: LLM2SLMProcessor, **columns: Any
) -> dict[str, Dataset]:
    """The rows for what is to be done, of `train`, `validation` and `test`. `columns` as for `load_rows`."""
    wanted = {
        "train": (training_args.do_train, data.train_file, data.train_split, data.max_train_samples),
        "validation": (training_args.do_eval, data.validation_file, data.validation_split, data.max_eval_samples),
        "test": (training_args.do_predict, data.test_file, data.test_split, data.max_predict_samples),
    }
    rows = {}
    for name, (needed, file, split, max_rows) in wanted.items():
        if not needed:
            continue
        if file is None and data.dataset_name is None:
            raise ValueError(f"There are no {name} rows: give `--{name}_file` or `--dataset_name`.")
        source: dict[str, Any] = {"dataset": data.dataset_name, "dataset_config": data.dataset_config_name}
        if file is not None:
            source = {"file": Path(file)}
        with training_args.main_process_first(desc=f"reading the {name} rows"):
            loaded = load_rows(**source, split=split, max_rows=max_rows, **columns)
            rows[name] = with_affixes(loaded, data, processor)
    if not rows:
        raise ValueError("There is nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")
    return rows


def with_affixes(rows: Dataset, data: DataArguments, processor: LLM2SLMProcessor) -> Dataset:
    """Rows with prefix and suffix around each prompt. A prompt that is too long is cut before the suffix."""
    prefix, suffix = data.prompt_prefix, data.prompt_suffix
    if not prefix and not suffix:
        return rows
    if "messages" in rows.column_names or not isinstance(rows[0]["prompt"], str):
        raise ValueError("Conversations take no `--prompt_prefix` and no `--prompt_suffix`: write a system message.")
    tokenizer, limit = processor.llm_tokenizer, data.max_prompt_length or processor.max_prompt_length
    room = None
    if suffix and limit is not None:
        room = limit - len(tokenizer(suffix, add_special_tokens=False)["input_ids"])
        if room <= len(tokenizer(prefix)["input_ids"]):
            raise ValueError(f"Prefix and suffix fill a prompt of {limit} tokens: raise `--max_prompt_length`.")

    def add(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
        prompts = [prefix + prompt for prompt in batch["prompt"]]
        if room is not None:
            cut = tokenizer(prompts, truncation=True, max_length=room, return_offsets_mapping=True)["offset_mapping"]
            ends = [max(end for _, end in spans) if len(spans) == room else None for spans in cut]
            prompts = [prompt[:end] for prompt, end in zip(prompts, ends, strict=True)]
        return {"prompt": [prompt + suffix for prompt in prompts]}

    return rows.map(add, batched=True, desc="Adding prefix and suffix")


def check_lengths(
    rows: Mapping[str, Dataset], model: LLM2SLMForConditionalGeneration, collator: LLM2SLMDataCollator
) -> None:
    """Raise a `ValueError` for rows longer than the SLM's positions, before training comes upon them."""
    limit = position_limit(decoder_text_config(model.slm.config), model.slm)
    prompt, response = collator.max_prompt_length, collator.max_response_length
    cut = prompt and response and model.config.fusion != "align"  # which has the prompt in the SLM's tokens
    if limit is None or (cut and prompt + response <= limit):
        return
    for name, part in rows.items():
        longest = {"prompt": 0, "response": 0}
        for batch in part.iter(100):
            columns = collator([dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)])
            prompt = columns.get("slm_input_ids", columns["input_ids"])
            for key, ids in (("prompt", prompt), ("response", columns["labels"])):
                longest[key] = max(longest[key], ids.shape[1])
        # In a batch the longest prompt may stand beside the longest response.
        taken = longest["response"] + (0 if model.slm.config.is_encoder_decoder else longest["prompt"])
        if taken > limit:
            raise ValueError(
                f"The SLM takes {limit} tokens, but the {name} rows need {taken}: prompts have up to {longest['prompt']}, "
                f"responses up to {longest['response']}. Cut them by `--max_prompt_length` and `--max_response_length`."
            )


def plain_prompts(rows: Dataset, count: int) -> list[str]:
    """The first prompts as plain text, of conversations too."""
    column = "messages" if "messages" in rows.column_names else "prompt"
    prompts = rows[:count][column]
    texts = (
        p if isinstance(p, str) else "\n".join(m["content"] for m in p if m["role"] != "assistant") for p in prompts
    )
    return [text for text in texts if text.strip()]


# The model ---------------------------------------------------------------------------------------------------------------
def prepare(
    args: ModelArguments, data: DataArguments, training_args: TrainingArguments, **columns: Any
) -> tuple[LLM2SLMForConditionalGeneration, LLM2SLMDataCollator, dict[str, Dataset]]:
    """Model, collator (with the processor) and rows; where the LLM's states are cached, the model has no LLM any more."""
    if (args.model_name_or_path is None) == (args.slm_name_or_path is None and args.slm_layers is None):
        raise ValueError(
            "Give either `--model_name_or_path`, a checkpoint, or `--llm_name_or_path` with `--slm_name_or_path` or "
            "`--slm_layers` to compose a model."
        )
    processor = load_processor(args)
    rows = read_rows(data, training_args, processor, **columns)
    model = load_model(args, processor, plain_prompts(rows["train"], FIT_PROMPTS) if "train" in rows else [])
    collator = LLM2SLMDataCollator(processor, data.max_prompt_length, data.max_response_length)
    with training_args.main_process_first(desc="checking lengths"):
        check_lengths(rows, model, collator)
    if args.cache_llm_states is not None and training_args.do_train:
        model.to(training_args.device)
        for name in [name for name in rows if name != "test"]:
            with training_args.main_process_first(local=False, desc=f"caching the LLM's states of the {name} rows"):
                rows[name] = cache_llm_states(
                    rows[name],
                    model,
                    processor,
                    args.cache_llm_states,
                    max_prompt_length=data.max_prompt_length,
                    dtype=args.cache_dtype,
                    num_workers=args.cache_num_workers,
                )
        model.model.attach_llm(None)
        gc.collect()
    return model, collator, rows


def load_processor(args: ModelArguments) -> LLM2SLMProcessor:
    if args.model_name_or_path is not None:
        if given := [name for name in COMPOSING if getattr(args, name)]:
            raise ValueError(
                f"`--{given[0]}` is for composing a model; `--model_name_or_path` is one already. Leave it out."
            )
        return LLM2SLMProcessor.from_pretrained(args.model_name_or_path)
    if args.llm_name_or_path is None:
        raise ValueError("There is no LLM: give `--llm_name_or_path`.")
    models = args.llm_name_or_path, args.slm_name_or_path
    return LLM2SLMProcessor.from_llm_slm_pretrained(
        *models, fusion=args.fusion, slm_encoder=args.slm_encoder or "keep"
    )


def load_model(
    args: ModelArguments, processor: LLM2SLMProcessor, prompts: Sequence[str]
) -> LLM2SLMForConditionalGeneration:
    """The checkpoint, or LLM and SLM composed. `prompts` are for starts in closed form."""
    if args.model_name_or_path is not None:
        model = LLM2SLMForConditionalGeneration.from_pretrained(
            args.model_name_or_path, dtype=args.slm_dtype, **args.llm_options()
        )
    else:
        options = {
            "slm_layers": integers("slm_layers", args.slm_layers),
            "llm_layer": integers("llm_layer", args.llm_layer),
            "slm_encoder": args.slm_encoder,
            "projector_init": args.projector_init,
            "fit_prompts": prompts,
        }
        model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
            args.llm_name_or_path,
            args.slm_name_or_path,
            fusion=args.fusion,
            processor=processor,
            slm_dtype=args.slm_dtype,
            **{name: value for name, value in options.items() if value is not None},
            **args.llm_options(),
        )
        processor.fusion = model.config.fusion
        if args.fit_slm_embeddings:
            fit_slm_embeddings(model, processor, prompts)
    if args.freeze_slm_embeddings:
        for vocabulary in (model.slm.get_input_embeddings(), model.slm.get_output_embeddings()):
            vocabulary.requires_grad_(False)
    return model


def load_llm_again(model: LLM2SLMForConditionalGeneration, args: ModelArguments, checkpoint: str) -> None:
    """Attach the LLM that `checkpoint` names to a model that was trained without it."""
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(checkpoint, **args.llm_options())
    model.model.attach_llm(loaded.llm.to(model.device))


# Metrics -----------------------------------------------------------------------------------------------------------------
def decode(processor: LLM2SLMProcessor, ids: Any) -> list[str]:
    ids = torch.as_tensor(ids)
    texts = processor.batch_decode(
        ids.masked_fill(ids == -100, processor.tokenizer.pad_token_id), skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def text_metrics(processor: LLM2SLMProcessor, names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for a `Seq2SeqTrainer`: the scores of `names`, see `text_scores`, and the mean length in tokens."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        texts, references = (decode(processor, ids) for ids in (prediction.predictions, prediction.label_ids))
        scores = text_scores(texts, references)
        padding = (-100, processor.tokenizer.pad_token_id)
        lengths = [sum(token not in padding for token in row) for row in prediction.predictions.tolist()]
        return {name: round(scores[name], 4) for name in names} | {"gen_len": sum(lengths) / len(lengths)}

    return compute_metrics


# The steps of a run ------------------------------------------------------------------------------------------------------
def run_seq2seq(
    args: ModelArguments,
    data: DataArguments,
    training_args: Seq2SeqTrainingArguments,
    metrics: Sequence[str],
    **columns: Any,
) -> None:
    """Train, evaluate and predict, as asked for, with the plain `Seq2SeqTrainer`; results go to the output folder."""
    model, collator, rows = prepare(args, data, training_args, **columns)
    trainer = seq2seq_trainer(model, collator, rows, data, training_args, metrics)
    results: dict[str, dict[str, float]] = {}
    if training_args.do_train:
        results["train"] = train(trainer)
        trainer.save_model()
    if training_args.do_eval:
        results["eval"] = evaluate(trainer)
    if training_args.do_predict:
        if model.llm is None:
            load_llm_again(model, args, training_args.output_dir)
        results["predict"] = predict(trainer, rows["test"])
    if training_args.do_train:
        write_card(trainer, model, data, results)


class CardTrainer(LLM2SLMModelCardMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer`, whose pushes take our model card along."""


def seq2seq_trainer(
    model: LLM2SLMForConditionalGeneration,
    collator: LLM2SLMDataCollator,
    rows: Mapping[str, Dataset],
    data: DataArguments,
    training_args: Seq2SeqTrainingArguments,
    metrics: Sequence[str],
) -> CardTrainer:
    training_args.generation_num_beams = data.num_beams or training_args.generation_num_beams
    if training_args.generation_max_length is None:
        # An encoder-decoder SLM counts the token that it starts from.
        start = int(model.slm.config.is_encoder_decoder)
        training_args.generation_max_length = start + (data.max_response_length or DEFAULT_NEW_TOKENS)
    return CardTrainer(
        model=model,
        args=training_args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        data_collator=collator,
        processing_class=collator.processor,
        compute_metrics=text_metrics(collator.processor, metrics) if training_args.predict_with_generate else None,
    )


def train(trainer: Trainer) -> dict[str, float]:
    """Train, from the last checkpoint in the output folder if there is one, and save metrics and state."""
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint is None and Path(trainer.args.output_dir).is_dir():
        checkpoint = get_last_checkpoint(trainer.args.output_dir)
        if checkpoint is not None:
            logger.warning(f"Going on from {checkpoint}. To start anew, choose another --output_dir.")
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    # Counted here, as an adapter is merged later.
    metrics["trained_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.save_state()
    return save_metrics(trainer, "train", metrics)


def evaluate(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.evaluate(metric_key_prefix="eval")
    return save_metrics(trainer, "eval", metrics | {"eval_samples": len(trainer.eval_dataset)})


def predict(trainer: Seq2SeqTrainer, rows: Dataset) -> dict[str, float]:
    """Score `rows` and, with `--predict_with_generate`, write the texts to `generated_predictions.txt`, one on a line."""
    result = trainer.predict(rows, metric_key_prefix="predict")
    if trainer.args.predict_with_generate and trainer.is_world_process_zero():
        # Several processes fill their last batch up with rows from the front.
        texts = decode(trainer.processing_class, result.predictions)[: len(rows)]
        lines = "".join(" ".join(text.split()) + "\n" for text in texts)
        Path(trainer.args.output_dir, "generated_predictions.txt").write_text(lines, encoding="utf-8")
    return save_metrics(trainer, "predict", result.metrics | {"predict_samples": len(rows)})


def save_metrics(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics


def write_card(
    trainer: Trainer, model: LLM2SLMForConditionalGeneration, data: DataArguments, results: dict[str, dict[str, float]]
) -> None:
    """
    Record in the output folder what was measured, and write its model card; with `--push_to_hub` the folder goes to the
    Hub then. `model` is what the folder holds: that of the trainer, or what its adapter was merged into.
    """
    if not trainer.is_world_process_zero():
        return
    settings = trainer.args
    training = {
        "prompts": repr(f"{data.prompt_prefix}...{data.prompt_suffix}"),
        "parameters trained": results["train"]["trained_parameters"],
    }
    if getattr(data, "use_peft", False):
        training["LoRA"] = f"rank {data.lora_r} and scale {data.lora_alpha}, merged into the SLM"
    command = shareable_command(sys.argv)
    validation = data.source(data.validation_file, data.validation_split)
    records = trainer_state_records(trainer, data.name, training, validation, command)
    if "predict" in results:
        rows = {"rows": results["predict"]["predict_samples"]}
        test = data.source(data.test_file, data.test_split) | rows
        metrics = metrics_of(results["predict"], "predict")
        records.append({"kind": QUALITY, "data": test, "metrics": metrics, **provenance(command, "datasets")})
    for record in records:
        write_record(settings.output_dir, record)
    write_model_card(settings.output_dir, model, dataset=data.name)
    if settings.push_to_hub:
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=settings.output_dir,
            ignore_patterns=["checkpoint-*"],
            token=settings.hub_token,
        )
