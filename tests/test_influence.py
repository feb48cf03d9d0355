"""Block influence: how much a layer changes what passes through it, by which the layers of a cut are chosen."""

import pytest
import torch
from conftest import PROMPTS, RESPONSES
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from transformers_llm2slm import LLM2SLMForConditionalGeneration, block_influence, influential_layers

ROWS = [{"prompt": prompt, "completion": response} for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def loaded(zoo, family):
    folder = zoo.checkpoint(family, "bpe", "llm")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_is_one_minus_the_cosine_over_the_completions_tokens(zoo, family):
    llm, tokenizer = loaded(zoo, family)
    found = block_influence(llm, tokenizer, ROWS)
    changes = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        states = llm(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
        kept = [state[0, len(prompt) :] for state in states]
        changes.append(
            torch.stack([1 - cosine_similarity(a, b, dim=-1) for a, b in zip(kept, kept[1:], strict=False)])
        )
    expected = torch.cat(changes, dim=1).mean(dim=1)
    # The last of the states has passed the final norm as well.
    torch.testing.assert_close(torch.tensor(found[:-1]), expected[:-1], atol=1e-5, rtol=1e-4)
    assert 0 <= found[-1] <= 2 and len(found) == len(expected)


def test_a_layer_that_does_nothing_has_none_and_is_not_chosen(zoo):
    llm, tokenizer = loaded(zoo, "llama")
    idle = llm.model.layers[1]
    for projection in (idle.self_attn.o_proj, idle.mlp.down_proj):
        torch.nn.init.zeros_(projection.weight)
    llm.train()
    assert block_influence(llm, tokenizer, ROWS)[1] == pytest.approx(0, abs=1e-6)
    assert llm.training and not any(layer._forward_hooks for layer in llm.model.layers)
    chosen = influential_layers(llm, tokenizer, ROWS, 2)
    assert chosen == [0, 2]
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm_layers=chosen, fusion="kv")
    assert model.config.slm_layers == model.config.llm_layer == chosen


def test_rows_may_be_conversations(zoo):
    """By the tokenizer's chat template, whose special tokens are not added again."""
    llm, tokenizer = loaded(zoo, "llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}</s>"
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in ROWS
    ]
    assert block_influence(llm, tokenizer, chats) == pytest.approx(block_influence(llm, tokenizer, ROWS))
    with pytest.raises(
        ValueError, match=r"Row 0 \(the first is 0\) has no text in column 'prompt'; its columns are \['text'\]"
    ):
        block_influence(llm, tokenizer, [{"text": "Hello"}])


def test_what_it_can_not_measure_is_refused(zoo):
    llm, tokenizer = loaded(zoo, "llama")
    with pytest.raises(ValueError, match="no tokens to measure on: got 1 rows"):
        block_influence(llm, tokenizer, [{"prompt": "Hello", "completion": ""}])
    with pytest.raises(ValueError, match=r"`count` must lie in \[1, 3\] for this LLM, got 4"):
        influential_layers(llm, tokenizer, ROWS, 4)
    seq2seq = AutoModelForSeq2SeqLM.from_pretrained(zoo.checkpoint("t5", "bpe", "llm"))
    with pytest.raises(ValueError, match="decoder-only LLMs; a T5ForConditionalGeneration has an encoder"):
        block_influence(seq2seq, tokenizer, ROWS)
