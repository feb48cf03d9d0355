"""Lossless mode: the hybrid drafts, the whole LLM verifies, and what is written is what the LLM alone would have written.

This is speculative decoding (Leviathan et al., 2023, arXiv 2211.17192; assisted generation in transformers) with the
LLM-to-SLM model as drafter. The LLM reads the prompt once: the pass that its own `generate` makes over the prompt also gives
the projector its states. Verification is transformers' own; only the candidates come from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from .llm_states import recorded_states
from .prompt import LLM2SLMPrompt, check_prompt_length, without_prompt_length
from .structure import embed_tokens

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

# The longest draft, and the acceptance rate to begin with, of the weight of so many tokens.
MAX_DRAFT, PRIOR_RATE, PRIOR_TOKENS = 16, 0.7, 4.0


def best_draft_length(acceptance_rate: float, cost: float) -> int:
    """
    The draft length at which most tokens are written in a given time.

    Args:
        acceptance_rate (`float`): The probability that a drafted token is accepted, in [0, 1].
        cost (`float`): Time of a step of the drafter, as a share of that of the verifier.

    Returns:
        The number of tokens k that maximises (1 - a^(k+1)) / (1 - a) / (1 + k c), which is the expected number of tokens over
        the time of a round (Leviathan et al., 2023, theorem 3.8).
    """
    rate = min(max(acceptance_rate, 0.0), 0.999)
    return max(range(1, MAX_DRAFT + 1), key=lambda k: (1 - rate ** (k + 1)) / (1 - rate) / (1 + k * cost))


class SLMCandidateGenerator(CandidateGenerator):
    """
    Drafts with the SLM, from the prompt that the LLM has read.

    Args:
        slm (`PreTrainedModel`): The SLM.
        read_prompt (`Callable`): Gives the SLM's arguments for the fused prompt, `None` as long as the LLM has not read it.
        context_length (`int`): Number of the LLM's tokens that come before the response.
        vocab_size (`int`): Size of the LLM's vocabulary.
        start_token_id (`int`, *optional*): The token that an encoder-decoder SLM starts from.
        generation_config (`GenerationConfig`): The LLM's for this call.
        logits_processor (`LogitsProcessorList`): The LLM's for this call; the drafts are shaped by it too.
        cost (`float`): Time of a step of the SLM, as a share of that of the LLM.
        draft_length (`int`, *optional*): Draft always so many tokens.
    """

    def __init__(
        self,
        slm: PreTrainedModel,
        read_prompt: Callable[[], dict[str, Any] | None],
        context_length: int,
        vocab_size: int,
        start_token_id: int | None,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        cost: float,
        draft_length: int | None,
    ):
        self.slm, self.read_prompt, self.context_length, self.vocab_size = slm, read_prompt, context_length, vocab_size
        self.start_token_id = start_token_id
        self.generation_config, self.logits_processor = generation_config, logits_processor
        self.cost, self.draft_length = cost, draft_length
        self.prompt: dict[str, Any] | None = None
        self.cache: Any = None
        self.cached: list[int] = []  # tokens of the response that the cache holds
        self.num_drafted = self.num_accepted = 0
        self.drafted = 0  # in this round

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were looked at and accepted, from a prior that its first tokens outweigh."""
        return (self.num_accepted + PRIOR_RATE * PRIOR_TOKENS) / (self.num_drafted + PRIOR_TOKENS)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(1, sequence_length)`): The LLM's tokens so far.

        Returns:
            `input_ids` with the draft behind them, and the scores `(1, draft_length, vocab_size)` that it was drawn by;
            without a draft, `None`.
        """
        self.drafted = 0
        room = self.generation_config.max_length - input_ids.shape[1] - 1
        length = min(self.draft_length or best_draft_length(self.acceptance_rate, self.cost), room)
        if self.prompt is None:
            self.prompt = self.read_prompt()
        if self.prompt is None or length < 1:
            return input_ids, None
        response = input_ids[:, self.context_length :].to(self.slm.device)
        self.rewind(response[0].tolist())
        new, scores = response[:, len(self.cached) :], []
        for _ in range(length):
            logits = self.step(new).to(input_ids.device)
            scores.append(self.logits_processor(input_ids, logits))
            if self.generation_config.do_sample:
                token = torch.multinomial(scores[-1].softmax(dim=-1), num_samples=1)
            else:
                token = scores[-1].argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=1)
            self.drafted += 1
            new = token.to(self.slm.device)
            if self.ends(token):
                break
        return input_ids, torch.stack(scores, dim=1)

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Count what was accepted. A draft is looked at up to its first wrong token."""
        self.num_accepted += int(num_matches)
        self.num_drafted += min(int(num_matches) + 1, self.drafted)

    def ends(self, token: torch.Tensor) -> bool:
        eos = getattr(self.generation_config, "_eos_token_tensor", None)
        return eos is not None and bool(torch.isin(token, eos.to(token.device)).any())

    def rewind(self, response: list[int]) -> None:
        """Take from the cache what is not of the response. The last token stays out of it: its successor is asked for."""
        same = 0
        for first, second in zip(self.cached, response[:-1], strict=False):
            if first != second:
                break
            same += 1
        if self.cache is not None:
            self.cache.crop(same - len(self.cached))
        self.cached = self.cached[:same]

    def step(self, new: torch.Tensor) -> torch.Tensor:
        """
        Logits `(1, vocab_size)` after the response's tokens `new` of shape `(1, number)`, in the LLM's vocabulary.

        What one of the two vocabularies lacks can't be drafted.
        """
        prompt = dict(self.prompt or {})
        seq2seq = self.slm.config.is_encoder_decoder
        tokens = new
        if self.cache is None:
            self.cache = DynamicCache(config=self.slm.config.get_text_config(decoder=True))
            self.cache.activate_past_recording()
            if seq2seq:
                self.cache = EncoderDecoderCache(self.cache, DynamicCache())
                tokens = torch.cat([new.new_tensor([[self.start_token_id]]), new], dim=1)
            else:
                prompt["inputs_embeds"] = torch.cat([prompt["inputs_embeds"], embed_tokens(self.slm, new)], dim=1)
        if seq2seq:
            inputs = prompt | {"decoder_input_ids": tokens}
        elif self.cache.get_seq_length() == 0:
            inputs = {"inputs_embeds": prompt["inputs_embeds"]}
        else:
            inputs = {"input_ids": tokens}
        outputs = self.slm(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True)
        self.cached += new[0].tolist()
        logits = outputs.logits[:, -1].float()
        missing = self.vocab_size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, max(missing, 0)), value=float("-inf"))[:, : self.vocab_size]


def writing_parameters(model: PreTrainedModel) -> int:
    """Number of parameters that a step of writing reads: of the decoder, without embeddings, and of the LM head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embeddings = {id(parameter) for parameter in decoder.get_input_embeddings().parameters()}
    body = {id(p): p.numel() for p in decoder.parameters() if id(p) not in embeddings}
    return sum((body | {id(p): p.numel() for p in head.parameters()}).values())


@contextmanager
def drafting_by(llm: PreTrainedModel, make: Callable[..., CandidateGenerator]) -> Iterator[None]:
    """`llm` with candidates from the generator that `make` gives. transformers has no argument for one of one's own."""
    llm._get_candidate_generator = make
    try:
        yield
    finally:
        del llm._get_candidate_generator


@torch.no_grad()
def generate_lossless(
    model: LLM2SLMForConditionalGeneration,
    llm: PreTrainedModel,
    prompt: Mapping[str, torch.Tensor | None],
    generation_config: GenerationConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """
    The LLM's own output, drafted by the SLM.

    Args:
        model: The LLM-to-SLM model.
        llm: The whole LLM, whose reading part is the model's.
        prompt: What the processor makes of one prompt.
        generation_config: Defaults to the LLM's.
        args, kwargs: Arguments of `generate`. `num_assistant_tokens` drafts always so many tokens; by default the length follows
            the share of accepted ones.

    Returns:
        What the LLM's `generate` returns, response only. With `return_dict_in_generate=True` also `num_drafted` and
        `num_accepted`, the tokens that were drafted (up to the first wrong one of each draft) and accepted.

    Raises:
        ValueError: for more than one prompt, or for beams.
    """
    ids, mask = prompt.get("input_ids"), prompt.get("attention_mask")
    if ids is None:
        raise ValueError("Lossless generation needs the LLM's tokens as `input_ids`: the LLM reads and verifies.")
    check_prompt_length(ids, llm, "LLM")
    if len(ids) != 1:
        raise ValueError(f"Lossless generation takes one prompt at a time, got {len(ids)}. Loop over them.")
    beams = next(
        value
        for value in (
            kwargs.get("num_beams"),
            getattr(generation_config, "num_beams", None),
            llm.generation_config.num_beams,
            1,
        )
        if value is not None
    )
    if beams > 1:
        raise ValueError(
            f"Lossless generation is greedy or sampled, without beams, got `num_beams={beams}`. Set it to 1."
        )
    if mask is not None:
        ids = ids[mask.to(ids.device).bool()][None]
    read = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
    config, seq2seq = model.config, llm.config.is_encoder_decoder
    body = llm.get_encoder() if seq2seq else llm.base_model
    drafters: list[SLMCandidateGenerator] = []

    with recorded_states(body, config.llm_layers, config.num_llm_layers) as recorded:

        def read_prompt() -> dict[str, Any] | None:
            if not recorded:
                return None
            states = list(recorded)
            if config.fusion == "llm-embed":
                states.append(embed_tokens(model.llm, ids).to(states[0].device))
            encoded = model.encode_prompt(input_ids=ids, llm_hidden_states=torch.stack(states, dim=2), **read)
            return slm_inputs(model, encoded)

        def make(
            *_: Any, generation_config: GenerationConfig, logits_processor: LogitsProcessorList, **__: Any
        ) -> Any:
            drafters.append(
                SLMCandidateGenerator(
                    model.slm,
                    read_prompt,
                    context_length=1 if seq2seq else ids.shape[1],
                    vocab_size=llm.get_output_embeddings().weight.shape[0],
                    start_token_id=model.model.decoder_start_token_id()
                    if model.slm.config.is_encoder_decoder
                    else None,
                    generation_config=generation_config,
                    logits_processor=logits_processor,
                    cost=writing_parameters(model.slm) / writing_parameters(llm),
                    draft_length=draft_length,
                )
            )
            return drafters[-1]

        draft_length = kwargs.pop("num_assistant_tokens", None)
        if not seq2seq:
            generation_config, kwargs = without_prompt_length(generation_config, kwargs, llm.generation_config)
        with drafting_by(llm, make):
            # Looking candidates up in the prompt is what asks for assisted decoding without a second model.
            outputs = llm.generate(
                ids,
                generation_config,
                *args,
                attention_mask=torch.ones_like(ids),
                prompt_lookup_num_tokens=1,
                **kwargs,
            )
    sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
    sequences = sequences if seq2seq else sequences[:, ids.shape[1] :]
    if isinstance(outputs, torch.Tensor):
        return sequences
    outputs.sequences = sequences
    outputs["num_drafted"], outputs["num_accepted"] = drafters[0].num_drafted, drafters[0].num_accepted
    return outputs


def slm_inputs(model: LLM2SLMForConditionalGeneration, prompt: LLM2SLMPrompt) -> dict[str, Any]:
    """The SLM's arguments for a prompt, with its own encoder run once, where it has one."""
    inputs = model.model.slm_prompt(prompt)
    if model.slm.config.is_encoder_decoder and "encoder_outputs" not in inputs:
        embeds = inputs.pop("inputs_embeds")
        inputs["encoder_outputs"] = model.slm.get_encoder()(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], return_dict=True
        )
    return inputs
