"""Alignment by characters: each rule on a hand-made case, and all of them on real text with three kinds of tokenizer."""

from __future__ import annotations

import pytest
from conftest import PROMPTS, VOCAB_SIZE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from transformers_llm2slm.alignment import align_tokens

SPECIAL = (0, 0)
TEXTS = {
    "plain": "translate English to German: The house is wonderful.",
    "white space": "  two  spaces,\ttabs\n\nand lines \r\n  ",
    "accents": "Café, naïve; ÅNGSTRÖM and ß, ﬁ, Ⅷ",
    "combining": "Cafe\u0301 a\u0308\u0323 x\u0336y\u0336",
    "emoji": "so 🙂 it 👍🏽 goes 👨‍👩‍👧‍👦 and 🇩🇪!",
    "all emoji": "👨‍👩‍👧‍👦🙂🏳️‍🌈🇩🇪",
    "cjk": "東京は大きいです。漢字",
    "right to left": "שלום עולם, \u200fمرحبا بالعالم 12",
    "scripts": "हिन्दी ไทย Жук 🙂漢字 x²",
    "control": "zero\u200bwidth, a\u00a0hard space, a bell\u0007 and \ufeffa mark",
}


def train_wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer as BERT has it: lower case, no accents, no white space, `[CLS]` before and `[SEP]` after a text."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE - 60, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([*PROMPTS, *TEXTS.values()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def tokenizers(zoo) -> dict[str, PreTrainedTokenizerFast]:
    return zoo.tokenizers | {"wordpiece": train_wordpiece()}


def offsets(tokenizer, text):
    return tokenizer(text, return_offsets_mapping=True)["offset_mapping"]


def expected_place(end: int, llm_offsets) -> int:
    """The rule for an SLM token with characters, by looking at every LLM token."""
    content = [index for index, (start, stop) in enumerate(llm_offsets) if stop > start]
    covering = [index for index in content if llm_offsets[index][0] <= end - 1 < llm_offsets[index][1]]
    following = [index for index in content if llm_offsets[index][0] >= end]
    return covering[-1] if covering else following[0] if following else content[-1]


@pytest.mark.parametrize(
    ("slm", "llm", "expected"),
    [
        pytest.param([(0, 5), (5, 9)], [(0, 2), (2, 5), (5, 8), (8, 9)], [1, 3], id="the last of its characters"),
        pytest.param([(0, 2), (2, 5), (5, 9)], [(0, 9)], [0, 0, 0], id="inside one LLM token"),
        pytest.param([(0, 4), (4, 6)], [(0, 3), (3, 6)], [1, 1], id="across a boundary"),
        pytest.param([(0, 1), (1, 2)], [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2)], [2, 4], id="the bytes of one emoji"),
        pytest.param([(0, 1), (1, 2)], [(0, 1), (0, 2), (1, 2)], [1, 2], id="bytes merged over two emoji"),
        pytest.param([(0, 1), (1, 3)], [(0, 1), (0, 3)], [1, 1], id="a mark before a word is not the word"),
        pytest.param([(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)], [0, 1, 1], id="white space goes to the next"),
        pytest.param([(0, 1), (1, 3)], [(2, 3)], [0, 0], id="white space before the text"),
        pytest.param([(0, 1), (1, 2), (2, 4)], [(0, 1), SPECIAL], [0, 0, 0], id="white space after the text"),
        pytest.param([SPECIAL, (0, 1), SPECIAL], [SPECIAL, SPECIAL, (0, 1), SPECIAL], [0, 2, 3], id="special tokens"),
        pytest.param([SPECIAL, (0, 1), SPECIAL], [(0, 1)], [0, 0, 0], id="special tokens of the SLM alone"),
        pytest.param([SPECIAL, SPECIAL], [SPECIAL, (0, 1), SPECIAL], [0, 0], id="only special tokens"),
        pytest.param([SPECIAL, (0, 1), SPECIAL], [SPECIAL, SPECIAL], [0, 1, 1], id="an LLM that drops all"),
        pytest.param([SPECIAL, (0, 1), (0, 1)], [SPECIAL, (0, 1), (0, 1)], [0, 1, 2], id="one tokenizer"),
        pytest.param([], [(0, 1)], [], id="no SLM tokens"),
    ],
)
def test_rules(slm, llm, expected):
    assert align_tokens(slm, llm) == expected


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("llm", ["bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("slm", ["bpe", "unigram", "wordpiece"])
def test_real_text(tokenizers, slm, llm, text):
    """Every SLM token goes to the latest LLM token over its last character, in order; one tokenizer to itself."""
    slm_offsets, llm_offsets = offsets(tokenizers[slm], text), offsets(tokenizers[llm], text)
    alignment = align_tokens(slm_offsets, llm_offsets)
    assert len(alignment) == len(slm_offsets)
    if slm == llm:
        assert alignment == list(range(len(llm_offsets)))
        return
    content = [(index, end) for index, (start, end) in enumerate(slm_offsets) if end > start]
    assert content, "a text without characters tests nothing"
    assert [alignment[index] for index, _ in content] == [expected_place(end, llm_offsets) for _, end in content]
    assert alignment == sorted(alignment)
    # Special tokens: the beginning's goes to the beginning, the end's to the end.
    if slm == "wordpiece":
        assert alignment[0] == 0
    assert slm_offsets[-1] == SPECIAL and alignment[-1] == len(llm_offsets) - 1


def test_words_with_wordpiece(tokenizers):
    """Words of a byte-level SLM land on the words of a BERT, whose tokens have neither case, accents nor spaces."""
    text = "Café  Über 🙂"
    slm, llm = tokenizers["bpe"], tokenizers["wordpiece"]
    llm_offsets = offsets(llm, text)
    alignment = align_tokens(offsets(slm, text), llm_offsets)
    words = [(0, 4), (6, 10), (11, 12)]
    for (_, end), place in zip(offsets(slm, text)[:-1], alignment[:-1], strict=True):
        if text[end - 1] == " ":  # goes to the first token of the next word
            word = next(word for word in words if word[0] >= end)
            assert llm_offsets[place][0] == word[0]
        else:
            word = next(word for word in words if word[0] < end <= word[1])
            assert word[0] <= llm_offsets[place][0] < llm_offsets[place][1] <= word[1]
