"""The model: what it takes and refuses, what it gives, and what its checkpoints hold."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from conftest import PROMPTS, RESPONSES, Pair, make_batch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor, cache_llm_states

KINDS = ["small", "small_causal"]
FUSED = [  # each fusion with both kinds of SLM
    Pair("t5", "t5", "add"),
    Pair("llama", "llama", "add"),
    Pair("llama", "t5", "replace"),
    Pair("bert", "gpt2", "replace"),
    Pair("bert", "t5", "llm-embed"),
    Pair("t5", "llama", "llm-embed"),
    Pair("llama", "t5", "align"),
    Pair("t5", "gpt2", "align"),
    Pair("llama", "qwen3", "kv"),
]


def written_keys(folder):
    """Every key in the safetensors files of a folder, with its size in bytes."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            sizes |= {key: tensors.get_tensor(key).nbytes for key in tensors.keys()}
    return sizes


# The body without a loss -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slm", ["t5", "mt5", "bart", "marian", "llama", "gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_last_hidden_state_gives_the_logits(zoo, slm):
    """
    The body's states times the output embeddings, plus a bias where there is one, are the head model's logits, at the
    response's positions: also where the SLM scales its states first (a tied T5) or projects them (OPT).
    """
    model, processor = zoo.compose(Pair("llama", slm, "replace"))
    if "final_logits_bias" in dict(model.slm.named_buffers()):
        model.slm.final_logits_bias.normal_()
    batch = make_batch(processor)
    labels = batch.pop("labels")
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
    states = model.model(**batch, decoder_input_ids=decoder_input_ids).last_hidden_state
    assert states.shape[:2] == labels.shape
    head = model.get_output_embeddings()
    logits = states @ head.weight.T
    if head.bias is not None:
        logits += head.bias
    logits += dict(model.slm.named_buffers()).get("final_logits_bias", 0)
    expected = model(**batch, labels=labels).logits
    if (cap := getattr(model.slm.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_body_without_response_predicts_the_first_token(request, kind):
    model, processor = request.getfixturevalue(kind)
    batch = make_batch(processor)
    labels = batch.pop("labels")
    first = model.model(**batch, use_cache=True)
    assert first.last_hidden_state.shape[1] == 1 and first.past_key_values.get_seq_length() > 0
    whole = model.model(**batch, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels))
    torch.testing.assert_close(first.last_hidden_state[:, 0], whole.last_hidden_state[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**batch).logits[:, 0], model(**batch, labels=labels).logits[:, 0])
    assert whole.past_key_values is None


# Outputs -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_that_are_asked_for(request, kind):
    model, processor = request.getfixturevalue(kind)
    batch = make_batch(processor)
    plain = model(**batch)
    assert plain.past_key_values is None and plain.hidden_states is None and plain.attentions is None

    outputs = model(**batch, output_hidden_states=True)
    causal = kind == "small_causal"
    prompt_length = batch["slm_input_ids"].shape[1] if causal else 0
    length = prompt_length + batch["labels"].shape[1] - causal
    num_layers = len(outputs.hidden_states) - 1
    assert num_layers == (3 if causal else 2)
    assert all(state.shape[:2] == (3, length) for state in outputs.hidden_states)
    cached = model(**batch, use_cache=True).past_key_values
    assert cached.get_seq_length() == length

    model.slm.set_attn_implementation("eager")
    attentions = model(**batch, output_attentions=True).attentions
    assert len(attentions) == num_layers and attentions[0].shape == (3, 4, length, length)
    torch.testing.assert_close(attentions[0].sum(dim=-1)[:, :, -1], torch.ones(3, 4))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_return_dict_false_gives_a_tuple(request, kind):
    model, processor = request.getfixturevalue(kind)
    batch = make_batch(processor)
    outputs = model(**batch)
    loss, logits = model(**batch, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
    model.config.return_dict = False
    assert type(model(**batch)) is tuple


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_labels_with_an_encoded_prompt(request, kind):
    """A prompt that was encoded before scores a response as the whole batch does, and the LLM may be gone by then."""
    model, processor = request.getfixturevalue(kind)
    batch = make_batch(processor)
    expected = model(**batch)
    labels = batch.pop("labels")
    prompt = model.encode_prompt(**batch)
    model.model.attach_llm(None)
    outputs = model(prompt=prompt, labels=labels)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=0, atol=0)


def test_gradient_reaches_the_projector_through_an_encoded_prompt(small):
    model, processor = small
    batch = make_batch(processor)
    labels = batch.pop("labels")
    model(prompt=model.encode_prompt(**batch), labels=labels).loss.backward()
    assert model.projector.layers[0].weight.grad.abs().max() > 0


# Padding and masks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_mask_may_be_boolean(request, kind):
    model, processor = request.getfixturevalue(kind)
    batch = make_batch(processor, side="left")
    expected = model(**batch).logits
    masks = {name: mask.bool() for name, mask in batch.items() if name.endswith("attention_mask")}
    torch.testing.assert_close(model(**{**batch, **masks}).logits, expected, rtol=0, atol=0)


# Cached states of the LLM ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("pair", "llm_layer"),
    # With keys and values there is a layer for each of the SLM's.
    [(pair, layer) for pair in FUSED for layer in ([None] if pair.fusion == "kv" else [-1, [0, 1, -1]])],
    ids=str,
)
@torch.no_grad()
def test_cached_states_stand_for_the_llm(zoo, tmp_path, pair, llm_layer, side):
    """States from the LLM, padded on any side, give the live LLM's logits, also to a model that was loaded without it."""
    model, processor = zoo.compose(pair, llm_layer=llm_layer)
    if isinstance(llm_layer, list):
        model.projector.layer_weights.normal_()
    batch = make_batch(processor)
    expected = model(**batch).logits
    states = model.model.llm_states(batch["input_ids"], batch["attention_mask"])
    num_states = (3 if isinstance(llm_layer, list) else 1) + (pair.fusion == "llm-embed")
    if pair.fusion == "kv":
        num_states = 2 * model.slm.config.num_hidden_layers
    assert states.shape == (*batch["input_ids"].shape, num_states, model.config.llm_state_size)

    lengths = batch["attention_mask"].sum(dim=1).tolist()
    width = states.shape[1]
    cached = torch.full_like(states, float("nan"))  # what stands in the padding must not matter
    for row, length in enumerate(lengths):
        place = slice(width - length, None) if side == "left" else slice(length)
        cached[row, place] = states[row, :length]
    cached = cached.nan_to_num(1e3)
    inputs = make_batch(processor, side=side)
    if pair.fusion not in ("add", "kv"):
        del inputs["input_ids"]
    model.save_pretrained(tmp_path)
    without_llm = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path, load_llm=False)
    for scorer in (model, without_llm):
        logits = scorer(**inputs, llm_hidden_states=cached).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        if num_states == 1:
            logits = scorer(**inputs, llm_hidden_states=cached[:, :, 0]).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_cached_states_may_be_in_another_dtype(zoo):
    model, processor = zoo.compose(Pair("llama", "t5", "llm-embed"))
    batch = make_batch(processor)
    states = model.model.llm_states(batch["input_ids"], batch["attention_mask"]).to(torch.bfloat16)
    expected = model(**batch, llm_hidden_states=states.float()).logits
    torch.testing.assert_close(model(**batch, llm_hidden_states=states).logits, expected, rtol=0, atol=0)


def test_wrong_cached_states_are_errors(zoo):
    model, processor = zoo.compose(Pair("llama", "t5", "add", (("llm_layer", (0, -1)),)))
    batch = make_batch(processor)
    batch, size = dict(batch), tuple(batch["input_ids"].shape)
    wrong = [
        (torch.zeros(*size, 2, 50), "takes 2 LLM state.* of width 48 for each token, got 2 of width 50"),
        (torch.zeros(*size, 48), "takes 2 LLM state.* of width 48 for each token, got 1 of width 48"),
        (torch.zeros(*size, 3, 48), "takes 2 LLM state.* of width 48 for each token, got 3 of width 48"),
        (torch.zeros(size[0], size[1] - 1, 2, 48), "one length, but .*`llm_hidden_states` is of shape"),
        (torch.zeros(*size), r"`llm_hidden_states` must be of shape .*llm_state_size\), got \(3, [0-9]+\)"),
    ]
    for states, text in wrong:
        with pytest.raises(ValueError, match=text):
            model(**batch, llm_hidden_states=states)
    del batch["input_ids"]
    with pytest.raises(ValueError, match='`fusion="add"` needs `input_ids` beside `llm_hidden_states`'):
        model(**batch, llm_hidden_states=torch.zeros(*size, 2, 48))


@pytest.mark.parametrize("pair", [*FUSED, Pair("gpt2", "gemma3", "kv"), Pair("roberta", "mistral", "align")], ids=str)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_decoding_by_hand(zoo, pair, name):
    """With the cache of an earlier pass, only the tokens behind it are passed; padded prompts are attended to as before."""
    model, processor = zoo.compose(pair)
    prompt = model.encode_prompt(**processor(PROMPTS, padding=True, return_tensors="pt"))
    causal = not model.slm.config.is_encoder_decoder
    tokens = torch.tensor([[5, 6, 7, 8]] * 3)
    whole = model(prompt=prompt, decoder_input_ids=tokens).logits
    first = model(prompt=prompt, use_cache=True, **{} if causal else {"decoder_input_ids": tokens[:, :1]})
    steps, cache = [first.logits], first.cache
    for step in (tokens[:, :2], tokens[:, 2:]) if causal else (tokens[:, 1:2], tokens[:, 2:]):
        outputs = model(prompt=prompt, decoder_input_ids=step, use_cache=True, **{name: cache})
        assert outputs.logits.shape[1] == step.shape[1]
        steps, cache = [*steps, outputs.logits], outputs.cache
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)


# What is refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["forward", "generate", "encode_prompt"])
def test_prompts_that_are_refused(small, call):
    """Forward, generate and encode_prompt refuse the same prompts, and say which and why."""
    model, processor = small
    read = getattr(model, call)
    batch = make_batch(processor)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with pytest.raises(ValueError, match="There is no prompt: pass `input_ids`"):
        read()
    with pytest.raises(ValueError, match=r"holds the LLM's padding token \(0\) but there is no `attention_mask`"):
        read(input_ids=ids)
    with pytest.raises(ValueError, match="The prompt is empty: the LLM needs at least one token to read"):
        read(input_ids=ids[:, :0], attention_mask=mask[:, :0])
    with pytest.raises(ValueError, match="must hold at least one prompt, found none: .* Leave empty batches out"):
        read(input_ids=ids[:0], attention_mask=mask[:0])
    emptied = mask.clone()
    emptied[1] = 0
    with pytest.raises(ValueError, match="Prompt 1 of the batch is empty"):
        read(input_ids=ids, attention_mask=emptied)
    for bad in (320, -1):
        foreign = ids.clone()
        foreign[2, 0] = bad
        with pytest.raises(
            ValueError, match=f"`input_ids` holds token {bad}, but the LLM's vocabulary has 320 tokens"
        ):
            read(input_ids=foreign, attention_mask=mask)
    with pytest.raises(
        ValueError, match=r"one length, but `input_ids` is of shape \(3, [0-9]+\), `attention_mask` is of"
    ):
        read(input_ids=ids, attention_mask=mask[:, 1:])
    with pytest.raises(
        ValueError, match=r"`input_ids` must be of shape \(batch_size, prompt_length\), got \([0-9]+,\)"
    ):
        read(input_ids=ids[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_tensor_is_refused(request, kind):
    model, processor = request.getfixturevalue(kind)
    batch, lists = make_batch(processor), processor(text=PROMPTS, text_target=RESPONSES)
    text = r"must be a tensor, got {}\. Text becomes tensors by .*return_tensors=\"pt\".*`model.generate\(\*\*batch\)`"
    for read, wrong, kind in (
        (model.generate, batch, "BatchEncoding"),
        (model, "Hello", "str"),
        (model.generate, ["a"], "list"),
    ):
        with pytest.raises(ValueError, match="`input_ids` " + text.format(kind)):
            read(wrong)
    with pytest.raises(ValueError, match="`labels` " + text.format("list")):
        model(**lists)
    lists.pop("labels")
    with pytest.raises(ValueError, match="`input_ids` " + text.format("list")):
        model.generate(**lists)


def test_align_needs_both_views(small_causal):
    model, processor = small_causal
    batch = make_batch(processor)
    with pytest.raises(
        ValueError, match="This batch lacks `slm_input_ids` and `alignment`. Make it with `LLM2SLMProc"
    ):
        model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    del batch["alignment"]
    with pytest.raises(ValueError, match="This batch lacks `alignment`"):
        model(**batch)


def test_prompts_longer_than_the_models_take(zoo):
    """The error names the model that can't take it, and its limit; positions kept for padding are not counted."""
    cases = [
        (Pair("bert", "t5", "replace"), "LLM", "BertModel", 128),
        (Pair("roberta", "t5", "replace"), "LLM", "RobertaModel", 127),
        (Pair("t5", "gpt2", "replace"), "SLM", "GPT2LMHeadModel", 128),
        (Pair("t5", "bart", "replace"), "SLM", "BartForConditionalGeneration", 128),
    ]
    for pair, part, name, limit in cases:
        model, _ = zoo.compose(pair)
        ids = torch.full((1, limit), 5)
        assert model.encode_prompt(ids).prompt_states.shape[1] == limit
        text = rf"The prompt is {limit + 1} tokens long .*the {part} \({name}\) takes at most {limit}\. Shorten it"
        for read in (model.encode_prompt, model.forward, model.generate):
            with pytest.raises(ValueError, match=text):
                read(torch.full((1, limit + 1), 5))


def test_the_limit_of_an_encoder_that_was_dropped_does_not_count(zoo):
    """BART's encoder takes 128 tokens; its decoder sees the prompt by cross-attention, which knows no positions."""
    model, _ = zoo.compose(Pair("t5", "bart", "replace", (("slm_encoder", "skip"),)))
    ids = torch.full((1, 129), 5)
    assert model.encode_prompt(ids).prompt_states.shape[1] == 129
    labels = torch.tensor([[7, 8]])
    logits = [model(ids + change, labels=labels).logits for change in (0, torch.eye(129, dtype=torch.long)[-1:])]
    assert logits[0].shape[1] == 2 and (logits[0] - logits[1]).abs().max() > 1e-4  # the last token is seen


def test_prompt_and_response_longer_than_the_slm_takes(small_causal):
    model, processor = small_causal
    batch = make_batch(processor, PROMPTS[:1], RESPONSES[:1])
    room = 128 - batch["slm_input_ids"].shape[1]
    batch["labels"] = torch.full((1, room + 1), 5)
    assert model(**batch).logits.shape[1] == room + 1
    batch["labels"] = torch.full((1, room + 2), 5)
    with pytest.raises(ValueError, match=r"are 129 tokens long .*the SLM \(LlamaForCausalLM\) takes at most 128"):
        model(**batch)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_refused(request, kind):
    model, processor = request.getfixturevalue(kind)
    batch = make_batch(processor)
    for token in (320, 5000, -1, -101):
        labels = batch["labels"].clone()
        labels[0, 1] = token
        with pytest.raises(ValueError, match=f"`labels` holds token {token}, but the SLM's vocabulary has 320 tokens"):
            model(**{**batch, "labels": labels})


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_llm(request, kind, tmp_path):
    """A model loaded without its LLM says what to give it, and what of it is held is projector and SLM."""
    model, processor = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path)
    loaded = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path, load_llm=False)
    assert loaded.llm is None
    assert [name for name, _ in loaded.named_parameters()] == [
        name for name, _ in model.named_parameters() if not name.startswith("model.llm.")
    ]
    batch = make_batch(processor)
    text = "loaded without its LLM .* can't read a prompt. Pass `llm_hidden_states=` .* or `prompt=`"
    for read in (loaded.forward, loaded.generate):
        with pytest.raises(ValueError, match=text):
            read(**batch)
    with pytest.raises(ValueError, match="`save_llm=True` needs the LLM"):
        loaded.save_pretrained(tmp_path / "again", save_llm=True)


# State dicts and checkpoints ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_without_the_llm(request, kind):
    model, _ = request.getfixturevalue(kind)
    held = {name for name, _ in model.named_parameters() if not name.startswith("model.llm.")}
    state_dict = model.state_dict()
    assert held <= set(state_dict)
    assert {key.split(".")[1] for key in state_dict} == {"projector", "slm"}
    assert {key.split(".")[0] for key in model.model.state_dict()} == {"projector", "slm"}
    wrapped = nn.Sequential(model).state_dict()
    assert set(wrapped) == {f"0.{key}" for key in state_dict}


@pytest.mark.parametrize(
    "kind, wrapping",
    [
        ("small", "none"),
        ("small", "body"),
        ("small", "sequential"),
        ("small_causal", "none"),
        ("small_causal", "body"),
        ("small_causal", "sequential"),
    ],
)
def test_state_dict_is_loaded_strictly(request, kind, wrapping):
    """With the LLM attached, its keys are not missing, wherever the model lies; those of projector and SLM would be."""
    model, _ = request.getfixturevalue(kind)
    llm = {name: parameter.clone() for name, parameter in model.llm.named_parameters()}
    state_dict = {key: value + 1 for key, value in model.state_dict().items()}
    target, keys = {
        "none": (model, state_dict),
        "body": (model.model, {key.removeprefix("model."): value for key, value in state_dict.items()}),
        "sequential": (nn.Sequential(model), {f"0.{key}": value for key, value in state_dict.items()}),
    }[wrapping]
    result = target.load_state_dict(keys, strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, state_dict[name]), name
    for name, parameter in model.llm.named_parameters():
        assert torch.equal(parameter, llm[name])

    key = next(key for key in keys if key.endswith("projector.layers.0.weight"))
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        target.load_state_dict({k: v for k, v in keys.items() if k != key}, strict=True)


def test_save_drops_what_is_the_llms(small, tmp_path):
    """A state dict from elsewhere (a training framework's) may hold the LLM; a checkpoint never does."""
    model, processor = small
    foreign = {**model.state_dict(), **{f"model.llm.{name}": p for name, p in model.llm.named_parameters()}}
    assert len(foreign) > len(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=foreign)
    keys = written_keys(tmp_path)
    assert keys and not any(".llm." in key for key in keys)
    batch = make_batch(processor)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_shards(request, kind, tmp_path):
    model, processor = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = list(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written_keys(tmp_path))
    loaded = AutoModel.from_pretrained(tmp_path)
    for (name, parameter), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    batch = make_batch(processor)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("llm", ["t5", "bart", "bert", "llama", "gpt2"])
def test_self_contained_checkpoint(zoo, tmp_path, llm):
    """`save_llm=True` puts what reads into `llm/`, no decoder; the model then loads when the LLM's own folder is gone."""
    pair = Pair(llm, "t5", "replace")
    source, slm = zoo.sources(pair)
    shutil.copytree(source, tmp_path / "source")
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(tmp_path / "source", slm, fusion="replace")
    processor = LLM2SLMProcessor.from_llm_slm_pretrained(tmp_path / "source", slm, fusion="replace")
    batch = make_batch(processor)
    logits = model(**batch).logits
    model.save_pretrained(tmp_path / "slim")
    model.save_pretrained(tmp_path / "whole", save_llm=True)
    shutil.rmtree(tmp_path / "source")

    with pytest.raises(OSError, match="could not be loaded"):
        AutoModel.from_pretrained(tmp_path / "slim")
    loaded = AutoModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(loaded(**batch).logits, logits, rtol=0, atol=1e-6)
    held = written_keys(tmp_path / "whole" / "llm")
    body = model.llm.get_encoder() if model.llm.config.is_encoder_decoder else model.llm
    assert sum(held.values()) == sum(parameter.nbytes for parameter in body.parameters())
    assert not any("decoder" in key or "lm_head" in key for key in held)
    assert written_keys(tmp_path / "whole") == written_keys(tmp_path / "slim")

    # Saved slim again, it names no folder that is gone.
    loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "llm").exists()
    again = AutoModel.from_pretrained(tmp_path / "again", llm_model=loaded.llm)
    torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=1e-6)


def test_self_contained_checkpoint_of_several_processes(small, tmp_path):
    """Only the main process writes, in shards of the size that was asked for, and deletes what it wrote before."""
    model, _ = small
    model.save_pretrained(tmp_path, is_main_process=False, save_llm=True)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    model.save_pretrained(tmp_path, save_llm=True)
    model.save_pretrained(tmp_path, save_llm=True, max_shard_size="40KB")
    for folder in (tmp_path, tmp_path / "llm"):
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1 and not (folder / "model.safetensors").exists()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.llm.parameters(), model.llm.parameters()))


def test_an_llm_that_can_not_be_saved_is_not_recorded(small, tmp_path):
    model, _ = small
    model.model.attach_llm(None)
    with pytest.raises(ValueError, match="`save_llm=True` needs the LLM"):
        model.save_pretrained(tmp_path, save_llm=True)
    assert model.config.llm_in_checkpoint is False


@pytest.mark.parametrize("kind", KINDS)
def test_resize_token_embeddings(request, kind, tmp_path):
    """The SLM's vocabulary grows, the LLM's does not; new tokens can be scored, saved and loaded."""
    model, processor = request.getfixturevalue(kind)
    batch = make_batch(processor)
    logits = model(**batch).logits.detach()
    model.resize_token_embeddings(333, mean_resizing=False)
    assert model.config.vocab_size == model.config.slm_config.vocab_size == 333
    assert model.get_input_embeddings().num_embeddings == 333
    assert model.llm.get_input_embeddings().num_embeddings == model.config.llm_config.vocab_size == 320
    torch.testing.assert_close(model(**batch).logits[..., :320], logits, rtol=0, atol=1e-5)
    batch["labels"][0, 0] = 332
    loss = model(**batch).loss
    loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).loss, loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("resized", [True, False])
@pytest.mark.parametrize(
    "pair", [Pair("t5", "t5", "add"), Pair("llama", "qwen3", "kv"), Pair("mpnet", "gpt2", "add")], ids=str
)
def test_padding_token_that_was_added_to_the_tokenizer(zoo, tmp_path, pair, resized):
    """It stands where nothing is read. As a real token it is refused, since the frozen LLM can't learn it."""
    model, processor = zoo.compose(pair)
    processor = copy.deepcopy(processor)
    options = {"padding": True, "return_tensors": "pt"}
    expected = model(**processor(PROMPTS, text_target=RESPONSES, **options)).logits
    for tokenizer in {id(part): part for part in (processor.tokenizer, processor.llm_tokenizer)}.values():
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if resized:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    batch = processor(PROMPTS, text_target=RESPONSES, **options)
    assert int(batch["input_ids"].max()) == 320
    torch.testing.assert_close(model(**batch).logits[..., :320], expected, rtol=0, atol=1e-5)
    rows = [{"prompt": prompt, "completion": response} for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert len(cache_llm_states(rows, model, processor, tmp_path)) == 3
    with pytest.raises(
        ValueError, match="holds token 320, but the LLM's vocabulary has 320 tokens.* is frozen and can't"
    ):
        model(**processor([f"{prompt}<|pad|>" for prompt in PROMPTS], **options))


@pytest.mark.parametrize(("slm", "what"), [("bart", "response is 129"), ("llama", r"prompt \(\d+\) and the response")])
def test_a_response_beyond_the_slms_limit(zoo, slm, what):
    """The error says what is too long, for whom, and how to cut it; cut so, it trains."""
    model, processor = zoo.compose(Pair("bert", slm, "replace"))
    batch = processor(text=PROMPTS[:1], text_target=["word " * 200], padding=True, return_tensors="pt")
    labels = batch["labels"][:, :129]
    assert labels.shape == (1, 129)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=rf"{what}.* takes at most 128\. Cut them: .*`max_response_length`"):
        model(**inputs, labels=labels)
    assert model(**inputs, labels=labels[:, :64]).loss.isfinite()


def test_a_state_dict_leaves_the_model_as_it_was(small):
    """With its LLM, and when the LLM was taken away."""
    model = small[0]
    llm, keys = model.llm, set(model.state_dict())
    assert model.llm is llm and keys and not any(".llm." in key for key in keys)
    model.model.attach_llm(None)
    assert set(model.state_dict()) == keys
    assert model.llm is None and model.train().training
