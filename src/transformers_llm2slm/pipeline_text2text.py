"""The pipeline task `text2text-generation`, with the interface that it had in transformers 4."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.pipelines.base import GenericTensor, Pipeline

from .modeling_llm2slm import LLM2SLMPreTrainedModel
from .processing_llm2slm import LLM2SLMProcessor, is_conversation


class Text2TextGenerationPipeline(Pipeline):
    """
    Text to text with a model that `AutoModelForSeq2SeqLM` loads: LLM-to-SLM models, and any other.

    Takes a string, a list, a generator or a dataset of strings, and the arguments of `generate`. A model that was loaded
    before comes with the processor that lies beside its checkpoint, at the same commit; one from a private repository that
    was loaded with a token of its own wants `processor=` too, as a model keeps no tokens.

    ```python
    >>> pipe = pipeline("text2text-generation", model="org/llm2slm-t5")
    >>> pipe("translate English to German: Hello")
    [{'generated_text': 'Hallo'}]
    ```
    """

    _load_processor = None
    _load_tokenizer = None
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        processor: Any = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ):
        ours = isinstance(model, LLM2SLMPreTrainedModel)
        # One tokenizer will do where the configuration says that LLM and SLM share it.
        shared = ours and (model.config.fusion == "add" or model.config.slm_layers is not None)
        if ours and processor is None and not (shared and tokenizer is not None):
            processor = processor_beside(model, local_files_only)
        if isinstance(processor, LLM2SLMProcessor):
            tokenizer = processor.tokenizer
        if tokenizer is None:
            raise ValueError('The task "text2text-generation" needs a tokenizer or a processor: pass `tokenizer=`.')
        super().__init__(model, tokenizer=tokenizer, processor=processor, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Save the model with its processor (or tokenizer), as any checkpoint: whoever imports this package loads it.

        The base class would put a copy of this package's files beside it, and `pipeline` would then ask for
        `trust_remote_code`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        (self.processor or self.tokenizer).save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        return_tensors: bool | None = None,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        truncation: bool | None = None,
        stop_sequence: str | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward_params: dict[str, Any] = dict(generate_kwargs)
        if truncation is not None:
            forward_params["truncation"] = truncation
        if stop_sequence is not None:
            forward_params["stop_strings"] = stop_sequence
        postprocess_params: dict[str, Any] = {}
        if return_tensors is not None or return_text is not None:
            postprocess_params["return_tensors"] = bool(return_tensors)
        if clean_up_tokenization_spaces is not None:
            postprocess_params["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        return {}, forward_params, postprocess_params

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Args:
            inputs (`str`, `list[str]`, column, generator or dataset of `str`): The prompts. For LLM-to-SLM models a conversation,
                a list of messages with `"role"` and `"content"`, is a prompt too.
            return_tensors (`bool`, defaults to `False`): Give `generated_token_ids` in place of `generated_text`.
            clean_up_tokenization_spaces (`bool`, *optional*), truncation (`bool`, defaults to `False`), batch_size
                (`int`, defaults to 1), and whatever `generate` takes.

        Returns:
            `list[dict]`: for one string, a dict for each returned sequence; for a list of strings, a dict for each, or a
            list of dicts with `num_return_sequences` above 1.
        """
        # A column of a data set, for instance.
        if isinstance(inputs, Sequence) and not isinstance(inputs, (str, list)):
            inputs = list(inputs)
        result = super().__call__(inputs, *args, **kwargs)
        if isinstance(inputs, list) and all(isinstance(text, str) or is_conversation(text) for text in inputs):
            if all(len(sequences) == 1 for sequences in result):
                return [sequences[0] for sequences in result]
        return result

    def preprocess(self, inputs: Any, **preprocess_params: Any) -> dict[str, GenericTensor]:
        if isinstance(messages := getattr(inputs, "messages", inputs), list) and is_conversation(messages):
            if isinstance(self.processor, LLM2SLMProcessor):
                return {"text": messages}
        if not isinstance(inputs, str):
            raise ValueError(f"The task takes strings, got {type(inputs).__name__}: {inputs!r:.80}.")
        return {"text": (self.prefix or "") + inputs}

    def _forward(self, input_tensors: Mapping[str, Any], truncation: bool = False, **kwargs: Any) -> dict[str, Any]:
        text = input_tensors["text"]
        texts = [text] if isinstance(text, str) or is_conversation(text) else list(text)
        if isinstance(self.processor, LLM2SLMProcessor):
            inputs = self.processor(text=texts, padding=True, truncation=truncation, return_tensors="pt")
        else:
            inputs = self.tokenizer(texts, padding=True, truncation=truncation, return_tensors="pt")
            inputs.pop("token_type_ids", None)
        if "stop_strings" in kwargs:
            kwargs["tokenizer"] = self.tokenizer
        generate_kwargs = self._prepare_generate_kwargs(kwargs)
        output_ids = self.model.generate(**self.ensure_tensor_on_device(**inputs), **generate_kwargs)
        output_ids = output_ids if isinstance(output_ids, torch.Tensor) else output_ids.sequences
        return {"output_ids": output_ids.reshape(len(texts), -1, output_ids.shape[-1])}

    def postprocess(
        self,
        model_outputs: Mapping[str, Any],
        return_tensors: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[dict[str, Any]]:
        sequences = model_outputs["output_ids"][0]
        if return_tensors:
            return [{"generated_token_ids": sequence} for sequence in sequences]
        texts = self.tokenizer.batch_decode(
            sequences, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up_tokenization_spaces
        )
        return [{"generated_text": text} for text in texts]


def processor_beside(model: Any, local_files_only: bool) -> LLM2SLMProcessor:
    """The processor that lies beside the checkpoint of a model: at its commit, in its subfolder, from the same cache."""
    pass_it = 'Pass it: `pipeline("text2text-generation", model=model, processor=processor)`.'
    if not model.name_or_path:
        raise ValueError(f"This model was composed in memory and names no processor. {pass_it}")
    place = model.checkpoint_location | ({"local_files_only": True} if local_files_only else {})
    try:
        return LLM2SLMProcessor.from_pretrained(model.name_or_path, **place)
    except OSError as error:
        raise OSError(
            f"The processor of the model {model.name_or_path!r} could not be loaded: {error}\n{pass_it}"
        ) from error
