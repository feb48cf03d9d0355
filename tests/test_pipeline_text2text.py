"""`pipeline("text2text-generation")`: the inputs and outputs of transformers 4, the model's own texts."""

from __future__ import annotations

import datasets
import pytest
import torch
from conftest import PROMPTS, Pair
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer, GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

TASK = "text2text-generation"
# True of any model that is prompted with embeddings, and meant so: the penalty is for the response.
pytestmark = pytest.mark.filterwarnings("ignore:Passing `.*` with `inputs_embeds` and without `input_ids`")
NEW_TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def checkpoints(zoo, tmp_path_factory):
    """Folders of a checkpoint with `one` tokenizer, an encoder-decoder SLM, and one with `two`, a decoder-only SLM."""
    folders = {}
    for name, pair in (("one", Pair("t5", "t5", "add")), ("two", Pair("llama", "llama", "align"))):
        folders[name] = str(tmp_path_factory.mktemp(name))
        for part in zoo.compose(pair):
            part.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module", params=["one", "two"])
def loaded(request, checkpoints):
    """A pipeline by path, and model and processor from the same folder."""
    path = checkpoints[request.param]
    return (
        pipeline(TASK, model=path, device="cpu"),
        AutoModel.from_pretrained(path),
        AutoProcessor.from_pretrained(path),
    )


def generate(model, processor, texts=PROMPTS, **kwargs):
    """Texts as `model.generate` and the SLM's tokenizer make them."""
    batch = processor(text=texts, padding=True, return_tensors="pt")
    return processor.batch_decode(model.generate(**batch, **(NEW_TOKENS | kwargs)), skip_special_tokens=True)


def in_dicts(texts):
    return [{"generated_text": text} for text in texts]


# Inputs --------------------------------------------------------------------------------------------------------------
class Texts(Dataset):
    def __len__(self):
        return len(PROMPTS)

    def __getitem__(self, index):
        return PROMPTS[index]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_inputs(loaded, batch_size):
    """String, list, generator and datasets give the model's texts, in the shapes of transformers 4, in any batches."""
    pipe, *parts = loaded
    expected = in_dicts(generate(*parts))
    assert len({row["generated_text"] for row in expected}) == 3
    arguments = NEW_TOKENS | {"batch_size": batch_size}
    assert pipe(PROMPTS[0], **arguments) == expected[:1]
    assert pipe(inputs=PROMPTS[0], **arguments) == expected[:1]
    assert pipe(PROMPTS[:1], **arguments) == expected[:1]
    assert pipe(PROMPTS, **arguments) == expected
    for stream in ((text for text in PROMPTS), Texts(), KeyDataset([{"text": text} for text in PROMPTS], "text")):
        assert list(pipe(stream, **arguments)) == [[row] for row in expected]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_columns_and_conversations(loaded, batch_size):
    """A column of a data set is a list of prompts; a conversation is one prompt, by the chat template."""
    pipe, *parts = loaded
    arguments = NEW_TOKENS | {"batch_size": batch_size}
    column = datasets.Dataset.from_dict({"prompt": PROMPTS})["prompt"]
    assert pipe(column, **arguments) == pipe(tuple(PROMPTS), **arguments) == in_dicts(generate(*parts))
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    template, pipe.processor.chat_template = (
        pipe.processor.chat_template,
        "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}",
    )
    try:
        model, expected = pipe.model, []
        for chat in chats:
            batch = pipe.processor(chat, return_tensors="pt")
            expected += in_dicts(
                pipe.processor.batch_decode(model.generate(**batch, **NEW_TOKENS), skip_special_tokens=True)
            )
        assert pipe(chats[0], **arguments) == expected[:1]
        assert pipe(chats, **arguments) == expected
    finally:
        pipe.processor.chat_template = template


def test_several_sequences(loaded):
    """With `num_return_sequences` each prompt has a list, one string a flat one; in batches too."""
    pipe, *parts = loaded
    beams = {"num_beams": 3, "num_return_sequences": 2}
    texts = generate(*parts, **beams)
    expected = [in_dicts(texts[row : row + 2]) for row in (0, 2, 4)]
    assert any(first != second for first, second in expected)
    for batch_size in (1, 3):
        assert pipe(PROMPTS, **beams, **NEW_TOKENS, batch_size=batch_size) == expected
    assert pipe(PROMPTS[1], **beams, **NEW_TOKENS) == expected[1]
    assert list(pipe(Texts(), **beams, **NEW_TOKENS)) == expected


# Arguments -----------------------------------------------------------------------------------------------------------
def test_generation_arguments(loaded, checkpoints):
    """Arguments reach `generate` from the call, from the construction and from a `GenerationConfig`."""
    pipe, model, processor = loaded
    beams = {"num_beams": 4, "no_repeat_ngram_size": 1}
    expected = in_dicts(generate(model, processor, **beams))
    assert expected != in_dicts(generate(model, processor))
    assert pipe(PROMPTS, **beams, **NEW_TOKENS) == expected
    assert pipe(PROMPTS, generation_config=GenerationConfig(**beams, **NEW_TOKENS)) == expected
    made = pipeline(TASK, model=model, processor=processor, device="cpu", **beams, **NEW_TOKENS)
    assert made(PROMPTS) == expected
    assert made(PROMPTS, num_beams=1, no_repeat_ngram_size=0) == in_dicts(generate(model, processor))

    torch.manual_seed(0)
    sampled = generate(model, processor, PROMPTS[:1], do_sample=True)
    torch.manual_seed(0)
    assert pipe(PROMPTS[0], do_sample=True, **NEW_TOKENS) == in_dicts(sampled)  # a list's data loader draws too
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['max_new_token'\]"):
        pipe(PROMPTS[0], max_new_token=3)


def test_return_tensors(loaded):
    """`return_tensors` gives token ids in place of text, as `generate` returns them."""
    pipe, model, processor = loaded
    ids = model.generate(**processor(text=PROMPTS[0], return_tensors="pt"), **NEW_TOKENS)
    (output,) = pipe(PROMPTS[0], return_tensors=True, **NEW_TOKENS)
    assert list(output) == ["generated_token_ids"] and torch.equal(output["generated_token_ids"], ids[0])
    outputs = pipe(PROMPTS, return_tensors=True, **NEW_TOKENS)
    assert [len(output["generated_token_ids"]) for output in outputs] == [ids.shape[1]] * 3
    assert pipe(PROMPTS[0], return_tensors=False, **NEW_TOKENS) == pipe(PROMPTS[0], return_text=True, **NEW_TOKENS)


def test_default_length(checkpoints):
    """Without arguments a response has up to 256 tokens, as in transformers 4."""
    pipe = pipeline(TASK, model=checkpoints["one"], device="cpu")
    (output,) = pipe("Hello there!", return_tensors=True, suppress_tokens=[2])
    assert output["generated_token_ids"].shape == (257,)  # with the token that it starts from


def test_stop_sequence(loaded):
    """Writing stops at the string, which may be more than one token."""
    pipe, model, processor = loaded
    letters = {token for char in "abcdefghijklmnopqrstuvwxyz" for token in processor.tokenizer(char)["input_ids"][:1]}
    only_letters = [token for token in range(len(processor.tokenizer)) if token not in letters]
    arguments = {"suppress_tokens": only_letters, "repetition_penalty": 3.0, "max_new_tokens": 12}
    ((whole),) = pipe(PROMPTS[0], **arguments)
    text = whole["generated_text"]
    stop = text[4:6]
    assert len(text) == 12 and len(processor.tokenizer(stop, add_special_tokens=False)["input_ids"]) >= 1
    expected = text[: text.index(stop) + 2]
    assert pipe(PROMPTS[0], stop_sequence=stop, **arguments) == in_dicts([expected])
    assert pipe(PROMPTS[0], **arguments) == [whole]  # and only where asked for


def test_truncation(checkpoints):
    """A prompt that is too long is refused, and cut with `truncation=True`."""
    pipe = pipeline(TASK, model=checkpoints["two"], device="cpu")
    long = "word " * 200
    with pytest.raises(ValueError, match=r"Prompt 0 is \d+ tokens long, but these models take at most 128"):
        pipe(long)
    batch = pipe.processor(text=[long], truncation=True, return_tensors="pt")
    expected = pipe.processor.batch_decode(pipe.model.generate(**batch, **NEW_TOKENS), skip_special_tokens=True)
    assert pipe(long, truncation=True, **NEW_TOKENS) == in_dicts(expected)
    made = pipeline(TASK, model=checkpoints["two"], device="cpu", truncation=True)
    assert made([long, long], batch_size=2, **NEW_TOKENS) == in_dicts(expected * 2)


@pytest.mark.parametrize(
    ("inputs", "error"), [(["Hello", " "], r"Prompt 0 is empty"), ([3], r"takes strings, got int: 3")]
)
def test_bad_inputs(loaded, inputs, error):
    with pytest.raises(ValueError, match=error):
        loaded[0](inputs, max_new_tokens=2)


# Parts ---------------------------------------------------------------------------------------------------------------
def test_parts(checkpoints, zoo):
    """A model object brings the processor of its folder; one in memory is given it, or its tokenizer."""
    for path in checkpoints.values():
        model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
        expected = in_dicts(generate(model, processor))
        assert pipeline(TASK, model=model, device="cpu")(PROMPTS, **NEW_TOKENS) == expected
        by_path = pipeline(TASK, model=model, processor=path, device="cpu")
        assert by_path.tokenizer is by_path.processor.tokenizer
        assert by_path(PROMPTS, **NEW_TOKENS) == expected
        local = pipeline(TASK, model=path, device="cpu", local_files_only=True)
        assert local(PROMPTS, **NEW_TOKENS) == expected

    model, processor = zoo.compose(Pair("t5", "t5", "add"))
    expected = in_dicts(generate(model, processor))
    for parts in ({"processor": processor}, {"tokenizer": processor.tokenizer}):
        assert pipeline(TASK, model=model, device="cpu", **parts)(PROMPTS, **NEW_TOKENS, batch_size=3) == expected
    with pytest.raises(
        ValueError, match=r"composed in memory and names no processor. Pass it: `pipeline\(.*processor="
    ):
        pipeline(TASK, model=model)


def test_one_tokenizer_of_two(checkpoints, zoo, tmp_path):
    """The SLM's tokenizer never serves the LLM: its folder's processor does, or there is an error."""
    model, processor = (auto.from_pretrained(checkpoints["two"]) for auto in (AutoModel, AutoProcessor))
    pipe = pipeline(TASK, model=model, tokenizer=processor.tokenizer, device="cpu")
    assert pipe(PROMPTS, **NEW_TOKENS) == in_dicts(generate(model, processor))

    model, processor = zoo.compose(Pair("t5", "phi3", "replace"))
    with pytest.raises(ValueError, match=r"composed in memory and names no processor"):
        pipeline(TASK, model=model, tokenizer=processor.tokenizer, device="cpu")
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)  # as SFTTrainer does, which knows only the one
    with pytest.raises(ValueError, match=r"has no `processor_config.json` of an LLM2SLMProcessor"):
        pipeline(TASK, model=str(tmp_path), device="cpu")
    processor.save_pretrained(tmp_path)
    expected = in_dicts(generate(model, processor))
    assert pipeline(TASK, model=str(tmp_path), device="cpu")(PROMPTS, **NEW_TOKENS) == expected


def test_plain_seq2seq(zoo):
    """The task serves any model of `AutoModelForSeq2SeqLM`, such as a T5."""
    path = zoo.checkpoint("t5", "bpe", "slm")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    expected = in_dicts(tokenizer.batch_decode(model.generate(**batch, **NEW_TOKENS), skip_special_tokens=True))
    assert pipeline(TASK, model=path, device="cpu")(PROMPTS, **NEW_TOKENS) == expected
    pipe = pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu")
    assert pipe(PROMPTS, batch_size=3, **NEW_TOKENS) == expected
    cut = tokenizer.decode(model.generate(torch.tensor([[4, 5, 2]]), **NEW_TOKENS)[0], skip_special_tokens=True)
    tokenizer.model_max_length = 3
    long = tokenizer.decode([4, 5, 6, 7])
    assert pipe(long, truncation=True, **NEW_TOKENS) == in_dicts([cut])
    with pytest.raises(ValueError, match=r"needs a tokenizer or a processor: pass `tokenizer=`"):
        pipeline(TASK, model=model)


def test_save_pretrained(loaded, tmp_path):
    """A saved pipeline is a checkpoint like any other: no code in it, and it loads without `trust_remote_code`."""
    pipe, *parts = loaded
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("**/*.py")) and not hasattr(pipe.model.config, "custom_pipelines")
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert again(PROMPTS, **NEW_TOKENS) == in_dicts(generate(*parts))


@pytest.mark.parametrize("task", ["summarization", "translation", "translation_en_to_fr", "question-answering"])
def test_other_removed_tasks(checkpoints, task):
    """Only this task is given back."""
    with pytest.raises(KeyError, match=f"The task {task} has been removed from transformers"):
        pipeline(task, model=checkpoints["one"])
