"""Scores against numbers worked out by hand; texts and token counts against prompts generated one by one."""

from __future__ import annotations

import importlib.util
import itertools
import threading

import pytest
import torch
from conftest import PROMPTS
from transformers import GenerationConfig

from transformers_llm2slm.evaluation import (
    GeneratedTexts,
    _response_lengths,
    generate_batches,
    generate_texts,
    text_scores,
)

# Of several lengths, and in no order of length.
MANY = ["Hi there", PROMPTS[1], "One", PROMPTS[0] + " " + PROMPTS[1], "A house, a house!"]


# Scores --------------------------------------------------------------------------------------------------------------
def test_scores_of_equal_texts():
    texts = ["The house is wonderful today.", "A small model writes it quickly."]
    scores = text_scores(texts, [f" {text}\n" for text in texts])
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match"]
    assert scores == pytest.approx(dict.fromkeys(names, 100.0))


def test_rouge_is_the_mean_f_measure():
    # Row 1 has 2 of 3 words, 1 of 2 pairs and a common run of 2; row 2 has none.
    scores = text_scores(["the cat sat", "nothing"], ["the cat ran", "everything else"])
    assert scores["rouge1"] == pytest.approx(100 * (2 / 3) / 2)
    assert scores["rouge2"] == pytest.approx(100 * (1 / 2) / 2)
    assert scores["rougeL"] == pytest.approx(100 * (2 / 3) / 2)
    assert scores["exact_match"] == 0


def test_rouge_stems_and_takes_lines_as_sentences():
    assert text_scores(["houses"], ["house"])["rouge1"] == 100
    scores = text_scores(["one two\nthree four"], ["three four\none two"])
    assert scores["rougeL"] == pytest.approx(50)  # one common subsequence of the whole
    assert scores["rougeLsum"] == pytest.approx(100)  # one for each line


def test_bleu_is_that_of_predictions_against_references():
    """The prediction is half as long as the reference, and every part of it right: only brevity costs, exp(1 - 2)."""
    short, long = "a b c d e", "a b c d e f g h i j"
    assert text_scores([short], [long])["bleu"] == pytest.approx(100 * torch.tensor(-1.0).exp().item())
    assert text_scores([long], [short])["bleu"] < 60


def test_exact_match_counts_rows():
    assert text_scores(["yes ", "no", "maybe"], ["yes", "yes", "perhaps"])["exact_match"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a", "b"], ["a"])])
def test_scores_need_a_reference_for_each_prediction(predictions, references):
    found = rf"{len(predictions)} prediction\(s\) and {len(references)} reference\(s\)"
    with pytest.raises(ValueError, match=found):
        text_scores(predictions, references)


def test_scores_without_the_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find_spec(name))
    with pytest.raises(ImportError, match=r'needs sacrebleu, .*pip install "transformers-llm2slm\[eval\]"'):
        text_scores(["a"], ["a"])


# Texts ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["small", "small_causal"])
def pair(request):
    """A model with an encoder-decoder SLM, and one with a decoder-only SLM."""
    return request.getfixturevalue(request.param)


def reading_part(model):
    return model.llm.get_encoder() if model.llm.config.is_encoder_decoder else model.llm


def response(model, processor, prompt, **kwargs):
    """The tokens that the model writes for one prompt, without the start token of an encoder-decoder SLM."""
    row = model.generate(**processor(text=[prompt], return_tensors="pt"), **kwargs)[0].tolist()
    return row[1:] if model.slm.config.is_encoder_decoder else row


def ending(model, processor, **kwargs):
    """A token that ends some of the responses of `MANY` early, and the responses that it gives."""
    rows = [response(model, processor, prompt, **kwargs) for prompt in MANY]
    end = next(token for token in rows[1] if not all(token in row for row in rows))
    return end, [response(model, processor, prompt, eos_token_id=end, **kwargs) for prompt in MANY]


def test_texts_are_those_of_each_prompt_alone(pair):
    model, processor = pair
    end, rows = ending(model, processor, max_new_tokens=9)
    assert len({len(row) for row in rows}) > 1, "all responses are of one length: the test would prove little"
    generated = generate_texts(model, processor, MANY, batch_size=2, max_new_tokens=9, eos_token_id=end)
    assert generated.texts == [processor.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert generated.new_tokens == sum(map(len, rows))
    assert generated.seconds > 0
    assert generated.tokens_per_second == pytest.approx(generated.new_tokens / generated.seconds)


def test_batches_are_of_similar_length_and_read_once(pair):
    model, processor = pair
    shapes, steps = [], []
    handle = reading_part(model).register_forward_hook(
        lambda _, args, kwargs, out: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    generate_texts(model, processor, MANY, batch_size=2, max_new_tokens=3, progress=steps.append)
    handle.remove()
    lengths = sorted((len(ids) for ids in processor(text=MANY)["input_ids"]), reverse=True)
    assert shapes == [(2, lengths[0]), (2, lengths[2]), (1, lengths[4])]
    assert steps == [2, 2, 1]


@pytest.mark.parametrize("as_config", [False, True])
def test_several_texts_of_a_prompt(pair, as_config):
    """The texts of a prompt stand together, in the order of the prompts, and each prompt is read once for all of them."""
    model, processor = pair
    rows_read = []
    handle = reading_part(model).register_forward_pre_hook(
        lambda _, args, kwargs: rows_read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    beams = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 6}
    kwargs = {"generation_config": GenerationConfig(**beams)} if as_config else beams
    generated = generate_texts(model, processor, MANY, batch_size=2, **kwargs)
    handle.remove()
    assert rows_read == [2, 2, 1]
    expected = [model.generate(**processor(text=[prompt], return_tensors="pt"), **kwargs) for prompt in MANY]
    texts = [processor.batch_decode(sequences, skip_special_tokens=True) for sequences in expected]
    assert generated.texts == [text for three in texts for text in three]
    assert len(set(texts[0])) == 3
    lengths = [_response_lengths(model, sequences, kwargs) for sequences in expected]
    assert generated.new_tokens == sum(sum(three) for three in lengths)


def test_output_objects_and_beams(small):
    model, processor = small
    plain = generate_texts(model, processor, MANY[:2], max_new_tokens=5, num_beams=2)
    rich = generate_texts(model, processor, MANY[:2], max_new_tokens=5, num_beams=2, return_dict_in_generate=True)
    alone = response(model, processor, MANY[0], max_new_tokens=5, num_beams=2)
    assert plain.texts == rich.texts
    assert plain.texts[0] == processor.tokenizer.decode(alone, skip_special_tokens=True)


def test_stop_strings_end_a_text(small_causal):
    model, processor = small_causal
    whole = generate_texts(model, processor, [MANY[0]], max_new_tokens=12).texts[0]
    stop = whole[3:5]
    text = generate_texts(model, processor, [MANY[0]], max_new_tokens=12, stop_strings=[stop]).texts[0]
    assert stop in text and len(text) < len(whole)


def test_prompts_are_cut_or_refused(small_causal):
    model, processor = small_causal
    prompts = ["short", "word " * 200]
    cut = processor(text=[prompts[1]], truncation=True, max_length=7, return_tensors="pt")
    expected = processor.batch_decode(model.generate(**cut, max_new_tokens=4), skip_special_tokens=True)
    generated = generate_texts(model, processor, prompts, max_prompt_length=7, max_new_tokens=4)
    assert generated.texts[1] == expected[0]
    with pytest.raises(ValueError, match=r"Prompt 1 is \d+ tokens long"):
        generate_texts(model, processor, prompts, truncation=False, max_new_tokens=4)


def test_mode_is_as_before(small):
    """Dropout is off while generating, and what was in training mode is so again, after an error too."""
    model, processor = small
    model.train()
    modes = []
    model.slm.register_forward_pre_hook(lambda *_: modes.append(model.slm.training))
    generate_texts(model, processor, MANY[:1], max_new_tokens=2)
    assert modes and not any(modes) and model.slm.training
    with pytest.raises(ZeroDivisionError):
        generate_texts(model, processor, MANY[:1], max_new_tokens=2, progress=lambda count: 1 / 0)
    assert model.slm.training and not model.llm.training


@pytest.mark.parametrize(
    ("prompts", "kwargs", "text"),
    [
        ([], {}, "at least one text"),
        ("one", {}, "must be a list"),
        (["one"], {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (["a longer one", "two", "  "], {"batch_size": 1}, "Prompt 2 is empty"),
    ],
)
def test_what_can_not_be_generated(small, prompts, kwargs, text):
    model, processor = small
    with pytest.raises(ValueError, match=text):
        generate_texts(model, processor, prompts, max_new_tokens=2, **kwargs)


@pytest.mark.parametrize(
    ("rows", "kwargs", "expected"),
    [
        ([[5, 6, 2, 0], [5, 2, 0, 0], [5, 6, 7, 8]], {}, [3, 2, 4]),
        ([[5, 9, 2, 0], [5, 6, 2, 0]], {"eos_token_id": [9, 2]}, [2, 3]),
        ([[5, 6, 2, 2], [2, 2, 2, 2]], {"pad_token_id": 2}, [3, 1]),  # one token for both
        ([[5, 6, 0, 0], [5, 6, 0, 7]], {"eos_token_id": 9}, [2, 4]),  # ended by a stop string
    ],
)
def test_response_lengths(pair, rows, kwargs, expected):
    model, _ = pair
    sequences = torch.tensor(rows)
    if model.slm.config.is_encoder_decoder:
        sequences = torch.cat([torch.zeros_like(sequences[:, :1]), sequences], dim=1)
    assert _response_lengths(model, sequences, kwargs) == expected


def test_no_time_is_no_speed():
    assert GeneratedTexts([], 0.0, 0).tokens_per_second == 0


# Batches -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3, "num_return_sequences": 2}]
)
def test_overlapped_output_is_the_same(pair, arguments):
    model, processor = pair
    texts = []
    for overlap in (False, True):
        torch.manual_seed(0)
        generated = generate_texts(
            model, processor, MANY, batch_size=2, overlap=overlap, max_new_tokens=7, eos_token_id=None, **arguments
        )
        texts.append(generated.texts)
        assert generated.new_tokens == len(generated.texts) * 7
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_next_batch_is_read_while_one_is_written(pair):
    """The SLM's first step waits for the next batch to be read, which would be forever if that came later."""
    model, processor = pair
    reads, threads = [threading.Event() for _ in range(3)], []

    def note_read(*_):
        reads[len(threads)].set()
        threads.append(threading.current_thread())

    handle = reading_part(model).register_forward_pre_hook(note_read)
    batches = [processor(text=[prompt], return_tensors="pt") for prompt in MANY[:3]]
    written = []

    def wait_for_next(input_ids, scores):
        assert reads[min(len(written) + 1, 2)].wait(timeout=60), "the next batch is not read meanwhile"
        return scores

    for output in generate_batches(
        model, iter(batches), overlap=True, max_new_tokens=2, logits_processor=[wait_for_next]
    ):
        written.append(output)
    handle.remove()
    assert len(written) == len(threads) == 3
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread()


@pytest.mark.parametrize(("overlap", "ahead"), [(False, 0), (True, 1)])
def test_batches_are_taken_as_they_are_needed(small, overlap, ahead):
    """A stream without an end can be served: no more than one batch ahead of what is written."""
    model, processor = small
    taken = []

    def stream():
        for number in itertools.count():
            taken.append(number)
            yield processor(text=[MANY[number % 5]], return_tensors="pt")

    outputs = generate_batches(model, stream(), overlap=overlap, max_new_tokens=2)
    for number in range(3):
        next(outputs)
        assert number < len(taken) <= number + 1 + ahead
    outputs.close()  # waits for what is being read
    assert len(taken) == 3 + ahead


@pytest.mark.parametrize("overlap", [False, True])
def test_errors_of_reading_reach_the_caller(small, overlap):
    """What was read before is written before."""
    model, processor = small
    good = processor(text=MANY[:1], return_tensors="pt")
    empty = {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
    outputs = generate_batches(model, [good, empty], overlap=overlap, max_new_tokens=2)
    assert next(outputs).shape[0] == 1
    with pytest.raises(ValueError, match="The prompt is empty"):
        next(outputs)


def test_reading_thread_keeps_no_gradients(small, monkeypatch):
    model, processor = small
    prompts, generate = [], model.generate

    def note_prompt(prompt, **kwargs):
        prompts.append(prompt)
        return generate(prompt=prompt, **kwargs)

    monkeypatch.setattr(model, "generate", note_prompt)
    list(generate_batches(model, [processor(text=MANY[:1], return_tensors="pt")], overlap=True, max_new_tokens=2))
    assert model.projector.training is False and any(p.requires_grad for p in model.projector.parameters())
    assert [prompt.prompt_states.requires_grad for prompt in prompts] == [False]
