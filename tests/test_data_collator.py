"""The collator: rows of prompt and completion to the batch that the processor makes."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair

from transformers_llm2slm import LLM2SLMDataCollator, LLM2SLMProcessor

ROWS = [{"prompt": p, "completion": c, "id": i} for i, (p, c) in enumerate(zip(PROMPTS, RESPONSES, strict=True))]


@pytest.fixture
def processor(zoo) -> LLM2SLMProcessor:
    return LLM2SLMProcessor.from_llm_slm_pretrained(*zoo.sources(Pair("llama", "llama", "align")))


def assert_same(batch, expected):
    expected = dict(expected) | {"shift_labels": expected["labels"]}
    expected["decoder_input_ids"] = expected["labels"][:, :-1].clamp(min=0)  # the tokenizer pads with token 0
    assert set(batch) == set(expected)
    for name, column in batch.items():
        assert torch.equal(column, expected[name]), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_the_processors(processor, side):
    processor.tokenizer.padding_side = processor.llm_tokenizer.padding_side = side
    batch = LLM2SLMDataCollator(processor)(ROWS)
    assert type(batch) is dict
    assert_same(batch, processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt"))
    assert (batch["labels"] == -100).any() and (batch["attention_mask"] == 0).any()


def test_end_token_is_scored_where_it_pads(processor):
    """Padding is told by length: with `pad_token = eos_token` each row still has one end token to score."""
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    labels = LLM2SLMDataCollator(processor)(ROWS)["labels"]
    assert (labels == processor.tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1, 1]


def test_lengths(processor):
    """Prompts and completions are cut to their lengths, completions with their end token; by default to the models'."""
    batch = LLM2SLMDataCollator(processor, max_prompt_length=8, max_response_length=4)(ROWS)
    cut = {"padding": True, "truncation": True, "max_length": 8, "max_target_length": 4, "return_tensors": "pt"}
    assert_same(batch, processor(text=PROMPTS, text_target=RESPONSES, **cut))
    assert batch["input_ids"].shape == (3, 8) and batch["labels"].shape == (3, 4)
    assert [row[row != -100][-1].item() for row in batch["labels"]] == [processor.tokenizer.eos_token_id] * 3
    long = [{"prompt": "word " * 300, "completion": "word " * 300}]
    batch = LLM2SLMDataCollator(processor)(long)
    assert batch["input_ids"].shape == batch["slm_input_ids"].shape == (1, 128)
    assert batch["labels"].shape[1] == len(processor.tokenizer("word " * 300)["input_ids"])


def test_static_shapes(processor):
    """`pad_to_max_length` gives every batch one shape, in both token views, whatever the rows."""
    collator = LLM2SLMDataCollator(processor, max_prompt_length=10, max_response_length=6, pad_to_max_length=True)
    emoji = [{"prompt": "🙂" * 30, "completion": "漢字" * 9}, *ROWS[:2]]  # few LLM tokens, many SLM tokens
    shapes = [{name: tuple(column.shape) for name, column in collator(rows).items()} for rows in (ROWS, emoji)]
    prompt = ("input_ids", "attention_mask", "slm_input_ids", "slm_attention_mask", "alignment")
    response = {"labels": (3, 6), "shift_labels": (3, 6), "decoder_input_ids": (3, 5)}
    assert shapes == [dict.fromkeys(prompt, (3, 10)) | response] * 2


@pytest.mark.parametrize("form", ["list", "tensor"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_tokenized_before(processor, side, form):
    """What the processor made of each row, as `datasets` keeps it, comes to the batch that the text comes to."""
    processor.tokenizer.padding_side = processor.llm_tokenizer.padding_side = side
    rows = [dict(processor(text=row["prompt"], text_target=row["completion"])) | row for row in ROWS]
    if form == "tensor":
        rows = [{n: torch.tensor(v) if isinstance(v, list) else v for n, v in row.items()} for row in rows]
    for static in (False, True):
        lengths = {"max_prompt_length": 64, "max_response_length": 30, "pad_to_max_length": static}
        collator = LLM2SLMDataCollator(processor, **lengths)
        batch, expected = collator(rows), collator(ROWS)
        assert set(batch) == set(expected)
        assert [name for name in batch if not torch.equal(batch[name], expected[name])] == []


def test_bad_tokenized_rows(processor):
    rows = [dict(processor(text=p, text_target=r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    collator = LLM2SLMDataCollator(processor)
    for name in ("labels", "alignment"):
        lacking = [rows[0], {column: value for column, value in rows[1].items() if column != name}]
        with pytest.raises(ValueError, match=rf"Row 1 .*has no '{name}'; its columns are .*[Tt]okenize rows with"):
            collator(lacking)
    with pytest.raises(
        ValueError, match=r"A row of the batch has \d+ labels, and is to have 3 at most.* `processor\(..., trunc"
    ):
        LLM2SLMDataCollator(processor, max_response_length=3)(rows)
    for options, error in (({"padding": "shortest"}, "`padding` must be"), ({"return_tensors": "np"}, "`return_tens")):
        with pytest.raises(ValueError, match=error):
            processor.pad(rows, **options)
    rows = [row | {"input_ids": [1, 2]} for row in ROWS]  # of whomever: there are no labels
    assert_same(collator(rows), processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt"))
    with pytest.raises(ValueError, match=r"`text` must hold at least one text"):
        collator([])


def test_tokenized_rows_that_are_too_long(processor):
    rows = [dict(processor(text=p, text_target=r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with pytest.raises(ValueError, match=r"A row of the batch has \d+ slm_input_ids, and is to have 40 at most"):
        LLM2SLMDataCollator(processor, max_prompt_length=40, max_response_length=30, pad_to_max_length=True)(rows)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"prompt": "a", "response": "b"},
            r"Row 1 .* no text in column 'completion'; its columns are \['prompt', 'resp",
        ),
        ({"question": "a", "completion": "b"}, r"no text in column 'prompt'; its columns are \['completion', 'quest"),
        ({}, r"no text in column 'prompt'; its columns are \[\]\. .*`remove_unused_columns=False`"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, r"Row 1 .* has text and messages"),
        ({"prompt": ["a"], "completion": ["b"]}, r"no text in column 'prompt'"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, r"Row 1 .* no response to learn: .* roles user, user"),
        ({"prompt": " ", "completion": "b"}, r"Prompt 1 is empty"),
    ],
)
def test_bad_rows(processor, row, error):
    with pytest.raises(ValueError, match=error):
        LLM2SLMDataCollator(processor)([ROWS[0], row])


def test_bad_arguments(processor):
    with pytest.raises(TypeError, match=r"`processor` must be an LLM2SLMProcessor, got TokenizersBackend"):
        LLM2SLMDataCollator(processor.tokenizer)
    for lengths in ({}, {"max_prompt_length": 8}, {"max_response_length": 8}):
        with pytest.raises(ValueError, match=r"needs `max_prompt_length` and `max_response_length`"):
            LLM2SLMDataCollator(processor, pad_to_max_length=True, **lengths)
