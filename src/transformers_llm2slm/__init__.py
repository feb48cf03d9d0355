"""LLM-to-SLM for transformers: a frozen large model reads, a small one writes (arXiv 2402.16844).

Importing this package registers its model with the Auto classes and the task `text2text-generation` with `pipeline`.
"""

from .configuration_llm2slm import LLM2SLMConfig
from .data_collator import LLM2SLMDataCollator
from .distillation import LogitDistillationMixin
from .exported import LLM2SLMExportedModel
from .fit import fit_projector, fit_slm_embeddings
from .influence import block_influence, influential_layers
from .llm_states_cache import cache_error, cache_llm_states
from .lora import lora_config
from .modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMModel, LLM2SLMOutput
from .processing_llm2slm import LLM2SLMProcessor
from .projector import LLM2SLMProjector
from .prompt import LLM2SLMPrompt
from .registration import register
from .sft import prepare_sft_config
from .shortlist import make_shortlist
from .trainer_card import LLM2SLMModelCardMixin
from .version import __version__ as __version__

register()

__all__ = [
    "LLM2SLMConfig",
    "LLM2SLMDataCollator",
    "LLM2SLMExportedModel",
    "LLM2SLMForConditionalGeneration",
    "LLM2SLMModel",
    "LLM2SLMModelCardMixin",
    "LLM2SLMOutput",
    "LLM2SLMProcessor",
    "LLM2SLMProjector",
    "LLM2SLMPrompt",
    "LogitDistillationMixin",
    "block_influence",
    "cache_error",
    "cache_llm_states",
    "fit_projector",
    "fit_slm_embeddings",
    "influential_layers",
    "lora_config",
    "make_shortlist",
    "prepare_sft_config",
]
