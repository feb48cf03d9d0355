"""Registration: what importing the package makes transformers know, and what it costs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import transformers
from conftest import FAMILIES
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer, pipelines

from transformers_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor, register
from transformers_llm2slm.pipeline_text2text import Text2TextGenerationPipeline
from transformers_llm2slm.registration import TASK, LLM2SLMTokenizer, register_pipeline


def config() -> LLM2SLMConfig:
    return LLM2SLMConfig(llm_config=FAMILIES["t5"](), slm_config=FAMILIES["llama"](), fusion="replace")


def test_auto_classes(small, tmp_path):
    """Each Auto class gives ours, from a folder or from a configuration."""
    for part in small:
        part.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLM2SLMConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LLM2SLMProcessor
    made = AutoConfig.for_model(
        "llm2slm", llm_config=FAMILIES["t5"]().to_dict(), slm_config=FAMILIES["opt"]().to_dict()
    )
    assert type(made) is LLM2SLMConfig and type(made.slm_config) is transformers.OPTConfig
    for auto in (AutoModel, AutoModelForSeq2SeqLM):
        assert type(auto.from_pretrained(tmp_path)) is LLM2SLMForConditionalGeneration
        model = auto.from_config(config())
        assert type(model) is LLM2SLMForConditionalGeneration and model.llm is None
        assert type(model.slm) is transformers.LlamaForCausalLM
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM"):
        transformers.AutoModelForCausalLM.from_config(config())
    with pytest.raises(ValueError, match=r"'a/b' has two tokenizers, the LLM's for reading and the SLM's for writing"):
        LLM2SLMTokenizer.from_pretrained("a/b")


def known():
    """What transformers knows of us."""
    return [
        AutoConfig.for_model("llm2slm").__class__,
        *(auto._model_mapping[LLM2SLMConfig] for auto in (AutoModel, AutoModelForSeq2SeqLM)),
        transformers.models.auto.processing_auto.PROCESSOR_MAPPING[LLM2SLMConfig],
        transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING[LLM2SLMConfig],
        {**pipelines.PIPELINE_REGISTRY.supported_tasks[TASK]},
        sorted(pipelines.REMOVED_TASKS),
    ]


def test_register_again(caplog, monkeypatch):
    """Registering again changes nothing, and nothing is said."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    before = known()
    register()
    assert known() == before and not caplog.records
    assert before[5]["impl"] is Text2TextGenerationPipeline and before[5]["pt"] == (AutoModelForSeq2SeqLM,)
    assert AutoTokenizer is transformers.AutoTokenizer
    assert TASK not in before[6] and {"summarization", "translation", "question-answering"} <= set(before[6])


def test_register_pipeline(monkeypatch):
    """Only the one name leaves the removed tasks; a pipeline that someone else registered stays."""
    other = {"impl": object, "pt": (), "type": "text"}
    tasks = pipelines.PIPELINE_REGISTRY.supported_tasks
    monkeypatch.setitem(tasks, TASK, other)
    monkeypatch.setattr(pipelines, "REMOVED_TASKS", {TASK: "gone", "summarization": "gone"})
    register_pipeline()
    assert pipelines.REMOVED_TASKS == {"summarization": "gone"} and tasks[TASK] is other
    monkeypatch.delattr(pipelines, "REMOVED_TASKS")  # a transformers that has the task
    monkeypatch.delitem(tasks, TASK)
    register_pipeline()
    assert tasks[TASK]["impl"] is Text2TextGenerationPipeline


def test_import(tmp_path):
    """The import brings in nothing heavy beyond `AutoModel`'s own imports, and may happen twice in a process."""
    script = """
import json, sys
from transformers import AutoModel, PreTrainedModel
before = set(sys.modules)
import transformers_llm2slm
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {n.partition(".")[0] for n in before})
for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_llm2slm"]:
    del sys.modules[name]
import transformers_llm2slm as again
from transformers import AutoConfig
known = AutoConfig.for_model("llm2slm").__class__ is again.LLM2SLMConfig is not transformers_llm2slm.LLM2SLMConfig
print(json.dumps({"new": new, "known": known}))
"""
    run = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    heavy = {"datasets", "trl", "peft", "typer", "rich", "matplotlib", "accelerate", "pandas", "sklearn", "scipy"}
    assert "transformers_llm2slm" in result["new"] and not heavy & set(result["new"])
