"""Composing: what is refused and why, what is chosen by default, models by name and in memory."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import FAMILIES, PROMPTS, RESPONSES, Pair
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
    FNetConfig,
    FNetModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    ViTConfig,
)

from transformers_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from transformers_llm2slm.composition import tokenizers_equal

compose = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained


def test_unknown_fusion_names_the_choices(zoo):
    llm, slm = zoo.sources(Pair("t5", "t5", "add"))
    with pytest.raises(
        ValueError, match="`fusion` must be one of 'add', 'replace', 'llm-embed', 'align', 'kv', got 'concat'"
    ):
        compose(llm, slm, fusion="concat")


def test_unknown_projector_init_names_the_choices(zoo):
    llm, slm = zoo.sources(Pair("t5", "t5", "add"))
    with pytest.raises(
        ValueError, match="`projector_init` must be one of 'random', 'zero', 'identity', 'fit', got 'one'"
    ):
        compose(llm, slm, projector_init="one")


def test_add_with_two_tokenizers_is_refused(zoo):
    llm, slm = zoo.sources(Pair("t5", "t5", "align"))
    message = r"must share one tokenizer; expected equal ones, found .* tokens and .* Use `fusion=\"align\"`"
    with pytest.raises(ValueError, match=message):
        compose(llm, slm, fusion="add")
    with pytest.raises(ValueError, match=message):
        LLM2SLMProcessor.from_llm_slm_pretrained(llm, slm, fusion="add")


def test_default_fusion_follows_the_tokenizers(zoo):
    assert compose(*zoo.sources(Pair("t5", "t5", "add"))).config.fusion == "add"
    two = zoo.sources(Pair("t5", "t5", "align"))
    assert compose(*two).config.fusion == "align"
    assert compose(*two, slm_encoder="skip").config.fusion == "replace"


def test_tokenizers_equal_needs_more_than_equal_vocabularies(zoo):
    bpe = zoo.tokenizers["bpe"]
    other = type(bpe)(tokenizer_object=type(bpe.backend_tokenizer).from_str(bpe.backend_tokenizer.to_str()))
    assert tokenizers_equal(bpe, other)
    from tokenizers import normalizers

    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert bpe.get_vocab() == other.get_vocab() and not tokenizers_equal(bpe, other)
    assert not tokenizers_equal(bpe, zoo.tokenizers["unigram"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_init": "zero", "fusion": "replace"}, '`projector_init="zero"` needs `fusion="add"` or `"align"`'),
        ({"projector_init": "fit"}, '`projector_init="fit"` needs `fit_prompts='),
        (
            {"projector_init": "identity"},
            "`projector_residual=True` needs an LLM and an SLM of equal width, got 32 and 48",
        ),
        ({"slm_encoder": "skip"}, '`slm_encoder="skip"` needs an encoder-decoder SLM, got a decoder-only `llama`'),
        ({"llm_layer": 9}, r"`llm_layer` must lie in \[-4, 3\] for an LLM of 3 layers, got 9"),
        ({"slm_layers": 2}, "Give either an SLM, or `slm_layers` to cut one from the LLM, and not both"),
        ({"projector_activation": "foo"}, "`projector_activation` must be one of .*'gelu'.*, got 'foo'"),
        ({"fusoin": "add"}, r"got unknown argument\(s\) fusoin"),
    ],
)
def test_impossible_options_are_refused(zoo, options, message):
    llm, slm = zoo.sources(Pair("t5", "llama", "add"))
    with pytest.raises(Exception, match=message):
        compose(llm, slm, **options)


def test_neither_slm_nor_layers(zoo):
    with pytest.raises(ValueError, match="Give either an SLM, or `slm_layers`"):
        compose(zoo.sources(Pair("t5", "t5", "add"))[0])


def test_models_that_can_not_take_part_say_why(zoo, tmp_path):
    llm, slm = zoo.sources(Pair("t5", "t5", "add"))
    bert = zoo.checkpoint("mpnet", "bpe", "llm")
    with pytest.raises(ValueError, match="`mpnet` model can't be the SLM: .*no `AutoModelForCausalLM`"):
        compose(llm, bert)
    vit = tmp_path / "vit"
    AutoModel.from_config(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(vit)
    with pytest.raises(ValueError, match="ViTModel can't be the LLM: it reads `pixel_values`, not text"):
        compose(str(vit), slm, fusion="replace")
    looks_ahead = BertLMHeadModel(BertConfig(**FAMILIES["bert"]().to_diff_dict()))
    with pytest.raises(
        ValueError, match="can't be the SLM: its logits depend on later tokens .*Set `is_decoder=True`"
    ):
        compose(llm, looks_ahead, fusion="replace")


def test_models_that_padding_confuses_are_refused(zoo):
    """FNet mixes all positions and RecurrentGemma runs through them, so padding would change a prompt's answer."""
    llm, slm = zoo.sources(Pair("t5", "t5", "add"))
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    fnet = FNetModel(FNetConfig(num_hidden_layers=1, **sizes))
    with pytest.raises(ValueError, match="FNetModel can't be the LLM: its states change with padding"):
        compose(fnet, slm, fusion="replace")
    recurrent = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, lru_width=32, **sizes)
    )
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM can't be the SLM: its logits change with padding"):
        compose(llm, recurrent, fusion="replace")
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM can't be the SLM: its logits change with padding"):
        compose(llm, recurrent.to(torch.bfloat16), fusion="replace")


def test_rounding_by_shape_is_no_padding():
    """In bfloat16, processors without it round batches of other shapes apart; in float32 such a difference is none of rounding."""
    llm, slm = AutoModel.from_config(FAMILIES["llama"]()), AutoModelForCausalLM.from_config(FAMILIES["llama"]())

    for norm in (llm.norm, slm.model.norm):
        norm.register_forward_hook(lambda module, args, output: output * (1 + 0.1 * (output.shape[1] % 4)))
    with pytest.raises(ValueError, match=r"can't be the SLM: its logits change with padding"):
        compose(llm, slm, fusion="replace")
    slm.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"can't be the LLM: its states change with padding"):
        compose(llm, slm, fusion="replace")
    compose(llm.to(torch.bfloat16), slm, fusion="replace")


def test_slm_checkpoint_without_its_head_is_refused(zoo, tmp_path):
    body = AutoModel.from_config(FAMILIES["llama"]())
    body.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not hold a whole SLM LlamaForCausalLM: missing lm_head.weight"):
        compose(zoo.sources(Pair("t5", "t5", "add"))[0], str(tmp_path), fusion="replace")


@pytest.mark.parametrize(
    ("family", "auto", "parts"),
    [
        ("t5", AutoModelForSeq2SeqLM, {"shared", "encoder", "decoder"}),
        ("bart", AutoModelForSeq2SeqLM, {"shared", "encoder", "decoder"}),
        ("bert", AutoModelForMaskedLM, {"embeddings", "encoder"}),
        ("llama", AutoModelForCausalLM, {"embed_tokens", "layers", "norm", "rotary_emb"}),
    ],
)
@torch.no_grad()
def test_llm_in_memory_is_the_llm_by_name(zoo, family, auto, parts):
    """Given as an object, with whatever head, the LLM is the same reading part, shares its weights and is left as it was."""
    folder = zoo.checkpoint(family, "bpe", "llm")
    named = compose(folder, zoo.checkpoint("t5", "bpe", "slm"), fusion="replace")
    whole = auto.from_pretrained(folder)
    keys = set(whole.state_dict())
    slm = AutoModelForSeq2SeqLM.from_pretrained(zoo.checkpoint("t5", "bpe", "slm"))
    torch.manual_seed(0)
    model = compose(whole, slm, fusion="replace")
    assert {name for name, _ in model.llm.named_children()} == parts
    assert model.config.llm_fingerprint == named.config.llm_fingerprint
    assert set(whole.state_dict()) == keys
    shared = {p.data_ptr() for p in whole.parameters()}
    assert all(p.data_ptr() in shared for p in model.llm.parameters())
    ids = torch.tensor([[5, 6, 7, 2]])
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model.model.llm_states(ids, mask), named.model.llm_states(ids, mask))


@torch.no_grad()
def test_composing_leaves_both_models_as_they_are(zoo):
    """Bit for bit: neither LLM nor SLM is initialised anew."""
    llm, slm = zoo.sources(Pair("bart", "llama", "replace"))
    model = compose(llm, slm, fusion="replace")
    for part, original in (
        (model.slm, AutoModelForCausalLM.from_pretrained(slm)),
        (model.llm, AutoModel.from_pretrained(llm)),
    ):
        expected = dict(original.named_parameters())
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, expected[name]), name


@torch.no_grad()
def test_one_model_in_both_parts(zoo):
    """The SLM is a copy: the LLM is frozen, and the SLM trained."""
    model = AutoModelForCausalLM.from_pretrained(zoo.checkpoint("llama", "bpe", "llm"))
    hybrid = compose(model, model, fusion="replace")
    assert all(parameter.requires_grad for parameter in hybrid.slm.parameters())
    frozen = {id(parameter) for parameter in hybrid.llm.parameters()}
    assert not any(id(parameter) in frozen for parameter in hybrid.slm.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert", "t5"])
@torch.no_grad()
def test_models_that_share_an_llm_read_its_own_states(zoo, family):
    """However often it was asked for its states before and since, by itself or by others."""
    source = zoo.checkpoint(family, "bpe", "llm")
    llm = (AutoModelForSeq2SeqLM if family == "t5" else AutoModel).from_pretrained(source)
    slm = zoo.checkpoint("llama", "bpe", "slm")
    ids = torch.tensor([[5, 9, 17, 30, 2, 8]])
    body = llm.get_encoder() if family == "t5" else llm
    for asked_first in (False, True, True):
        expected = body(input_ids=ids, output_hidden_states=True).hidden_states if asked_first else None
        model = compose(llm, slm, fusion="replace", llm_layer=[1, -1])
        states = model.model.llm_states(ids, torch.ones_like(ids))
        expected = expected or body(input_ids=ids, output_hidden_states=True).hidden_states
        assert len(expected) == model.config.num_llm_layers + 1
        for index, layer in enumerate((1, -1)):
            torch.testing.assert_close(states[:, :, index], expected[layer], rtol=0, atol=1e-5)


def test_models_can_be_pickled(zoo):
    """With the LLM, whose class is made on the spot."""
    for pair in (Pair("t5", "t5", "add"), Pair("llama", "gpt2", "replace")):
        model, processor = zoo.compose(pair)
        loaded = pickle.loads(pickle.dumps(model))
        assert type(loaded.llm) is type(model.llm)
        assert not any(parameter.requires_grad for parameter in loaded.llm.parameters())
        batch = processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_llm_that_computes_its_positions(zoo):
    """Marian leaves its sinusoidal positions out of its checkpoints: they are not missing, and not random."""
    folder = zoo.checkpoint("marian", "bpe", "llm")
    model = compose(folder, zoo.checkpoint("t5", "bpe", "slm"), fusion="replace")
    ids = torch.tensor([[5, 6, 7, 2]])
    expected = AutoModelForSeq2SeqLM.from_pretrained(folder).get_encoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.model.llm_states(ids, torch.ones_like(ids))[:, :, 0], expected)


def test_encoder_decoder_llm_keeps_no_decoder(zoo):
    for family in ("t5", "bart", "t5gemma"):
        folder = zoo.checkpoint(family, "bpe", "llm")
        model = compose(folder, zoo.checkpoint("t5", "bpe", "slm"), fusion="replace")
        names = [name for name, _ in model.llm.named_parameters()]
        assert names and not any("decoder" in name for name in names)
        with pytest.raises(RuntimeError, match="The LLM's decoder was dropped when the model was composed"):
            model.llm.get_decoder()(input_ids=torch.tensor([[1]]))


def test_arguments_reach_the_part_they_name(zoo):
    llm, slm = zoo.sources(Pair("llama", "t5", "replace"))
    model = compose(llm, slm, fusion="replace", dtype=torch.bfloat16, slm_dtype=torch.float32)
    assert model.llm.dtype is torch.bfloat16 and model.slm.dtype is torch.float32
    model = compose(llm, slm, fusion="replace", llm_attn_implementation="eager")
    assert model.llm.config._attn_implementation == "eager"
    assert model.slm.config._attn_implementation == "sdpa"


def test_dtype_of_a_cut_slm(zoo):
    llm = zoo.checkpoint("llama", "bpe", "llm")
    model = compose(llm, slm_layers=2, llm_dtype="bfloat16", slm_dtype="float32")
    assert model.llm.dtype is torch.bfloat16
    assert {p.dtype for p in (*model.slm.parameters(), *model.projector.parameters())} == {torch.float32}
    with pytest.raises(TypeError, match="An SLM cut from the LLM is not loaded, so `slm_revision` says nothing"):
        compose(llm, slm_layers=2, slm_revision="main")


def test_provenance_is_recorded(zoo):
    llm, slm = zoo.sources(Pair("llama", "t5", "replace"))
    config = compose(llm, slm, fusion="replace").config
    assert (config.llm_name_or_path, config.slm_name_or_path) == (llm, slm)
    assert config.llm_dtype == "float32" and config.llm_fingerprint.startswith("bf16-sample:")
    assert config.llm_config.to_diff_dict()["model_type"] == "llama" and config.slm_config.model_type == "t5"


def test_trained_model_generates_what_it_learned(zoo):
    """The whole of it: composed, trained by hand to memorise three answers, it writes them."""
    for pair in (Pair("bert", "t5", "align"), Pair("t5", "llama", "replace")):
        model, processor = zoo.compose(pair)
        batch = processor(text=PROMPTS, text_target=RESPONSES, padding=True, return_tensors="pt")
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss = torch.tensor(torch.inf)
        for _ in range(600):  # how many it takes is a matter of the tokenizers, which are not trained alike each time
            if loss.item() < 0.05:
                break
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.05
        inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
        written = processor.batch_decode(model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True)
        assert [text.strip() for text in written] == RESPONSES
