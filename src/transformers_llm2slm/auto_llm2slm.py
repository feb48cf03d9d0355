"""
What `auto_map` names in a checkpoint that carries a copy of this code, see `remote_code.py`.

One module for all of it, which no other imports: transformers runs the modules that `auto_map` names anew, each under a
name of its own for a local folder, and the configuration, model and processor of a checkpoint must know each other's classes.
"""

from importlib.metadata import version

from packaging.version import Version
from transformers import AutoTokenizer

from .version import __version__

try:
    # Registered classes win over a repository's code, `trust_remote_code=True` or not. A package that is installed and
    # only not imported yet wins as well, unless it is older than this copy.
    if Version(version("transformers-llm2slm")) < Version(__version__):
        raise ImportError("The installed package is older than this copy.")
    from transformers_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
    from transformers_llm2slm.pipeline_text2text import Text2TextGenerationPipeline
except ImportError:
    from .configuration_llm2slm import LLM2SLMConfig
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration
    from .pipeline_text2text import Text2TextGenerationPipeline
    from .processing_llm2slm import LLM2SLMProcessor, LLM2SLMTokenizer

    AutoTokenizer.register(LLM2SLMConfig, tokenizer_class=LLM2SLMTokenizer, exist_ok=True)

__all__ = ["LLM2SLMConfig", "LLM2SLMForConditionalGeneration", "LLM2SLMProcessor", "Text2TextGenerationPipeline"]
