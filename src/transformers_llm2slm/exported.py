"""Exported models: graphs that a runtime runs, behind the `generate` of transformers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from .checkpoint import checkpoint_location
from .configuration_llm2slm import LLM2SLMConfig
from .evaluation import require_extra
from .export_graphs import cache_tensors, filled_cache
from .generation import LLM2SLMGenerationMixin
from .key_values import continued_prompt, last_tokens
from .modeling_llm2slm import LLM2SLMPreTrainedModel
from .prompt import LLM2SLMPrompt, one_to_one_view, padded_right, prompt_mask, slm_view
from .structure import mask_positions, move_padding

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel


class Session:
    """
    One graph in its runtime: tensors and lists of tensors by name in, and out. Calls in several threads take turns.

    Args:
        runner: A runner of transformers' exporters.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        self.lock = threading.Lock()  # what is bound, or given to a runner, is the graph's and not the call's
        self.session: Any = getattr(runner, "session", None)
        if self.session is not None:
            from onnxruntime import OrtDevice

            # Bound here, below onnxruntime's wrappers and only where something has changed: a step of a small model is shorter
            # than what the runner and the wrappers do to prepare it.
            self.binding, self.device = self.session.io_binding(), OrtDevice.make("cpu", 0)._get_c_device()
            self.inputs = by_key(spec.name for spec in self.session.get_inputs())
            self.outputs = [spec.name for spec in self.session.get_outputs()]
            self.places = by_key(self.outputs)
            self.bound: dict[str, torch.Tensor] = {}

    def __call__(self, **tensors: torch.Tensor | list[torch.Tensor]) -> dict[str, Any]:
        with self.lock:
            return self.runner(**tensors) if self.session is None else self._run_bound(tensors)

    def _run_bound(self, tensors: Mapping[str, torch.Tensor | list[torch.Tensor]]) -> dict[str, Any]:
        bind = self.binding._iobinding
        for key, names in self.inputs.items():
            value = tensors[key]
            for name, tensor in zip(names, [value] if isinstance(value, torch.Tensor) else value, strict=True):
                if self.bound.get(name) is tensor:  # keys and values of the prompt, in every step
                    continue
                held = tensor.contiguous()
                # A null pointer, as an empty tensor has, is refused.
                held = held if held.numel() else held.new_empty(1)
                bind.bind_input(name, self.device, ELEMENT_TYPES[held.dtype], tensor.shape, held.data_ptr())
                self.bound[name] = held  # alive until something else is bound
        for name in self.outputs:
            bind.bind_output(name, self.device)
        self.session.run_with_iobinding(self.binding)
        made = dict(zip(self.outputs, bind.get_outputs().to_dlpacks(torch.utils.dlpack.from_dlpack), strict=True))
        return {
            key: made[key] if key in made else [made[name] for name in names] for key, names in self.places.items()
        }


def by_key(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of a graph's tensors: each by itself, and those of a list, which have a number behind a dot, in its order."""
    keys: dict[str, list[str]] = {}
    for name in names:
        keys.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {key: sorted(own, key=lambda name: (len(name), name)) for key, own in keys.items()}  # .2 before .10


RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
# ONNX's names of dtypes, as numbers: `onnx.TensorProto.FLOAT` and `INT64`.
ELEMENT_TYPES = {torch.float32: 1, torch.int64: 7}


def thread_options(format: str, threads: int) -> dict[str, Any]:
    """What a runner of this format takes to run on so many threads."""
    if format == "openvino":
        # Left to itself, OpenVINO computes in bfloat16 where the processor can.
        return {"config": {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}}
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return {"session_options": options}


class OneThread:
    """
    Torch on one thread for as long as a block runs, in this thread of the process and others that do the same. Torch's threads stay
    awake for a while after what they did together, such as choosing among many logits, on the cores that a runtime needs next.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.threads = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:  # a thread that is new to torch begins with what another has set
                self.threads = torch.get_num_threads()
            self.inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.inside -= 1
            torch.set_num_threads(self.threads)


ONE_THREAD = OneThread()


# The SLM -----------------------------------------------------------------------------------------------------------------
class ExportedSLM(PreTrainedModel, GenerationMixin):
    """
    The SLM of an exported model: transformers' own `generate` over a step that a runtime takes. Its logits are those after
    the last token only, of shape `(batch_size, 1, vocab_size)`.

    Args:
        config (`PreTrainedConfig`): The SLM's.
        sessions (`Mapping[str, Session]`): The graphs `step`, and `cross` or `embed`.
        cache_shapes (`Mapping[str, list[list[int]]]`): For `keys` and `values`, heads and head size of each layer.
    """

    main_input_name = "input_ids"

    def __init__(self, config: Any, sessions: Mapping[str, Session], cache_shapes: Mapping[str, list[list[int]]]):
        super().__init__(config)
        self.sessions, self.cache_shapes = sessions, cache_shapes

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own on one thread of torch, with a cache that keeps all of every layer, as the graphs take it."""
        config = kwargs.get("generation_config") or self.generation_config
        implementation = kwargs.get("cache_implementation") or config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"An exported model keeps a dynamic cache, got `cache_implementation={implementation!r}`."
            )
        if kwargs.get("cache") is None:
            seq2seq = self.config.is_encoder_decoder
            kwargs["cache"] = EncoderDecoderCache(DynamicCache(), DynamicCache()) if seq2seq else DynamicCache()
        with ONE_THREAD:
            return super().generate(*args, **kwargs)

    def step(self, cache: DynamicCache, batch_size: int, **inputs: Any) -> torch.Tensor:
        """Logits after new tokens, whose keys and values `cache` takes."""
        if not cache.layers:
            past = {
                name: [torch.zeros((batch_size, heads, 0, size)) for heads, size in shapes]
                for name, shapes in self.cache_shapes.items()
            }
            cache.layers = filled_cache(**past).layers
        elif (rows := len(cache.layers[0].keys)) != batch_size:  # beams share the prompt that the cache begins with
            cache.batch_repeat_interleave(batch_size // rows)
        outputs = self.sessions["step"](**inputs, **cache_tensors(cache))
        for layer, keys, values in zip(cache.layers, outputs["new_keys"], outputs["new_values"], strict=True):
            layer.keys, layer.values = keys, values
        return outputs["logits"]


class ExportedSeq2SeqSLM(ExportedSLM):
    """An encoder-decoder SLM. Its encoder is in the graph that reads prompts, so it takes `encoder_outputs`."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_input_ids: torch.Tensor = None,  # type: ignore[assignment]
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        cache = cache if cache is not None else past_key_values
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        if not cross.layers:
            made = self.sessions["cross"](prompt_states=encoder_outputs[0])
            cross.layers = filled_cache(made["cross_keys"], made["cross_values"]).layers
            cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        if attention_mask is None:
            attention_mask = torch.ones(encoder_outputs[0].shape[:2], dtype=torch.long)
        fixed = {"attention_mask": attention_mask, **cache_tensors(cross, "cross_")}
        for token in decoder_input_ids.split(1, dim=1):  # the graph takes one at a time
            logits = self.step(own, len(token), decoder_input_ids=token, **fixed)
        return Seq2SeqLMOutput(logits=logits, cache=cache)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "The SLM's encoder is in the graph that reads prompts: pass `prompt=` or the prompt's tokens."
        )


class ExportedCausalSLM(ExportedSLM):
    """A decoder-only SLM."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        cache = cache if cache is not None else past_key_values
        cache = DynamicCache() if cache is None else cache
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("The SLM takes `input_ids` or `inputs_embeds`, got neither.")
            inputs_embeds = self.sessions["embed"](input_ids=input_ids)["inputs_embeds"]
        batch_size, length = inputs_embeds.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, cache.get_seq_length() + length), dtype=torch.long)
        if position_ids is None:
            position_ids = mask_positions(attention_mask)[:, -length:]
        logits = self.step(
            cache,
            batch_size,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids.expand(batch_size, -1),
        )
        return CausalLMOutputWithPast(logits=logits, cache=cache)


# The whole ---------------------------------------------------------------------------------------------------------------
class ExportedParts(nn.Module):
    """What [`LLM2SLMModel`] is to [`LLM2SLMForConditionalGeneration`]: reading and the SLM."""

    llm = whole_llm = None

    def __init__(self, config: LLM2SLMConfig, session: Session, slm: ExportedSLM):
        super().__init__()
        self.config, self.session, self.slm = config, session, slm

    def encode_prompt(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        slm_input_ids: torch.Tensor | None = None,
        slm_attention_mask: torch.Tensor | None = None,
        alignment: torch.Tensor | None = None,
    ) -> LLM2SLMPrompt:
        """
        Read a batch of prompts. Arguments as for [`LLM2SLMModel.encode_prompt`], tokens only.

        Returns:
            [`LLM2SLMPrompt`]. For an SLM with an encoder its states are what that encoder made of the fused prompt.
        """
        mask = prompt_mask(self.config, None, input_ids, attention_mask, None).long()  # it may be boolean
        reads = {
            "input_ids": padded_right(input_ids, mask),  # type: ignore[arg-type]  # or prompt_mask raised
            "attention_mask": move_padding(mask, mask, "right"),
        }
        mask = reads["attention_mask"]
        if self.config.fusion == "align":
            reads |= slm_view(slm_input_ids, slm_attention_mask, alignment)
            mask = reads["slm_attention_mask"]
        last = last_tokens(reads["input_ids"], mask) if self.config.fusion == "kv" else None
        return LLM2SLMPrompt(self.session(**reads)["prompt_states"], mask, last)

    def slm_prompt(self, prompt: LLM2SLMPrompt) -> dict[str, Any]:
        """The arguments by which the SLM's `generate` takes a prompt."""
        states, mask = prompt.prompt_states, prompt.attention_mask
        if self.slm.config.is_encoder_decoder:
            return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}
        states, mask = (move_padding(tensor, mask, "left") for tensor in (states, mask))
        if self.config.fusion == "kv":
            last = self.slm.sessions["embed"](input_ids=prompt.last_token_ids)["inputs_embeds"]  # type: ignore[arg-type]
            return continued_prompt(self.slm, self.config, states, mask, last)
        return {"inputs_embeds": states, "attention_mask": mask}


class LLM2SLMExportedModel(LLM2SLMGenerationMixin, LLM2SLMPreTrainedModel):
    """
    An LLM-to-SLM model as graphs of ONNX Runtime or OpenVINO, made by [`~LLM2SLMForConditionalGeneration.export`]. It reads
    and writes as the model does, with the same arguments, and can't be trained.
    """

    def __init__(self, exported: ExportedModel):
        super().__init__(exported.config)
        self.exported = exported
        # The arguments by which a processor is found beside the graphs; see `from_pretrained`.
        self.checkpoint_location: dict[str, Any] = {}
        sessions = {name: Session(runner) for name, runner in exported.runners.items()}
        slm_class = ExportedSeq2SeqSLM if exported.config.slm_config.is_encoder_decoder else ExportedCausalSLM
        slm = slm_class(exported.config.slm_config, sessions, exported.config.export["cache_shapes"])
        self.model = ExportedParts(exported.config, sessions["prompt"], slm)
        self.generation_config = exported.generation_config

    @property
    def slm(self) -> ExportedSLM:
        """The SLM, which writes."""
        return self.model.slm

    @property
    def llm(self) -> None:
        """There is none: the graph that reads prompts holds its weights."""

    @property
    def shortlist(self) -> list[int] | None:
        """The tokens that the SLM may write, as they were when it was exported; `None` if all."""
        return getattr(self.generation_config, "shortlist", None)

    @shortlist.setter
    def shortlist(self, value: Any) -> None:
        raise AttributeError(
            "An exported model keeps the shortlist that it was exported with: set it before you export."
        )

    def encode_prompt(self, *args: Any, **kwargs: Any) -> LLM2SLMPrompt:
        """See [`ExportedParts.encode_prompt`]."""
        return self.model.encode_prompt(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, num_threads: int | None = None, **kwargs: Any
    ) -> LLM2SLMExportedModel:
        """
        Load an exported model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or local folder.
            num_threads (`int`, *optional*): Threads of the runtime; by default as many as torch uses.
            kwargs (*optional*): `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            ValueError: for an export of something else.
            ImportError: without the runtime.
        """
        from transformers.exporters import ExportedModel

        config = LLM2SLMConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config.export is None:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} is no export, which `model.export(folder)` or `llm2slm export` makes. "
                "Load it with `AutoModel.from_pretrained`."
            )
        require_extra(config.export["format"], RUNTIMES[config.export["format"]])
        threads = torch.get_num_threads() if num_threads is None else num_threads
        options = thread_options(config.export["format"], threads)
        exported = ExportedModel.from_pretrained(pretrained_model_name_or_path, device="cpu", **options, **kwargs)
        exported.config.name_or_path = str(pretrained_model_name_or_path)
        model = cls(exported)
        model.checkpoint_location = checkpoint_location(model, pretrained_model_name_or_path, kwargs)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the graphs and their configuration; `push_to_hub` and its arguments as for any `save_pretrained`."""
        self.exported.save_pretrained(save_directory, **kwargs)


@torch.no_grad()
def check_export(model: Any, exported: LLM2SLMExportedModel) -> float:
    """
    Compare an exported model with its origin, over prompts of unequal lengths and some tokens of a response.

    Returns:
        The largest difference of logits, as a share of their largest.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.llm.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if model.config.fusion == "align":
        inputs |= one_to_one_view(ids, mask)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": None,
    }
    options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    expected, found = (writer.generate(**inputs, **options) for writer in (model, exported))
    agreed = (expected.sequences == found.sequences).all(dim=0).long().cumprod(dim=0)
    steps = 1 + int(agreed[-len(expected.logits) :].sum())  # behind another token, other logits are no error
    pairs = list(zip(expected.logits, found.logits, strict=True))[:steps]
    return max(_difference(a, b) for a, b in pairs)


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest, as a share of the largest value; what is infinite in both, as behind a shortlist, is equal."""
    differences = torch.where(expected == found, 0.0, (expected - found).abs())
    return float(differences.max() / expected[expected.isfinite()].abs().max())
