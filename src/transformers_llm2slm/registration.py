"""Makes transformers know the model: Auto classes and the pipeline task. Called once, on import of the package."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer

from .configuration_llm2slm import LLM2SLMConfig
from .modeling_llm2slm import LLM2SLMForConditionalGeneration
from .processing_llm2slm import LLM2SLMProcessor, LLM2SLMTokenizer
from .remote_code import TASK


def register() -> None:
    """Register configuration, model, processor, tokenizer and pipeline. May be called again."""
    AutoConfig.register(LLM2SLMConfig.model_type, LLM2SLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSeq2SeqLM):
        auto_class.register(LLM2SLMConfig, LLM2SLMForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LLM2SLMConfig, LLM2SLMProcessor, exist_ok=True)
    AutoTokenizer.register(LLM2SLMConfig, tokenizer_class=LLM2SLMTokenizer, exist_ok=True)
    register_pipeline()


def register_pipeline() -> None:
    """
    Give `pipeline("text2text-generation")` back to users.

    transformers 5 removed the task: its name stands in `REMOVED_TASKS`, which `pipeline` asks before its registry, and
    every removed name ends in a `KeyError` there
    (https://github.com/huggingface/transformers/blob/main/MIGRATION_GUIDE_V5.md#pipelines). Taking the one name out of
    that dictionary is enough for the registry to be asked. A transformers without the dictionary needs nothing.
    """
    from transformers import pipelines

    from .pipeline_text2text import Text2TextGenerationPipeline

    getattr(pipelines, "REMOVED_TASKS", {}).pop(TASK, None)
    if TASK not in pipelines.PIPELINE_REGISTRY.supported_tasks:
        pipelines.PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=Text2TextGenerationPipeline, pt_model=AutoModelForSeq2SeqLM, type="text"
        )
