"""`generate`: the SLM's own in all its forms, for both kinds of SLM, from a live LLM, cached states or a prompt sent over."""

from __future__ import annotations

import io
import pickle
import threading

import pytest
import torch
from conftest import PROMPTS, Pair
from transformers import (
    AutoModel,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateBeamEncoderDecoderOutput

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMPrompt

EOS, PAD, START = 2, 0, 0


def make_batch(processor, prompts=PROMPTS, side="right"):
    for tokenizer in (processor.tokenizer, processor.llm_tokenizer):
        tokenizer.padding_side = side
    return processor(text=prompts, padding=True, return_tensors="pt")


@pytest.fixture(params=["small", "small_causal"])
def both(request):
    """A model and its processor: with an encoder-decoder SLM and with a decoder-only one."""
    return request.getfixturevalue(request.param)


def starts(model):
    """How many tokens stand in a sequence before the response: an encoder-decoder SLM's start token."""
    return int(model.slm.config.is_encoder_decoder)


def response(model, sequences):
    return sequences[:, starts(model) :]


def greedy_by_hand(model, batch, steps):
    """Greedy tokens without `generate`: each step scores the whole response anew, one column longer."""
    labels = torch.zeros(len(PROMPTS), 0, dtype=torch.long)
    for _ in range(steps):
        probe = torch.cat([labels, labels.new_full((len(labels), 1), 5)], dim=1)
        logits = model(**batch, labels=probe).logits[:, -1]
        labels = torch.cat([labels, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return labels


def no_end(model):
    """Arguments that keep greedy search from ending, so that lengths are known."""
    return {"eos_token_id": None, "pad_token_id": PAD}


# Ways of writing ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_greedy(both):
    """Greedy search takes the most likely token of each step; the response stops behind its end token."""
    model, processor = both
    batch = make_batch(processor)
    expected = greedy_by_hand(model, batch, 6)
    sequences = model.generate(**batch, max_new_tokens=6, do_sample=False, **no_end(model))
    assert sequences.shape == (3, 6 + starts(model))
    assert response(model, sequences).tolist() == expected.tolist()

    end = int(expected[0, 2])  # the third token of the first row, made the end token
    ended = response(model, model.generate(**batch, max_new_tokens=6, eos_token_id=end, pad_token_id=PAD))
    for row, tokens in zip(ended.tolist(), expected.tolist(), strict=True):
        stop = tokens.index(end) + 1 if end in tokens else 6
        assert row == (tokens[:stop] + [PAD] * (6 - stop))[: ended.shape[1]]


@torch.no_grad()
def test_sampling_with_a_seed(both):
    """The same seed gives the same sample, another seed another; the samples of a row differ."""
    model, processor = both
    batch = make_batch(processor)

    def sample(seed, **arguments):
        torch.manual_seed(seed)
        return model.generate(**batch, do_sample=True, max_new_tokens=8, **no_end(model), **arguments)

    first = sample(1, num_return_sequences=4)
    assert first.shape == (12, 8 + starts(model))
    assert torch.equal(first, sample(1, num_return_sequences=4))
    assert not torch.equal(first, sample(2, num_return_sequences=4))
    assert len({tuple(row) for row in first[:4].tolist()}) == 4
    greedy = model.generate(**batch, max_new_tokens=8, **no_end(model))
    assert torch.equal(sample(3, top_k=1), greedy)


@torch.no_grad()
def test_beams(both):
    """Beam search scores its sequences by the sum of log probabilities that teacher forcing gives, best first."""
    model, processor = both
    batch = make_batch(processor)
    outputs = model.generate(
        **batch,
        num_beams=4,
        num_return_sequences=3,
        max_new_tokens=5,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **no_end(model),
    )
    expected_type = GenerateBeamEncoderDecoderOutput if starts(model) else GenerateBeamDecoderOnlyOutput
    assert type(outputs) is expected_type and outputs.sequences.shape == (9, 5 + starts(model))
    scores = outputs.sequences_scores.reshape(3, 3)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in batch.items()}
    labels = response(model, outputs.sequences)
    log_probs = model(**repeated, labels=labels).logits.log_softmax(dim=-1)
    by_hand = log_probs.gather(2, labels.unsqueeze(-1)).sum(dim=(1, 2))
    torch.testing.assert_close(outputs.sequences_scores, by_hand, rtol=0, atol=1e-3)


@torch.no_grad()
def test_return_dict_with_scores(both):
    model, processor = both
    batch = make_batch(processor)
    outputs = model.generate(
        **batch,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **no_end(model),
    )
    assert len(outputs.scores) == len(outputs.logits) == 4
    labels = response(model, outputs.sequences)
    for step, logits in enumerate(outputs.logits):
        assert logits.shape == (3, 320) and torch.equal(logits.argmax(dim=-1), labels[:, step])
    forced = model(**batch, labels=labels).logits
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), forced, rtol=0, atol=1e-4)


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextIteratorStreamer])
@torch.no_grad()
def test_streaming(both, streamer_class, capsys):
    """A streamer is given the response as it is written, and no part of the prompt."""
    model, processor = both
    batch = make_batch(processor, PROMPTS[:1])
    expected = processor.decode(model.generate(**batch, max_new_tokens=8)[0], skip_special_tokens=True)
    assert expected
    streamer = streamer_class(processor.tokenizer, skip_special_tokens=True)
    if streamer_class is TextStreamer:
        model.generate(**batch, max_new_tokens=8, streamer=streamer)
        assert capsys.readouterr().out == expected + "\n"
    else:
        thread = threading.Thread(target=model.generate, kwargs={**batch, "max_new_tokens": 8, "streamer": streamer})
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert "".join(pieces) == expected and len(pieces) > 1


@torch.no_grad()
def test_stop_strings(both):
    """Writing stops where the text holds the string."""
    model, processor = both
    batch = make_batch(processor, PROMPTS[:1])
    whole = response(model, model.generate(**batch, max_new_tokens=12, **no_end(model)))[0]
    pieces = [processor.decode([token], skip_special_tokens=True) for token in whole]
    place = next(i for i, piece in enumerate(pieces) if i > 2 and piece.strip() and piece not in pieces[:i])
    stop = pieces[place]
    stopped = model.generate(
        **batch, max_new_tokens=12, stop_strings=[stop], tokenizer=processor.tokenizer, **no_end(model)
    )
    stopped = response(model, stopped)[0]
    assert stopped.tolist() == whole[: len(stopped)].tolist() and len(stopped) <= place + 1 < 12
    assert stop in processor.decode(stopped, skip_special_tokens=True)
    assert stop not in processor.decode(stopped[:-1], skip_special_tokens=True)


@torch.no_grad()
def test_static_cache(both):
    model, processor = both
    batch = make_batch(processor)
    arguments = {"max_new_tokens": 6, **no_end(model)}
    expected = model.generate(**batch, **arguments)
    assert torch.equal(model.generate(**batch, cache_implementation="static", **arguments), expected)


@torch.no_grad()
def test_logits_processors_and_stopping_criteria(both):
    """They are given the response alone (an encoder-decoder SLM's with its start token), never the prompt."""
    model, processor = both
    batch = make_batch(processor)
    seen = []

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape)
            return scores.masked_fill(torch.arange(scores.shape[-1]) != 7 + len(seen), -torch.inf)

    sequences = model.generate(
        **batch, max_new_tokens=4, logits_processor=LogitsProcessorList([Only()]), **no_end(model)
    )
    assert response(model, sequences).tolist() == [[8, 9, 10, 11]] * 3
    assert seen == [(3, step + starts(model)) for step in range(4)]

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] == 2 + starts(model))

    sequences = model.generate(**batch, max_new_tokens=9, stopping_criteria=[AfterTwo()], **no_end(model))
    assert response(model, sequences).shape == (3, 2)


# Lengths and generation configs ------------------------------------------------------------------------------------------
LENGTHS = {  # what is set -> tokens of the response, with the start token where there is one
    "max_new_tokens": ({"max_new_tokens": 5}, 5, 5),
    "max_length": ({"max_length": 6}, 5, 6),
    "both": ({"max_new_tokens": 5, "max_length": 9}, 5, 5),
    "min_new_tokens": ({"min_new_tokens": 4, "max_new_tokens": 7}, 7, 7),
    "min_length": ({"min_length": 4, "max_length": 7}, 6, 7),
    "default": ({}, 20, 20),
}


@pytest.mark.parametrize("through", ["arguments", "generation_config=", "model.generation_config"])
@pytest.mark.parametrize("lengths", LENGTHS)
@torch.no_grad()
def test_lengths_count_the_response(both, lengths, through):
    """
    Wherever they are set, for both kinds of SLM: the prompt, which is longer than any of them, is not counted. (To an
    encoder-decoder model `max_length` is the length of a sequence with its start token.)
    """
    model, processor = both
    batch = make_batch(processor)
    arguments, seq2seq_length, causal_length = LENGTHS[lengths]
    length = seq2seq_length if starts(model) else causal_length
    model.generation_config.eos_token_id = None
    before = model.generation_config.to_dict()
    config = GenerationConfig(**arguments, eos_token_id=None, pad_token_id=PAD, decoder_start_token_id=START)
    if through == "arguments":
        sequences = model.generate(**batch, **arguments)
    elif through == "generation_config=":
        given = config.to_dict()
        sequences = model.generate(**batch, generation_config=config)
        assert config.to_dict() == given
    else:
        model.generation_config = config
        before = config.to_dict()
        sequences = model.generate(**batch)
    assert response(model, sequences).shape == (3, length)
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("name", ["min_length", "min_new_tokens"])
@pytest.mark.parametrize("through", ["arguments", "model.generation_config"])
@torch.no_grad()
def test_least_lengths(both, name, through):
    """No end token before the least length: with every token an end token, the response is exactly as long."""
    model, processor = both
    batch = make_batch(processor)
    arguments = {"eos_token_id": list(range(1, 320)), "pad_token_id": PAD, "max_new_tokens": 9}
    assert response(model, model.generate(**batch, **arguments)).shape[1] == 1
    # The longest run that forbids all ends: the SLM can only write the pad token until then.
    length = 4 + (starts(model) if name == "min_length" else 0)
    if through == "arguments":
        arguments[name] = length
    else:
        setattr(model.generation_config, name, length)
    sequences = response(model, model.generate(**batch, **arguments))
    assert (sequences[:, :4] == PAD).all() and sequences.shape[1] == 5 and (sequences[:, 4] != PAD).any()


def test_arguments_beat_the_config(both):
    model, processor = both
    batch = make_batch(processor)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = None
    assert response(model, model.generate(**batch)).shape[1] == 3
    assert response(model, model.generate(**batch, max_new_tokens=5)).shape[1] == 5
    config = GenerationConfig(max_new_tokens=4)
    assert response(model, model.generate(**batch, generation_config=config)).shape[1] == 4
    assert response(model, model.generate(batch["input_ids"], config, **without_ids(batch))).shape[1] == 4
    if not starts(model):
        assert response(model, model.generate(**batch, max_length=6)).shape[1] == 6


def without_ids(batch):
    return {name: tensor for name, tensor in batch.items() if name != "input_ids"}


@torch.no_grad()
def test_generation_config_is_the_slms(both, tmp_path):
    """What is set there is used, saved, and used again after loading."""
    model, processor = both
    batch = make_batch(processor)
    assert model.generation_config is model.slm.generation_config
    greedy = model.generate(**batch, max_new_tokens=12)
    beams = model.generate(**batch, max_new_tokens=12, num_beams=4)
    assert greedy.tolist() != beams.tolist()
    model.generation_config.num_beams = 4
    model.generation_config.max_new_tokens = 12
    assert model.generate(**batch).tolist() == beams.tolist()
    model.save_pretrained(tmp_path)
    for loader in (LLM2SLMForConditionalGeneration, AutoModel):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.slm.generation_config.num_beams == 4
        assert loaded.generate(**batch).tolist() == beams.tolist()
    model.generation_config = GenerationConfig(max_new_tokens=12, pad_token_id=PAD, eos_token_id=EOS)
    model.generation_config.decoder_start_token_id = START
    assert model.generate(**batch).tolist() == greedy.tolist()


# Ways of giving a prompt -------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_prompt_given_in_every_way(both):
    """Positionally, by name, encoded before, and as the LLM's states: one text."""
    model, processor = both
    batch = make_batch(processor)
    rest = without_ids(batch)
    expected = model.generate(**batch, max_new_tokens=6).tolist()
    assert model.generate(batch["input_ids"], **rest, max_new_tokens=6).tolist() == expected
    assert model.generate(inputs=batch["input_ids"], **rest, max_new_tokens=6).tolist() == expected
    prompt = model.encode_prompt(**batch)
    assert type(prompt) is LLM2SLMPrompt
    assert model.generate(prompt=prompt, max_new_tokens=6).tolist() == expected
    states = model.model.llm_states(batch["input_ids"], batch["attention_mask"])
    assert model.generate(**batch, llm_hidden_states=states, max_new_tokens=6).tolist() == expected
    assert model.generate(**batch, labels=torch.full((3, 2), 5), max_new_tokens=6).tolist() == expected


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(both, side):
    """Each row of a padded batch, on either side, is given the response that it is given alone."""
    model, processor = both
    arguments = {"max_new_tokens": 6, "num_beams": 2, **no_end(model)}
    together = model.generate(**make_batch(processor, side=side), **arguments)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(**make_batch(processor, [prompt]), **arguments)
        assert together[row].tolist() == alone[0].tolist()


@torch.no_grad()
def test_one_prompt_needs_no_mask(both):
    model, processor = both
    batch = make_batch(processor, PROMPTS[:1])
    expected = model.generate(**batch, max_new_tokens=6).tolist()
    bare = {name: tensor for name, tensor in batch.items() if not name.endswith("attention_mask")}
    assert model.generate(**bare, max_new_tokens=6).tolist() == expected


@pytest.mark.parametrize("transport", ["torch.save", "pickle"])
@torch.no_grad()
def test_prompt_sent_to_a_machine_without_the_llm(both, tmp_path, transport):
    """One machine reads, another one, which has projector and SLM only, writes the same texts."""
    model, processor = both
    batch = make_batch(processor, side="left")
    arguments = {"max_new_tokens": 6, "num_beams": 3}
    expected = processor.batch_decode(model.generate(**batch, **arguments), skip_special_tokens=True)
    prompt = model.encode_prompt(**batch)
    if transport == "pickle":
        received = pickle.loads(pickle.dumps(prompt))
    else:
        file = io.BytesIO()
        torch.save(dict(prompt), file)
        file.seek(0)
        received = LLM2SLMPrompt(**torch.load(file, weights_only=True))
    assert type(received) is LLM2SLMPrompt and torch.equal(received.prompt_states, prompt.prompt_states)
    model.save_pretrained(tmp_path)
    writer = AutoModel.from_pretrained(tmp_path, load_llm=False)
    assert writer.llm is None
    texts = processor.batch_decode(writer.generate(prompt=received, **arguments), skip_special_tokens=True)
    assert texts == expected


@torch.no_grad()
def test_prompt_in_another_dtype(both):
    """States that travel in half the bytes are taken to the SLM's dtype."""
    model, processor = both
    prompt = model.encode_prompt(**make_batch(processor))
    half = LLM2SLMPrompt(prompt.prompt_states.to(torch.bfloat16), prompt.attention_mask)
    expected = LLM2SLMPrompt(prompt.prompt_states.to(torch.bfloat16).float(), prompt.attention_mask)
    first, second = (model.generate(prompt=p, max_new_tokens=6).tolist() for p in (half, expected))
    assert first == second


def test_generate_keeps_no_graph(both):
    model, processor = both
    outputs = model.generate(
        **make_batch(processor), max_new_tokens=2, return_dict_in_generate=True, output_scores=True
    )
    assert not any(scores.requires_grad for scores in outputs.scores)


def test_unknown_arguments_are_refused(both):
    """As any `generate` does: a misspelt argument is an error, not ignored."""
    model, processor = both
    with pytest.raises(ValueError, match="`model_kwargs` are not used by the model: \\['max_new_token'\\]"):
        model.generate(**make_batch(processor), max_new_token=3)


@torch.no_grad()
def test_ways_of_writing_that_need_the_prompts_tokens(both):
    """Each is refused by name, before anything is written; prompt lookup drafts from the response, and changes nothing."""
    model, processor = both
    batch = processor(PROMPTS[0], return_tensors="pt")
    for options in ({"assistant_model": model.slm}, {"assistant_early_exit": 1}, {"guidance_scale": 1.5}):
        (name,) = options
        with pytest.raises(ValueError, match=f"`{name}` needs the prompt as tokens, but what the SLM gets are states"):
            model.generate(**batch, **options)
    with pytest.raises(ValueError, match="`guidance_scale` needs the prompt as tokens"):
        model.generate(**batch, generation_config=GenerationConfig(guidance_scale=1.5))
    expected = model.generate(**batch, max_new_tokens=8, guidance_scale=1.0).tolist()
    assert model.generate(**batch, max_new_tokens=8, prompt_lookup_num_tokens=3).tolist() == expected


@torch.no_grad()
def test_seq2seq_trainer_may_hand_over_the_whole_batch(both):
    """With `labels`, what else belongs to training is left out; a forced beginning for an encoder-decoder is not."""
    model, processor = both
    batch = make_batch(processor)
    labels = torch.full((3, 4), 5)
    expected = model.generate(**batch, max_new_tokens=4).tolist()
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    extra = {"labels": labels, "shift_labels": labels, "decoder_input_ids": shifted}
    assert model.generate(**batch, **extra, max_new_tokens=4).tolist() == expected
    if starts(model):
        begun = model.generate(**batch, decoder_input_ids=torch.tensor([[START, 8, 9]] * 3), max_new_tokens=2)
        assert begun[:, :3].tolist() == [[START, 8, 9]] * 3 and begun.shape[1] <= 5


@pytest.mark.parametrize("slm", ["t5", "bart", "marian", "t5gemma"])
@torch.no_grad()
def test_encoder_runs_once_per_prompt(zoo, slm):
    """The SLM's encoder, where it has one, runs once in a `generate`, whatever the beams."""
    model, processor = zoo.compose(Pair("llama", slm, "replace"))
    calls = []
    model.slm.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    model.generate(**make_batch(processor), num_beams=3, max_new_tokens=4)
    assert len(calls) == 1


@pytest.mark.parametrize("slm", ["gpt2", "opt", "gpt-neo"])
@torch.no_grad()
def test_no_room_for_an_answer(zoo, slm):
    """A table of 128 positions holds prompt and answer; what is too much is said before anything is written."""
    model, processor = zoo.compose(Pair("t5", slm, "replace"))
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=PAD)
    ids = torch.full((1, 120), 5)
    assert model.generate(ids, max_new_tokens=9).shape == (1, 9)
    text = r"The prompt \(120\) and the response \(9\) together are 129 .*takes at most 128.*`max_new_tokens` of `generate`"
    for options in (
        {"max_new_tokens": 10},
        {"max_length": 10},
        {"generation_config": GenerationConfig(max_new_tokens=10)},
    ):
        with pytest.raises(ValueError, match=text):
            model.generate(ids, **options)
    with pytest.raises(ValueError, match=r"The prompt \(120\) and the response \(19\) together are 139"):
        model.generate(ids)
    assert model.generate(torch.full((1, 128), 5), max_new_tokens=1).shape == (1, 1)


@torch.no_grad()
def test_rotated_positions_go_on(zoo):
    """An SLM without a table of positions writes beyond those that it was trained on, as it does by itself."""
    model, _ = zoo.compose(Pair("t5", "llama", "replace"))
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=PAD)
    assert model.generate(torch.full((1, 120), 5), max_new_tokens=12).shape == (1, 12)
