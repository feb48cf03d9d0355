"""Distillation: the divergence against one computed row by row, by hand, and what a trainer makes of it."""

from __future__ import annotations

import copy

import pytest
import test_trainer
import torch
from conftest import VOCAB_SIZE, Pair
from datasets import Dataset
from test_trainer import ROWS, without_dropout
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import ModelOutput
from trl import SFTConfig, SFTTrainer

from transformers_llm2slm import (
    LLM2SLMDataCollator,
    LLM2SLMForConditionalGeneration,
    LLM2SLMProcessor,
    prepare_sft_config,
)
from transformers_llm2slm.distillation import LogitDistillationMixin, response_logits

# A teacher of each kind, with an SLM of each kind.
PAIRS = [
    Pair("llama", "t5", "add"),
    Pair("gpt2", "llama", "add"),
    Pair("t5", "gpt2", "add"),
    Pair("bart", "bart", "add"),
]


class DistillationTrainer(LogitDistillationMixin, Trainer):
    pass


class DistillationSeq2SeqTrainer(LogitDistillationMixin, Seq2SeqTrainer):
    pass


def compose(zoo, pair):
    """Teacher, model and processor; the model's LLM is the teacher's reading part, in the same memory."""
    llm, slm = zoo.sources(pair)
    auto = AutoModelForSeq2SeqLM if pair.llm in ("t5", "bart") else AutoModelForCausalLM
    teacher = auto.from_pretrained(llm)
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(teacher, slm, fusion=pair.fusion)
    return teacher, without_dropout(model), LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, fusion=pair.fusion)


@pytest.fixture(params=PAIRS, ids=str)
def parts(request, zoo):
    return compose(zoo, request.param)


@pytest.fixture
def some_parts(zoo):
    return compose(zoo, PAIRS[0])


def make_trainer(cls, model, processor, output_dir, rows=ROWS, distillation=None, processing_class=None, **settings):
    more = (distillation or {}) | ({} if processing_class is None else {"processing_class": processing_class})
    return test_trainer.make_trainer(
        model, processor, output_dir, cls=cls, rows=rows, eval_rows=rows, more=more, **settings
    )


def history(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def scores_by_hand(teacher, processor, row):
    """The teacher's logits for one row alone: no padding, no shifting by anything but the eye."""
    prompt = processor.llm_tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
    response = processor(text_target=[row["completion"]], return_tensors="pt")["labels"]
    with torch.no_grad():
        if teacher.config.is_encoder_decoder:
            start = torch.tensor([[teacher.config.decoder_start_token_id]])
            decoder_input_ids = torch.cat([start, response[:, :-1]], dim=1)
            return teacher(input_ids=prompt, decoder_input_ids=decoder_input_ids).logits[0]
        return teacher(input_ids=torch.cat([prompt, response], dim=1)).logits[0, prompt.shape[1] - 1 : -1]


def divergence_by_hand(teacher, model, processor, rows, temperature):
    """temperature^2 * KL(teacher || student), each token's from the definition, and the number of tokens."""
    total, count = 0.0, 0
    for row in rows:
        batch = processor(text=[row["prompt"]], text_target=[row["completion"]], return_tensors="pt")
        with torch.no_grad():
            found = (model(**batch).logits[0] / temperature).softmax(-1)
        expected = (scores_by_hand(teacher, processor, row) / temperature).softmax(-1)
        size = len(processor.tokenizer)
        found, expected = (p[:, :size] / p[:, :size].sum(-1, keepdim=True) for p in (found, expected))
        total += temperature**2 * (expected * (expected / found).log()).sum().item()
        count += len(expected)
    return total, count


# The loss ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_response_logits(parts, padding_side):
    """In a batch, whatever its padding, every response's tokens get the logits that they get alone."""
    teacher, _, processor = parts
    processor.llm_tokenizer.padding_side = padding_side
    batch = LLM2SLMDataCollator(processor)(ROWS)
    assert bool(batch["attention_mask"][1, 0]) == (padding_side == "right")
    logits = response_logits(teacher, batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert logits.shape == (*batch["labels"].shape, VOCAB_SIZE) and not logits.requires_grad
    for row, found, labels in zip(ROWS, logits, batch["labels"], strict=True):
        expected = scores_by_hand(teacher, processor, row)
        assert len(expected) == (labels != -100).sum()
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("temperature", "weight"), [(2.0, 0.5), (5.0, 1.0)])
def test_loss_by_hand(parts, tmp_path, temperature, weight):
    teacher, model, processor = parts
    total, count = divergence_by_hand(teacher, model.eval(), processor, ROWS, temperature)
    distillation = {"teacher": teacher, "distillation_temperature": temperature, "distillation_weight": weight}
    trainer = make_trainer(DistillationTrainer, model, processor, tmp_path, distillation=distillation, max_steps=1)
    plain = trainer.evaluate()["eval_loss"]
    assert plain == pytest.approx(model(**LLM2SLMDataCollator(processor)(ROWS)).loss.item(), rel=1e-5)
    trainer.train()
    assert history(trainer) == pytest.approx([(1 - weight) * plain + weight * total / count], rel=1e-4)
    assert history(trainer, "distillation_loss") == pytest.approx([total / count], rel=1e-4)
    assert total / count > 0.1


def test_matrices_of_different_widths(some_parts, tmp_path):
    """Rows beyond the tokenizer's tokens take no part, whatever they score."""
    teacher, model, processor = some_parts
    expected, count = divergence_by_hand(teacher, model.eval(), processor, ROWS, 2.0)
    size = len(processor.tokenizer)
    padded = copy.deepcopy(teacher)
    padded.resize_token_embeddings(size + 64)
    padded.get_output_embeddings().weight.data[size:] = padded.get_output_embeddings().weight.data[3] * 10
    trainer = make_trainer(
        DistillationTrainer, model, processor, tmp_path, distillation={"teacher": padded}, max_steps=1
    )
    trainer.train()
    assert history(trainer, "distillation_loss") == pytest.approx([expected / count], rel=1e-4)


def test_weight_zero_is_the_plain_trainer(some_parts, tmp_path):
    teacher, model, processor = some_parts
    other = copy.deepcopy(model)
    plain = make_trainer(Seq2SeqTrainer, model, processor, tmp_path, max_steps=4)
    plain.train()
    distillation = {"teacher": teacher, "distillation_weight": 0.0}
    trainer = make_trainer(
        DistillationSeq2SeqTrainer, other, processor, tmp_path, distillation=distillation, max_steps=4
    )
    trainer.train()
    assert history(trainer) == history(plain) and len(history(plain)) == 4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize(
    ("pair", "settings"),
    [*((pair, {}) for pair in PAIRS), (PAIRS[1], {"label_smoothing_factor": 0.1})],
    ids=[*map(str, PAIRS), "label smoothing"],
)
def test_gradient_accumulation_is_the_big_batch(zoo, pair, settings, tmp_path):
    """Responses of very different lengths in small batches weigh as in one, in both parts of the loss."""
    teacher, model, processor = compose(zoo, pair)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = []
    for batch_size in (4, 1):
        model.load_state_dict(state, strict=False)
        trainer = make_trainer(
            DistillationTrainer,
            model,
            processor,
            tmp_path,
            distillation={"teacher": teacher},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            learning_rate=1e-3,
            max_steps=3,
            **settings,
        )
        trainer.train()
        results.append(
            (history(trainer), history(trainer, "distillation_loss"), model.projector.layers[-1].weight.clone())
        )
    assert results[0][1][-1] < results[0][1][0]
    for first, second in zip(*[result[:2] for result in results], strict=True):
        assert second == pytest.approx(first, rel=1e-4)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0, atol=1e-4)


def test_batches_are_averaged_where_the_model_does_so(some_parts, tmp_path):
    """Without `num_items_in_batch`, each small batch is its own mean, and the step the mean of these."""
    teacher, model, processor = some_parts
    by_hand = [divergence_by_hand(teacher, model.eval(), processor, [row], 2.0) for row in ROWS]
    trainer = make_trainer(
        DistillationTrainer,
        model,
        processor,
        tmp_path,
        distillation={"teacher": teacher, "distillation_weight": 1.0},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert history(trainer) == pytest.approx([sum(total / count for total, count in by_hand) / 4], rel=1e-4)


def test_cached_states(some_parts, tmp_path):
    """A student that trains on the LLM's cached states is taught the same: the teacher reads the prompt's tokens."""
    teacher, model, processor = some_parts
    trainer = make_trainer(DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher})
    batch = LLM2SLMDataCollator(processor)(ROWS)
    expected = trainer.compute_loss(model.train(), dict(batch))
    states = model.model.llm_states(batch["input_ids"], batch["attention_mask"])
    model.model.attach_llm(None)
    found = trainer.compute_loss(model, batch | {"llm_hidden_states": states})
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_of_several_processes(some_parts, tmp_path, monkeypatch):
    """Of twice as many tokens in two processes, each gives twice its share, as the gradients are averaged over them."""
    teacher, model, processor = some_parts
    distillation = {"teacher": teacher, "distillation_weight": 1.0}
    trainer = make_trainer(DistillationTrainer, model, processor, tmp_path, distillation=distillation)
    batch = LLM2SLMDataCollator(processor)(ROWS)
    model.train()
    alone = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(30))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    together = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(60))
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)
    trainer.args.average_tokens_across_devices = False
    assert trainer.compute_loss(model, dict(batch), num_items_in_batch=30).item() == pytest.approx(
        alone.item(), rel=1e-6
    )


# Training ----------------------------------------------------------------------------------------------------------------
def test_student_learns_the_teacher(zoo, tmp_path):
    """With the SLM cut from the whole LLM, the divergence starts high and goes to nothing."""
    folder = zoo.checkpoint("llama", "bpe", "llm")
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(teacher, slm_layers=3, projector_init="random")
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(folder)
    trainer = make_trainer(
        DistillationTrainer,
        model,
        processor,
        tmp_path,
        distillation={"teacher": teacher, "distillation_weight": 1.0},
        learning_rate=5e-3,
        max_steps=80,
    )
    trainer.train()
    divergences = history(trainer, "distillation_loss")
    assert divergences == pytest.approx(history(trainer), rel=1e-3)
    assert divergences[0] > 0.1 and divergences[-1] < 0.02 * divergences[0]


def test_teacher_shares_the_memory_of_the_llm(parts, tmp_path):
    """Composed of the teacher, the model's LLM is the teacher's own weights, before and after training, which is frozen."""
    teacher, model, processor = parts
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = make_trainer(
        DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher}, max_steps=2
    )
    trainer.train()
    storages = {parameter.data_ptr() for parameter in trainer.teacher.parameters()}
    assert all(parameter.data_ptr() in storages for parameter in model.llm.parameters())
    assert not trainer.teacher.training
    for name, tensor in trainer.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]) and not tensor.requires_grad, name
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())


# Errors ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        ({"distillation_temperature": 0.0}, "`distillation_temperature` must be above 0, got 0.0."),
        ({"distillation_weight": 1.5}, r"`distillation_weight` must lie in \[0, 1\], got 1.5."),
    ],
)
def test_settings_out_of_range(some_parts, tmp_path, distillation, message):
    teacher, model, processor = some_parts
    with pytest.raises(ValueError, match=message):
        make_trainer(DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher} | distillation)


def test_two_tokenizers(zoo, tmp_path):
    teacher, model, processor = compose(zoo, Pair("llama", "llama", "align"))
    message = (
        "must have one tokenizer; the processor has .* tokens for the LLM and 320 others for the SLM. Use an SLM of"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher})


def test_widths_without_a_processor(some_parts, tmp_path):
    teacher, model, processor = some_parts
    tokenizer = processor.tokenizer
    make_trainer(
        DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher}, processing_class=tokenizer
    )
    other = copy.deepcopy(teacher)
    other.resize_token_embeddings(VOCAB_SIZE + 8)
    with pytest.raises(
        ValueError, match="The teacher scores 328 tokens and the SLM 320, and without an LLM2SLMProcessor"
    ):
        make_trainer(
            DistillationTrainer,
            model,
            processor,
            tmp_path,
            distillation={"teacher": other},
            processing_class=tokenizer,
        )
    other.resize_token_embeddings(VOCAB_SIZE - 8)
    with pytest.raises(ValueError, match="The tokenizer has 320 tokens, but the teacher scores 312 and the SLM 320"):
        make_trainer(DistillationTrainer, model, processor, tmp_path, distillation={"teacher": other})


def test_models_that_cannot_take_part(some_parts, tmp_path):
    teacher, model, processor = some_parts
    with pytest.raises(ValueError, match="a LlamaModel has no LM head. Load the LLM with `AutoModelForCausalLM`"):
        make_trainer(DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher.model})
    with pytest.raises(TypeError, match="must be an LLM2SLMForConditionalGeneration, got T5ForConditionalGeneration"):
        make_trainer(DistillationTrainer, model.slm, processor, tmp_path, distillation={"teacher": teacher})


def test_several_gpus_in_one_process(some_parts, tmp_path, monkeypatch):
    teacher, model, processor = some_parts
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="One process has 2 GPUs.*Start one process for each GPU"):
        make_trainer(DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher})


# TRL 1.16 turns on by its old name what transformers 5.23 calls otherwise, and runs the model once more, without
# gradients, when it is asked for logits.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning", "ignore:`return_outputs:FutureWarning")
def test_sft_trainer_gives_logits_without_gradients(some_parts, tmp_path):
    teacher, model, processor = some_parts

    class DistillationSFTTrainer(LogitDistillationMixin, SFTTrainer):
        pass

    arguments = SFTConfig(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, bf16=False)
    trainer = DistillationSFTTrainer(
        model,
        prepare_sft_config(arguments, model),
        train_dataset=Dataset.from_list(ROWS),
        data_collator=LLM2SLMDataCollator(processor),
        processing_class=processor,
        teacher=teacher,
    )
    message = "logits with their gradients, but this trainer gives LLM2SLMOutput without them, as TRL's SFTTrainer does.*Use `Trainer` or `Seq2SeqTrainer`"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_trainer_that_gives_no_logits(some_parts, tmp_path):
    teacher, model, processor = some_parts

    class LossTrainer(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)[0]
            return loss, ModelOutput(loss=loss)

    class LossDistillationTrainer(LogitDistillationMixin, LossTrainer):
        pass

    trainer = make_trainer(LossDistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher})
    with pytest.raises(ValueError, match="logits with their gradients, but this trainer gives ModelOutput without"):
        trainer.train()


def test_batches_the_teacher_cannot_read(some_parts, tmp_path):
    teacher, model, processor = some_parts
    trainer = make_trainer(DistillationTrainer, model, processor, tmp_path, distillation={"teacher": teacher})
    batch = LLM2SLMDataCollator(processor)(ROWS)
    states = model.model.llm_states(batch["input_ids"], batch["attention_mask"])
    cached = {"llm_hidden_states": states, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    model.config.fusion = "replace"  # the one that reads no tokens
    with pytest.raises(
        ValueError, match="reads the prompt's `input_ids`, but the batch holds only attention_mask, labels"
    ):
        trainer.compute_loss(model.train(), cached)
    long = torch.ones(1, 120, dtype=torch.long)
    with pytest.raises(ValueError, match=r"together are 129 tokens long.*LlamaForCausalLM\) takes at most 128"):
        response_logits(teacher, long, None, torch.ones(1, 10, dtype=torch.long))
