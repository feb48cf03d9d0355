"""The processor: every column's values, cutting, padding and labels, errors, and the way to disk and back."""

from __future__ import annotations

import copy
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair
from test_alignment import TEXTS, train_wordpiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizer
from transformers.utils import hub

from transformers_llm2slm import LLM2SLMConfig, LLM2SLMProcessor
from transformers_llm2slm.alignment import align_tokens

PAD, BOS, EOS = 0, 1, 2
COLUMNS = ["input_ids", "attention_mask"]
SLM_COLUMNS = ["slm_input_ids", "slm_attention_mask", "alignment"]


@pytest.fixture
def one(zoo) -> LLM2SLMProcessor:
    """One tokenizer, an encoder-decoder SLM."""
    return LLM2SLMProcessor.from_llm_slm_pretrained(*zoo.sources(Pair("t5", "t5", "add")))


@pytest.fixture
def two(zoo) -> LLM2SLMProcessor:
    """Two tokenizers, a decoder-only SLM, `fusion="align"`; both models take 128 tokens."""
    return LLM2SLMProcessor.from_llm_slm_pretrained(*zoo.sources(Pair("llama", "llama", "align")))


@pytest.fixture
def make(zoo):
    """Makes a processor of fresh copies of the tokenizers called `slm` and `llm`."""

    def make(slm="bpe", llm="unigram", fusion="align", **kwargs):
        tokenizers = [copy.deepcopy(zoo.tokenizers.get(part, part)) for part in (slm, llm)]
        return LLM2SLMProcessor(*tokenizers, fusion=fusion, **kwargs)

    return make


def set_template(tokenizer, template):
    """Make a tokenizer put special tokens around every text as `template` says, `$A` being the text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<pad>", PAD), ("<s>", BOS), ("</s>", EOS)]
    )


def lists(batch):
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


# Columns -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fusion", ["add", "replace", "llm-embed", "align"])
def test_columns(make, fusion):
    """Prompts in the LLM's tokens, for `align` in the SLM's too, each beside the LLM token of its characters."""
    processor = make(llm="bpe" if fusion == "add" else "unigram", fusion=fusion)
    batch = processor(text=PROMPTS, text_target=RESPONSES)
    llm = [processor.llm_tokenizer(prompt, return_offsets_mapping=True) for prompt in PROMPTS]
    slm = [processor.tokenizer(prompt, return_offsets_mapping=True) for prompt in PROMPTS]
    expected = {
        "input_ids": [row["input_ids"] for row in llm],
        "attention_mask": [[1] * len(row["input_ids"]) for row in llm],
        "labels": [processor.tokenizer(response)["input_ids"] for response in RESPONSES],
    }
    if fusion == "align":
        expected |= {
            "slm_input_ids": [row["input_ids"] for row in slm],
            "slm_attention_mask": [[1] * len(row["input_ids"]) for row in slm],
            "alignment": [
                align_tokens(s["offset_mapping"], r["offset_mapping"]) for s, r in zip(slm, llm, strict=True)
            ],
        }
    assert dict(batch) == expected
    assert {*processor.model_input_names, "labels"} == set(batch)
    assert all(row[-1] == EOS and row.count(EOS) == 1 for row in batch["labels"])


def test_one_text_or_many(two):
    """One text gives flat lists, or tensors with one row; prompts and responses may come alone."""
    alone, listed = two(text=PROMPTS[0], text_target=RESPONSES[0]), two(text=PROMPTS[:1], text_target=RESPONSES[:1])
    assert list(alone) == [*COLUMNS, *SLM_COLUMNS, "labels"]
    assert {name: [row] for name, row in alone.items()} == dict(listed)
    tensors = two(text=PROMPTS[0], text_target=RESPONSES[0], return_tensors="pt")
    assert lists(tensors) == dict(listed)
    assert {value.dtype for value in tensors.values()} == {torch.long}
    assert list(two(text=PROMPTS)) == [*COLUMNS, *SLM_COLUMNS]
    assert dict(two(text_target=RESPONSES)) == {"labels": two(text=PROMPTS, text_target=RESPONSES)["labels"]}
    bare = two(text=PROMPTS[0], add_special_tokens=False)
    assert bare["input_ids"] == alone["input_ids"][:-1] and bare["slm_input_ids"] == alone["slm_input_ids"][:-1]


# Padding -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slm_side", ["left", "right"])
@pytest.mark.parametrize("llm_side", ["left", "right"])
@pytest.mark.parametrize("padding", [True, "longest", "max_length"])
def test_padding(two, padding, llm_side, slm_side):
    """Rows are padded on their tokenizer's side, labels on the right, to the longest row or to the lengths asked for."""
    two.llm_tokenizer.padding_side, two.tokenizer.padding_side = llm_side, slm_side
    rows = two(text=PROMPTS, text_target=RESPONSES)
    batch = two(
        text=PROMPTS, text_target=RESPONSES, padding=padding, max_length=100, max_target_length=50, return_tensors="pt"
    )
    for name, padded in batch.items():
        longest = max(map(len, rows[name]))
        assert padded.shape == (3, longest if padding != "max_length" else 50 if name == "labels" else 100)
        left = name != "labels" and (slm_side if name in SLM_COLUMNS else llm_side) == "left"
        for padded_row, row in zip(padded.tolist(), rows[name], strict=True):
            filler = [-100 if name == "labels" else PAD] * (padded.shape[1] - len(row))
            assert padded_row == (filler + row if left else row + filler)
    without = two(text=PROMPTS, text_target=RESPONSES, padding=padding, max_length=100, max_target_length=50)
    assert dict(without) == lists(batch)


def test_padding_to_what_the_models_take(two):
    """`"max_length"` without a length is the models' limit; a limit of the SLM counts for its own columns."""
    two.slm_max_prompt_length = 120
    batch = two(text=PROMPTS, padding="max_length", return_tensors="pt")
    assert {name: value.shape[1] for name, value in batch.items()} == {
        **dict.fromkeys(COLUMNS, 128),
        **dict.fromkeys(SLM_COLUMNS, 120),
    }


def test_no_padding(two):
    """Rows of one length make a tensor without padding; others are refused."""
    two(text=PROMPTS[:1] * 2, text_target=RESPONSES[:1] * 2, return_tensors="pt")
    with pytest.raises(ValueError, match=r"Rows of unequal length make no tensor: pass `padding=True`"):
        two(text=PROMPTS, return_tensors="pt")


# Truncation ----------------------------------------------------------------------------------------------------------
def characters(tokenizer, ids, text):
    """The characters of `text` that tokens cover, by cutting it at every place until its tokens are these."""
    length = len(tokenizer(text)["input_ids"])
    spans = [span for span in tokenizer(text, return_offsets_mapping=True)["offset_mapping"] if span[1] > span[0]]
    kept = len(ids) - (length - len(spans))  # a cut text keeps its special tokens
    spans = spans[-kept:] if tokenizer.truncation_side == "left" else spans[:kept]
    return spans[0][0], spans[-1][1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", [*PROMPTS[:2], *TEXTS.values()], ids=["first", "second", *TEXTS])
def test_truncation_to_the_llm(two, text, side):
    """The LLM's tokens are cut to their length; the SLM gets the same characters, and both keep their end token."""
    two.llm_tokenizer.truncation_side = side
    whole, batch = two(text=text), two(text=text, truncation=True, max_length=5)
    if len(whole["input_ids"]) <= 5:  # a text of few unknown tokens
        assert dict(batch) == dict(whole)
        return
    assert batch["input_ids"] == two.llm_tokenizer(text, truncation=True, max_length=5)["input_ids"]
    assert len(batch["input_ids"]) == 5 and batch["input_ids"][-1] == EOS
    start, end = characters(two.llm_tokenizer, batch["input_ids"], text)
    start, end = (start, len(text)) if side == "left" else (0, end)
    slm = two.tokenizer(text[start:end], return_offsets_mapping=True)
    assert batch["slm_input_ids"] == slm["input_ids"] and batch["slm_input_ids"][-1] == EOS
    assert two.tokenizer.decode(batch["slm_input_ids"], skip_special_tokens=True) == text[start:end]
    # The alignment is that of the LLM's remaining tokens: in range, in order, from the first to the last.
    assert batch["alignment"] == sorted(batch["alignment"]) and batch["alignment"][-1] == 4
    assert batch["alignment"][0] <= 1


def test_truncation_to_the_slm(two):
    """Where the SLM takes less than the LLM has read, only its own columns are cut, and stay aligned."""
    whole = two(text=PROMPTS[0])
    two.slm_max_prompt_length = 9
    batch = two(text=PROMPTS[0], truncation=True)
    assert batch["input_ids"] == whole["input_ids"]
    assert batch["slm_input_ids"] == whole["slm_input_ids"][:8] + [EOS]
    assert batch["alignment"] == whole["alignment"][:8] + [len(whole["input_ids"]) - 1]
    two.tokenizer.truncation_side = "left"
    batch = two(text=PROMPTS[0], truncation=True)
    assert batch["slm_input_ids"] == whole["slm_input_ids"][-9:] and batch["alignment"] == whole["alignment"][-9:]


@pytest.mark.parametrize("text", [" \n Hello there! \n", "Question: 1 + 1?\nAnswer:\n"])
def test_truncation_that_cuts_nothing_changes_nothing(make, text):
    """Training cuts and inference doesn't: the SLM sees white space at the ends in both, though the LLM drops it."""
    processor = make(llm=train_wordpiece())
    batch = processor(text=text, truncation=True, max_length=60)
    assert dict(batch) == dict(processor(text=text))
    assert processor.tokenizer.decode(batch["slm_input_ids"], skip_special_tokens=True) == text


def test_static_shapes(two):
    """With `padding="max_length"` and truncation no column is longer than asked for, in either token view."""
    long = ["漢字" * 20, *PROMPTS]
    batch = two(text=long, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    assert {tuple(value.shape) for value in batch.values()} == {(4, 12)}
    assert len(two(text=long[0], truncation=True, max_length=12)["slm_input_ids"]) == 121  # not cut unless asked


def test_too_long(one, two):
    """A prompt that is too long is refused with its index, its length and the limit, or cut to the limit."""
    long = "word " * 200
    length = len(two.llm_tokenizer(long)["input_ids"])
    with pytest.raises(ValueError, match=rf"Prompt 1 is {length} tokens long, .* at most 128.*`truncation=True`"):
        two(text=["short", long])
    assert len(two(text=long, truncation=True)["input_ids"]) == 128
    assert len(one(text=long)["input_ids"]) == len(one.tokenizer(long)["input_ids"])  # T5 has no limit
    two.max_prompt_length, two.slm_max_prompt_length = None, 50
    length = len(two.tokenizer(long)["input_ids"])
    with pytest.raises(ValueError, match=rf"Prompt 0 is {length} SLM tokens long, but the SLM takes at most 50"):
        two(text=long)


# Labels --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("template", ["$A", "$A </s>", "<s> $A </s>"])
def test_end_token_once(make, template):
    """A response ends with one end token, whatever the tokenizer adds and the text has; an empty one is that alone."""
    processor = make(slm_is_encoder_decoder=True, decoder_start_token_id=BOS)
    set_template(processor.tokenizer, template)
    ids = processor.tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert processor.response_ids(["Hi", "Hi</s>", ""]) == [[*ids, EOS], [*ids, EOS], [EOS]]


def test_leading_tokens(make):
    """What stands before a response: nothing for a decoder-only SLM, all but the start token for another."""

    def labels(**kwargs):
        processor = make(**kwargs)
        set_template(processor.tokenizer, "<s> $A </s>")
        return processor(text_target="Hi")["labels"]

    ids = make().tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert labels(slm_is_encoder_decoder=False, decoder_start_token_id=BOS) == [*ids, EOS]
    assert labels(slm_is_encoder_decoder=True, decoder_start_token_id=BOS) == [*ids, EOS]
    assert labels(slm_is_encoder_decoder=True, decoder_start_token_id=EOS) == [BOS, *ids, EOS]  # as BART is trained
    assert labels(slm_is_encoder_decoder=True) == [BOS, *ids, EOS]


@pytest.mark.parametrize(
    ("slm", "expected"), [("t5", 0), ("marian", 2), ("t5gemma", 1), ("llama", 1)], ids=lambda value: str(value)
)
def test_start_token_of_the_slm(zoo, slm, expected):
    """The start token is the config's, 0 (T5) too, and the decoder's bos where it names none."""
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(*zoo.sources(Pair("t5", slm, "replace")))
    assert processor.decoder_start_token_id == expected
    assert processor.slm_is_encoder_decoder == (slm != "llama")


def test_labels_are_padded_by_length(make):
    """The end token is scored even where it is the padding token too."""
    processor = make()
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    rows = processor(text_target=RESPONSES)["labels"]
    labels = processor(text_target=RESPONSES, padding=True, return_tensors="pt")["labels"]
    assert [row[row != -100].tolist() for row in labels] == rows
    assert all(row[-1] == EOS for row in rows) and (labels == -100).sum() == sum(
        labels.shape[1] - len(r) for r in rows
    )


@pytest.mark.parametrize("length", [1, 2, 4, 1000])
def test_response_truncation_keeps_the_end_token(make, length):
    processor = make()
    whole = processor(text_target=RESPONSES[0])["labels"]
    cut = processor(text_target=RESPONSES[0], truncation=True, max_target_length=length)["labels"]
    assert cut == (whole if length >= len(whole) else whole[: length - 1] + [EOS])
    assert processor(text_target=RESPONSES[0], max_target_length=length)["labels"] == whole  # not asked to cut


def test_tokenizers_without_special_tokens(zoo, make):
    """Without a padding token another pads, under the mask; without an end token a response is refused."""
    processor = make()
    for tokenizer in (processor.tokenizer, processor.llm_tokenizer):
        tokenizer.pad_token = None
    processor = LLM2SLMProcessor(processor.tokenizer, processor.llm_tokenizer, fusion="align")
    assert processor.tokenizer.pad_token_id == processor.llm_tokenizer.pad_token_id == EOS
    padded = make()(text=PROMPTS, padding=True, return_tensors="pt")
    for name, column in processor(text=PROMPTS, padding=True, return_tensors="pt").items():
        filler = EOS if name.endswith("input_ids") else 0
        mask = padded["slm_attention_mask" if name in SLM_COLUMNS else "attention_mask"].bool()
        assert torch.equal(column, padded[name].masked_fill(~mask, filler))

    bare = copy.deepcopy(zoo.tokenizers["bpe"])
    bare.pad_token = bare.eos_token = bare.unk_token = None
    processor = LLM2SLMProcessor(bare)
    assert bare.pad_token is None
    assert processor(text=PROMPTS, padding=True, return_tensors="pt")["input_ids"].min() == 0
    with pytest.raises(ValueError, match=r"no end token, so a response would never end. Set `processor.tokenizer.eos"):
        processor(text_target="Hi")
    bare.sep_token = "</s>"  # BERT's end of a text
    assert processor(text_target="Hi")["labels"][-1] == EOS


# Errors --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, r"Give the processor prompts as `text`, responses as `text_target`, or both"),
        ({"text": ["Hello", ""]}, r"Prompt 1 is empty: the LLM needs text to read"),
        ({"text": ["Hello", "Hi", " \t\n\u3000"]}, r"Prompt 2 is empty"),
        ({"text": ""}, r"Prompt 0 is empty"),
        ({"text": []}, r"`text` must hold at least one text, found none. Leave empty batches out"),
        ({"text_target": (), "padding": True}, r"`text_target` must hold at least one text, found none"),
        ({"text": ["Hello", None]}, r"Prompt 1 is no text but NoneType; pass strings"),
        ({"text": [["Hello"]]}, r"Prompt 0 is no text but list"),
        ({"text": ["a", "b"], "text_target": "c"}, r"Each prompt needs one response, got 2 and 1"),
        (
            {"text": {"text": ["a"], "label": [1]}},
            r"`text` must be text or a list of texts, got dict with the keys text, label",
        ),
        ({"text": "Hello", "padding": "shortest"}, r"`padding` must be True, False, \"longest\" or \"max_length\""),
        ({"text": "Hello", "truncation": "do_not_truncate"}, r"`truncation` must be True or False, got 'do_not_tr"),
        ({"text": "Hello", "return_tensors": "np"}, r"`return_tensors` must be None or \"pt\", got 'np'"),
    ],
)
def test_bad_calls(two, arguments, error):
    with pytest.raises(ValueError, match=error):
        two(**arguments)


class CharacterTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which gives no offsets."""

    vocab_size = 128

    def get_vocab(self):
        return {chr(index): index for index in range(128)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 128

    def _convert_id_to_token(self, index):
        return chr(index)


def test_tokenizers_that_do_not_belong(make):
    """Two tokenizers can't be added, one without offsets can't be aligned, a fusion must exist: the texts say so."""
    with pytest.raises(
        ValueError, match=r'must share one tokenizer; expected equal ones, found .* Use `fusion="align"`'
    ):
        make(fusion="add")
    slow = CharacterTokenizer(unk_token="?", eos_token="\n")
    with pytest.raises(ValueError, match=r"needs tokenizers that give .* the LLM\'s, CharacterTokenizer, does not"):
        make(llm=slow)
    with pytest.raises(ValueError, match=r'offsets; the SLM\'s, CharacterTokenizer, does not.*`fusion="replace"`'):
        make(slm=slow, llm="bpe")
    with pytest.raises(
        ValueError, match=r"`fusion` must be one of 'add', 'replace', 'llm-embed', 'align', 'kv', got 'mix'"
    ):
        make(fusion="mix")
    processor = make(llm=slow, fusion="replace")
    assert processor(text="Hi")["input_ids"] == [ord("H"), ord("i")]


# Loading and saving --------------------------------------------------------------------------------------------------
def test_from_llm_slm_pretrained(zoo, tmp_path):
    """Equal tokenizers are added and kept once, different ones aligned; limits and arguments of each part arrive."""
    load = LLM2SLMProcessor.from_llm_slm_pretrained
    t5, llama, unigram = (
        zoo.checkpoint(*c) for c in (("t5", "bpe", "slm"), ("llama", "bpe", "llm"), ("llama", "unigram", "llm"))
    )
    same = load(llama, t5)
    assert same.fusion == "add" and same.llm_tokenizer is same.tokenizer and same.shared_tokenizer
    assert (same.max_prompt_length, same.slm_max_prompt_length, same.slm_is_encoder_decoder) == (128, None, True)
    other = load(unigram, pathlib.Path(t5), local_files_only=True)
    assert other.fusion == "align" and not other.shared_tokenizer
    assert other.llm_tokenizer.get_vocab() == zoo.tokenizers["unigram"].get_vocab() != other.tokenizer.get_vocab()
    assert load(unigram, t5, fusion="replace").fusion == "replace"
    assert load(llama).fusion == "add"  # an SLM cut from the LLM
    assert load(t5, llama, fusion="replace").max_prompt_length == 128  # of the SLM, which gets as many positions
    assert load(zoo.checkpoint("t5", "unigram", "llm"), llama).max_prompt_length is None
    bart = zoo.checkpoint("bart", "bpe", "slm")
    kept, skipped = load(llama, bart), load(llama, bart, slm_encoder="skip")  # whose encoder limits no prompt
    assert (kept.slm_max_prompt_length, skipped.slm_max_prompt_length, skipped.fusion) == (128, None, "replace")
    assert load(unigram, bart, slm_encoder="skip").fusion == "replace"
    with pytest.raises(ValueError, match=r"`slm_encoder` must be one of 'keep', 'skip', got 'drop'"):
        load(llama, bart, slm_encoder="drop")
    shutil.copytree(unigram, tmp_path / "part")
    assert load(tmp_path, t5, llm_subfolder="part").llm_tokenizer.get_vocab() == other.llm_tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"must share one tokenizer"):
        load(unigram, t5, fusion="add")
    with pytest.raises(TypeError, match=r"got unknown argument\(s\) max_length, subfolder\."):
        load(llama, t5, max_length=3, subfolder="part")


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def settings(processor):
    names = ("fusion", "slm_is_encoder_decoder", "decoder_start_token_id", "max_prompt_length")
    return {name: getattr(processor, name) for name in (*names, "slm_max_prompt_length", "shared_tokenizer")}


@pytest.mark.parametrize("kind", ["one", "two"])
def test_save_and_load(request, kind, tmp_path):
    """By class and by `AutoProcessor`: the same settings, columns and decoding; each tokenizer in its place."""
    processor = request.getfixturevalue(kind)
    processor.max_prompt_length, processor.slm_max_prompt_length = 90, 80
    assert processor.save_pretrained(tmp_path) == [str(tmp_path / "processor_config.json")]
    names = ["tokenizer.json", "tokenizer_config.json"]
    folders = ["llm_tokenizer/", "slm_tokenizer/"] if kind == "two" else [""]
    assert files(tmp_path) == sorted(["processor_config.json", *(f + name for f in folders for name in names)])
    arguments = {"text": PROMPTS, "text_target": RESPONSES, "padding": True, "return_tensors": "pt"}
    expected = lists(processor(**arguments))
    for loader in (LLM2SLMProcessor, AutoProcessor):
        loaded = loader.from_pretrained(tmp_path, local_files_only=True)
        assert type(loaded) is LLM2SLMProcessor
        assert settings(loaded) == settings(processor)
        assert (loaded.llm_tokenizer is loaded.tokenizer) == (kind == "one")
        assert lists(loaded(**arguments)) == expected
        assert loaded.batch_decode(expected["slm_input_ids"] if kind == "two" else expected["input_ids"]) == (
            processor.tokenizer.batch_decode(expected["slm_input_ids"] if kind == "two" else expected["input_ids"])
        )
    assert AutoProcessor.from_pretrained(tmp_path, max_prompt_length=7).max_prompt_length == 7
    shutil.copytree(tmp_path, tmp_path / "part")
    assert lists(LLM2SLMProcessor.from_pretrained(tmp_path, subfolder="part")(**arguments)) == expected


def test_tokenizer_without_processor(one, tmp_path):
    """A folder with a tokenizer but no settings is no processor: none are guessed."""
    one.tokenizer.save_pretrained(tmp_path)
    LLM2SLMConfig().save_pretrained(tmp_path)
    for loader in (LLM2SLMProcessor, AutoProcessor):
        with pytest.raises(
            ValueError, match=r"has no `processor_config.json` of an LLM2SLMProcessor, .*Save the proc"
        ):
            loader.from_pretrained(tmp_path)


def test_auto_tokenizer(small, small_causal, tmp_path):
    """`AutoTokenizer` loads the one tokenizer of a checkpoint; of two it takes none, and says what to do."""
    for name, (model, processor) in (("one", small), ("two", small_causal)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer(PROMPTS)["input_ids"] == small[1](text=PROMPTS)["input_ids"]
    with pytest.raises(
        ValueError, match=r"two' has two tokenizers, .*`AutoProcessor.from_pretrained\(...\)`, with `.tok"
    ):
        AutoTokenizer.from_pretrained(tmp_path / "two")
    for part in ("slm", "llm"):  # each is a tokenizer like any other
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "two" / f"{part}_tokenizer")
        own = small_causal[1].tokenizer if part == "slm" else small_causal[1].llm_tokenizer
        assert tokenizer(PROMPTS)["input_ids"] == own(PROMPTS)["input_ids"]


def test_load_in_another_process(two, tmp_path):
    """A process that has only imported the package makes the same columns."""
    two.save_pretrained(tmp_path)
    script = (
        "import sys, json, transformers_llm2slm; from transformers import AutoProcessor; "
        "print(json.dumps(dict(AutoProcessor.from_pretrained(sys.argv[1])(text=json.loads(sys.argv[2])))))"
    )
    command = [sys.executable, "-c", script, str(tmp_path), json.dumps(PROMPTS)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == dict(two(text=PROMPTS))


def test_decode(two):
    """Decoding is the SLM's."""
    ids = two(text_target=RESPONSES)["labels"]
    assert two.batch_decode(ids, skip_special_tokens=True) == RESPONSES
    assert two.decode(ids[0]) == RESPONSES[0] + "</s>"
    assert two.llm_tokenizer.decode(ids[0], skip_special_tokens=True) != RESPONSES[0]


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_push_to_hub(two, tmp_path, monkeypatch, way):
    """Pushing uploads what saving writes, both tokenizers too; `save_pretrained(push_to_hub=True)` saves as well."""
    commits = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": f"org/{repo_id}"})

        def create_commit(self, repo_id, operations, **kwargs):
            commits.append((repo_id, kwargs["token"], sorted(operation.path_in_repo for operation in operations)))

    class Card:
        def save(self, path):
            pathlib.Path(path).write_text("---\nlibrary_name: transformers\n---\n")

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    two.save_pretrained(tmp_path / "expected")
    if way == "save_pretrained":
        (tmp_path / "mine").mkdir()
        returned = two.save_pretrained(f"{tmp_path / 'mine'}/", push_to_hub=True, token="secret")
        assert returned == [f"{tmp_path / 'mine'}/processor_config.json"]
        assert files(tmp_path / "mine") == files(tmp_path / "expected")
    else:
        two.push_to_hub("mine", token="secret")
    assert commits == [("org/mine", "secret", sorted(["README.md", *files(tmp_path / "expected")]))]


# Chats ---------------------------------------------------------------------------------------------------------------
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Hi, who?"}, {"role": "assistant", "content": "Me."}]


def test_chat_template(two, tmp_path):
    """Chats are written in the LLM's format with the LLM's special tokens, as text or as columns, and come back."""
    assert two.chat_template is None
    two.llm_tokenizer.chat_template = TEMPLATE
    two = LLM2SLMProcessor(two.tokenizer, two.llm_tokenizer, fusion="align")
    two.tokenizer.bos_token = "a"  # another than the LLM's
    text = two.apply_chat_template(CHAT)
    assert text == "<s>user: Hi, who?\nassistant: Me.\n"
    assert two.apply_chat_template([CHAT, CHAT[:1]]) == [text, "<s>user: Hi, who?\n"]
    assert two.apply_chat_template(CHAT, chat_template="{{ messages[0]['content'] }}") == "Hi, who?"
    columns = two.apply_chat_template(
        [CHAT, CHAT[:1]], tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    assert lists(columns) == dict(two([text, "<s>user: Hi, who?\n"], padding=True, add_special_tokens=False))
    assert columns["input_ids"][0].tolist()[:1] == [BOS] and EOS not in columns["input_ids"]
    cut = two.apply_chat_template(CHAT, tokenize=True, processor_kwargs={"truncation": True, "max_length": 6})
    assert cut["input_ids"] == columns["input_ids"][0, :6].tolist()

    two.chat_template = TEMPLATE.replace("user", "human")
    for _ in range(2):  # the processor's own template too
        two.save_pretrained(tmp_path)
        two = AutoProcessor.from_pretrained(tmp_path)
        assert two.chat_template == TEMPLATE.replace("user", "human") and two.llm_tokenizer.chat_template == TEMPLATE


def test_no_warning_of_length(make, caplog, monkeypatch):
    """A prompt longer than the tokenizer's own limit is the models' affair: no warning about indexing errors."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    processor = make()
    processor.llm_tokenizer.model_max_length = processor.tokenizer.model_max_length = 4
    processor(text=PROMPTS, text_target=RESPONSES)
    assert not caplog.records
    processor.tokenizer(PROMPTS)  # what would be said
    assert "Token indices sequence length is longer" in caplog.text


# Conversations -----------------------------------------------------------------------------------------------------------
TALK_TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def test_conversations_are_prompts(zoo):
    """The chat template makes their text, and the tokenizer adds no special tokens; alone as in a batch."""
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(*zoo.sources(Pair("llama", "llama", "align")))
    processor.chat_template = TALK_TEMPLATE
    talks = [
        [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "x"},
        ]
        for prompt in PROMPTS
    ]
    answers = [[{"role": "assistant", "content": response}] for response in RESPONSES]
    texts = [f"<s>user: {prompt}\n<s>assistant: Yes?\n<s>user: x\nassistant:" for prompt in PROMPTS]
    expected = processor(text=texts, text_target=RESPONSES, add_special_tokens=False)
    assert processor(text=talks, text_target=answers).data == expected.data
    assert processor(text=talks[0], text_target=answers[0])["input_ids"] == expected["input_ids"][0]
    assert expected["input_ids"][0][0] == 1 and expected["input_ids"][0].count(2) == 0  # <s>, and no </s>
    with pytest.raises(ValueError, match=r"one message of the assistant, got the roles user, assistant, user"):
        processor(text=talks, text_target=talks)
    with pytest.raises(ValueError, match=r"Prompt 0 is no text but list; pass strings, or for all of them lists"):
        processor(text=[talks[0], "text"])


def test_decoder_input_ids_are_the_models(composed):
    """What the processor makes of labels is what the SLM's own rule makes, wherever a loss or a later token sees it."""
    _, model, processor = composed
    labels = processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")["labels"]
    ours, own = processor.decoder_input_ids(labels), model.prepare_decoder_input_ids_from_labels(labels)
    seen = (labels != -100)[:, : ours.shape[1]]
    assert ours.shape == own.shape and torch.equal(ours[seen], own[seen])
