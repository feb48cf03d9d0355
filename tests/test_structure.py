"""What a model offers, found out from the model itself."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from transformers_llm2slm.configuration_llm2slm import encoder_text_config
from transformers_llm2slm.structure import (
    DroppedModule,
    drop_module,
    embed_tokens,
    join_tied_embeddings,
    layer_classes,
    move_padding,
    position_limit,
)


def test_move_padding():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
    values = torch.arange(12).reshape(3, 4)
    assert move_padding(values, mask, "right")[:, :2].tolist() == [[1, 2], [4, 7], [8, 9]]
    assert move_padding(values, mask, "left")[:, 2:].tolist() == [[1, 2], [4, 7], [10, 11]]
    states = values.unsqueeze(-1).expand(3, 4, 5).float()
    assert torch.equal(move_padding(states, mask, "left")[..., 3], move_padding(values, mask, "left").float())


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "pegasus", "t5gemma", "gpt2", "opt", "llama", "gemma3"])
@torch.no_grad()
def test_embed_tokens_is_what_the_model_computes(family):
    """Logits from `input_ids` equal those from the embeddings, also where the encoder scales them afterwards."""
    config = FAMILIES[family]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    ids = torch.tensor([[5, 9, 17, 2]])
    extra = {"decoder_input_ids": ids[:, :1]} if config.is_encoder_decoder else {}
    expected = model(input_ids=ids, **extra).logits
    torch.testing.assert_close(model(inputs_embeds=embed_tokens(model, ids), **extra).logits, expected)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "bart", "marian", "gpt2", "opt"])
@torch.no_grad()
def test_position_limit_is_what_the_model_takes(family):
    """At the limit the model runs, one token beyond it fails: RoBERTa's two rows for padding are not counted."""
    model = AutoModel.from_config(FAMILIES[family]()).eval()
    body = model.get_encoder() if model.config.is_encoder_decoder else model
    limit = position_limit(encoder_text_config(model.config), model)
    assert limit == {"roberta": 127, "mpnet": 126}.get(family, 128)  # padding tokens 0 and 1
    body(input_ids=torch.full((1, limit), 5))
    with pytest.raises(Exception, match="index|size|range"):
        body(input_ids=torch.full((1, limit + 1), 5))


def test_no_position_limit_for_relative_positions():
    assert position_limit(FAMILIES["t5"]()) is None


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma", "marian"])
@torch.no_grad()
def test_drop_module_keeps_the_rest_working(family):
    """Without its encoder a model still decodes from encoder output, ties its weights and names no dropped key."""
    model = AutoModelForSeq2SeqLM.from_config(FAMILIES[family]()).eval()
    ids = torch.tensor([[5, 9, 17, 2]])
    encoded = model.get_encoder()(input_ids=ids)
    expected = model(encoder_outputs=encoded, decoder_input_ids=ids).logits
    drop_module(model, model.get_encoder(), "The encoder")
    assert isinstance(model.get_encoder(), DroppedModule)
    model.tie_weights()
    torch.testing.assert_close(model(encoder_outputs=encoded, decoder_input_ids=ids).logits, expected)
    assert not any("encoder." in key.removeprefix("model.").split("decoder")[0] for key in model.state_dict())
    with pytest.raises(RuntimeError, match="The encoder was dropped"):
        model(input_ids=ids, decoder_input_ids=ids)


@pytest.mark.parametrize("family, joined", [("t5", 2), ("bart", 2), ("marian", 2), ("t5gemma", 0), ("gemma3", 0)])
@torch.no_grad()
def test_join_tied_embeddings(family, joined):
    """The same model with fewer embeddings; an LM head, or an embedding of its own, stays what it is."""
    config = FAMILIES[family]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    ids = torch.tensor([[5, 9, 17, 2]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :2]} if config.is_encoder_decoder else {})
    expected, names, count = model(**inputs).logits, model.state_dict().keys(), len(list(model.modules()))
    join_tied_embeddings(model)
    assert len(list(model.modules())) == count - joined
    assert model.state_dict().keys() == names
    assert torch.equal(model(**inputs).logits, expected)
    model.resize_token_embeddings(100)
    assert {p.shape[0] for name, p in model.named_parameters(remove_duplicate=False) if "embed_tokens" in name} == {
        100
    }


def test_embeddings_that_differ_are_not_joined():
    """One tensor, but a decoder that scales what it looks up otherwise."""
    model = AutoModelForSeq2SeqLM.from_config(FAMILIES["bart"]())
    model.model.decoder.embed_tokens.embed_scale = 1.0
    join_tied_embeddings(model)
    assert model.model.decoder.embed_tokens is not model.model.shared
    assert model.model.encoder.embed_tokens is model.model.shared


def test_layer_classes_without_dropped_parts():
    model = AutoModelForSeq2SeqLM.from_config(FAMILIES["bart"]())
    assert layer_classes(model) == {"BartEncoderLayer", "BartDecoderLayer"}
    drop_module(model, model.get_encoder(), "The encoder")
    assert layer_classes(model) == {"BartDecoderLayer"}
