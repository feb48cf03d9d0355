"""Exported models: equal to their origin, with all that `generate` offers, saved, loaded and refused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, SMALL, SMALL_CAUSAL, Pair, Zoo
from transformers import AutoModel, AutoProcessor, LogitsProcessorList, pipeline

from transformers_llm2slm import LLM2SLMExportedModel, LLM2SLMForConditionalGeneration
from transformers_llm2slm.cli import main
from transformers_llm2slm.export import processor_of
from transformers_llm2slm.export_graphs import ATTENTION, export_attention, export_mask, exporting, graphs_of
from transformers_llm2slm.exported import ONE_THREAD, check_export

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
# Both kinds of SLM, of several families; both kinds of LLM; every fusion; an encoder of the SLM that is skipped.
EXPORTED = (
    SMALL,
    Pair("t5", "t5", "replace", (("slm_encoder", "skip"),)),
    Pair("bert", "bart", "align"),
    SMALL_CAUSAL,
    Pair("llama", "gpt2", "llm-embed"),
    Pair("qwen3", "gemma3", "add", (("llm_layer", (1, 2)),)),
    Pair("llama", "qwen3", "kv"),
)


@pytest.fixture(scope="module", params=EXPORTED, ids=str)
def exported(request: pytest.FixtureRequest, zoo: Zoo):
    """The model, its processor, and what was exported of it for ONNX Runtime, loaded from its folder."""
    return *zoo.compose(request.param), LLM2SLMExportedModel.from_pretrained(zoo.export(request.param).folder)


@pytest.fixture(scope="module")
def folder(zoo: Zoo) -> Path:
    """An export of the smallest pair in int8, with its processor."""
    return zoo.export(SMALL, int8=True).folder


def test_exported_model_gives_the_logits_of_its_origin_over_padded_prompts(exported):
    model, processor, graphs = exported
    for side in ("left", "right"):
        processor.tokenizer.padding_side = processor.llm_tokenizer.padding_side = side
        inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
        options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
        expected, found = (writer.generate(**inputs, **options) for writer in (model, graphs))
        assert torch.equal(expected.sequences, found.sequences)
        for first, second in zip(expected.logits, found.logits, strict=True):
            torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_exported_model_takes_what_generate_takes(exported):
    model, processor, graphs = exported
    inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.5},
    ):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **GREEDY | options)
        torch.manual_seed(0)
        assert torch.equal(graphs.generate(**inputs, **GREEDY | options), expected), options


def test_prompt_is_read_apart_from_writing(exported):
    model, processor, graphs = exported
    inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
    prompt = graphs.encode_prompt(**inputs)
    assert prompt.prompt_states.shape[:2] == prompt.attention_mask.shape
    assert torch.equal(graphs.generate(prompt=prompt, **GREEDY), model.generate(**inputs, **GREEDY))


def test_int8_rounds_the_matrices_and_stays_near(zoo, small, folder):
    model, processor = small
    in_float32 = zoo.export(SMALL).folder
    rounded, exact = (LLM2SLMExportedModel.from_pretrained(path) for path in (folder, in_float32))
    assert check_export(model, exact) < 1e-5
    assert 1e-5 < check_export(model, rounded) < 0.1

    def operators(path: Path) -> set[str]:
        return {node.op_type for node in onnx.load(path / "step.onnx", load_external_data=False).graph.node}

    assert "MatMulNBits" in operators(folder) and "MatMulNBits" not in operators(in_float32)
    assert rounded.config.export["int8"] is True and exact.config.export["int8"] is False


def test_logging_of_the_process_is_left_alone():
    """In a process of its own, as pytest's handlers would hide what a library sets up."""
    code = (
        "import logging; from transformers_llm2slm.export import int8_weights; int8_weights('onnx'); "
        "root = logging.getLogger(); print(root.level == logging.WARNING, root.handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_auto_classes_and_pipeline_load_an_export(folder, small):
    model, processor = small
    loaded = AutoModel.from_pretrained(folder)
    assert isinstance(loaded, LLM2SLMExportedModel)
    inputs = AutoProcessor.from_pretrained(folder)(text=PROMPTS, padding=True, return_tensors="pt")
    tokens = loaded.generate(**inputs, **GREEDY)
    assert tokens.shape == (len(PROMPTS), 9)
    writer = pipeline("text2text-generation", model=str(folder))
    texts = [answer["generated_text"] for answer in writer(PROMPTS, **GREEDY)]
    assert texts == processor.batch_decode(tokens, skip_special_tokens=True)


def test_processor_is_exported_too(folder, small, tmp_path, caplog, monkeypatch):
    """The one that lies beside the checkpoint, or the one that was given; and it is found beside a loaded export."""
    monkeypatch.setattr(logging.getLogger("transformers_llm2slm"), "propagate", True)
    model, processor = small
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert (
        processor_of(AutoModel.from_pretrained(tmp_path / "model")).tokenizer.get_vocab()
        == processor.tokenizer.get_vocab()
    )
    assert not caplog.records
    assert processor_of(model) is None
    assert "The export will have no processor" in caplog.text and "was composed in memory" in caplog.text
    loaded = AutoModel.from_pretrained(folder)
    (answer,) = pipeline("text2text-generation", model=loaded)(PROMPTS[0], **GREEDY)
    tokens = loaded.generate(**processor(PROMPTS[0], return_tensors="pt"), **GREEDY)
    assert answer["generated_text"] == processor.decode(tokens[0], skip_special_tokens=True)


def test_export_is_saved_again(folder, tmp_path, small):
    _, processor = small
    first = LLM2SLMExportedModel.from_pretrained(folder, num_threads=1)
    first.save_pretrained(tmp_path)
    inputs = processor(text=PROMPTS[:1], return_tensors="pt")
    again = LLM2SLMExportedModel.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**inputs, **GREEDY), first.generate(**inputs, **GREEDY))
    assert first.exported.runners["step"].session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("pair", [SMALL, SMALL_CAUSAL], ids=str)
def test_openvino(zoo, pair):
    pytest.importorskip("openvino")
    model, processor = zoo.compose(pair)
    graphs = LLM2SLMExportedModel.from_pretrained(zoo.export(pair, "openvino").folder)
    inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(graphs.generate(**inputs, **GREEDY | options), model.generate(**inputs, **GREEDY | options))


@pytest.mark.parametrize(("pair", "format"), [(SMALL_CAUSAL, "openvino"), (SMALL, "onnx")], ids=str)
def test_shortlist_is_built_in(zoo, tmp_path, format, pair):
    pytest.importorskip(format)
    model, processor = zoo.compose(pair)
    inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
    usual = set(model.generate(**inputs, **GREEDY).flatten().tolist())
    model.shortlist = [token for token in range(model.config.vocab_size) if token % 4 == 0 and token not in usual]
    for name, int8 in (("float32", False), ("int8", True)):
        graphs = model.export(tmp_path / name, format=format, int8=int8)
        found = graphs.generate(**inputs, **GREEDY)
        assert int8 or torch.equal(found, model.generate(**inputs, **GREEDY))
        special = {graphs.generation_config.pad_token_id, graphs.generation_config.eos_token_id}
        assert set(found.flatten().tolist()) <= set(model.shortlist) | special
    graphs = LLM2SLMExportedModel.from_pretrained(tmp_path / "float32")
    assert graphs.shortlist == model.shortlist
    with pytest.raises(ValueError, match="writes by the shortlist that it was exported with"):
        graphs.generate(**inputs, shortlist=[])
    with pytest.raises(AttributeError, match="set it before you export"):
        graphs.shortlist = None


def test_command_line_exports_and_generates(small, tmp_path, capsys):
    model, processor = small
    model.save_pretrained(tmp_path / "model", save_llm=True)
    processor.save_pretrained(tmp_path / "model")

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "seconds" in run("export", tmp_path / "model", tmp_path / "graphs")
    manifest = json.loads((tmp_path / "graphs" / "export.json").read_text())
    assert manifest["components"].keys() == {"prompt", "cross", "step"}
    answers = [run("generate", tmp_path / name, PROMPTS[0], "--max-new-tokens", 6) for name in ("model", "graphs")]
    assert answers[0] == answers[1] and answers[0].strip()


def test_what_is_exported_is_left_as_it_was(zoo, small):
    model, before = zoo.export(SMALL).model, small[0].state_dict()
    assert model.training and model.slm.training and not model.llm.training
    attention, head = model.slm.config._attn_implementation, model.slm.get_output_embeddings().weight
    with exporting(model.slm, ATTENTION):
        assert model.slm.config._attn_implementation == ATTENTION
        assert graphs_of(model)["step"].axes["keys"] == (0, 2)
    assert model.slm.config._attn_implementation == attention and model.slm.get_output_embeddings().weight is head
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("length", [1, 3])
def test_attention_of_graphs_is_attention(length):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, length, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    mask, bias = torch.randn(2, 1, length, 5, generator=generator), torch.randn(1, 6, length, 5, generator=generator)
    for biases in (
        {"attention_mask": mask},
        {"attention_mask": None, "position_bias": bias},
        {"attention_mask": mask, "position_bias": bias},
    ):
        added = sum(tensor for tensor in biases.values() if tensor is not None)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, added, scale=0.3, enable_gqa=True
        )
        found, _ = export_attention(torch.nn.Module(), query, key, value, scaling=0.3, **biases)
        torch.testing.assert_close(found.transpose(1, 2), expected)


def test_mask_of_graphs_is_left_out_where_all_is_seen():
    sizes = {"batch_size": 1, "kv_length": 5, "q_offset": 4, "dtype": torch.float32}
    assert export_mask(q_length=1, allow_is_causal_skip=True, **sizes) is None
    for needed in (
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]]).bool()},
        {"local_size": 2},
        {"allow_is_causal_skip": False},
    ):
        assert export_mask(q_length=1, **{"allow_is_causal_skip": True} | sizes | needed).shape == (1, 1, 1, 5)
    assert (export_mask(q_length=2, allow_is_causal_skip=True, **sizes | {"q_offset": 3}) < 0).sum() == 1


def test_runtime_has_the_cores_to_itself(exported):
    """Torch is on one thread while an export writes, and then on as many as before, also after calls in other threads."""
    _, processor, graphs = exported
    inputs = processor(text=PROMPTS[:1], return_tensors="pt")
    seen = []

    def note(input_ids, scores):
        seen.append(torch.get_num_threads())
        return scores

    def write():
        graphs.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([note]))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as pool:

            def write_in_another_thread():
                pool.submit(write).result()
                return pool.submit(torch.get_num_threads).result()

            with ONE_THREAD:  # as in a call that the other thread begins within
                assert write_in_another_thread() == 3
        assert torch.get_num_threads() == 3
        write()
        assert torch.get_num_threads() == 3 and set(seen) == {1}
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_exported_is_refused(small, tmp_path):
    model, _ = small
    with pytest.raises(ValueError, match="`format` must be one of 'onnx', 'openvino', got 'tflite'"):
        model.export(tmp_path, format="tflite")
    model.save_pretrained(tmp_path / "model", save_llm=True)
    with pytest.raises(ValueError, match="holds a checkpoint. Export to another folder"):
        model.export(tmp_path / "model")
    without = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "model", load_llm=False)
    with pytest.raises(ValueError, match="loaded without its LLM"):
        without.export(tmp_path / "graphs")
    with pytest.raises(ValueError, match="is no export"):
        LLM2SLMExportedModel.from_pretrained(tmp_path / "model")


def test_what_an_export_cannot_do_is_refused(folder, small):
    _, processor = small
    with pytest.raises(ValueError, match="is an export, whose graphs are no weights of this class"):
        LLM2SLMForConditionalGeneration.from_pretrained(folder)
    graphs = LLM2SLMExportedModel.from_pretrained(folder)
    inputs = processor(text=PROMPTS[:1], return_tensors="pt")
    with pytest.raises(ValueError, match="keeps a dynamic cache, got `cache_implementation='static'`"):
        graphs.generate(**inputs, cache_implementation="static")
    with pytest.raises(ValueError, match="There is no prompt"):
        graphs.generate()
