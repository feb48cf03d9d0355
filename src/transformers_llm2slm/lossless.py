"""Lossless mode: the hybrid drafts, the whole LLM verifies, and what is written is what the LLM alone would have written.

This is speculative decoding (Leviathan et al., 2023, arXiv 2211.17192; assisted generation in transformers) with the
LLM-to-SLM model as drafter. The LLM reads the prompt once: the pass that its own `generate` makes over the prompt also gives
the projector its states. Verification is transformers' own; only the candidates come from here.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.candidate_generator import CandidateGenerator

from .configuration_llm2slm import decoder_text_config
from .key_values import recorded_key_values
from .llm_states import recorded_states
from .prompt import LLM2SLMPrompt, check_prompt_length, option, without_prompt_length
from .structure import accepts, cache_argument, embed_tokens, position_limit

if TYPE_CHECKING:
    from .modeling_llm2slm import LLM2SLMForConditionalGeneration

# The longest draft; the acceptance rate to begin with, and of how many tokens' weight that is.
MAX_DRAFT, PRIOR_RATE, PRIOR_TOKENS = 16, 0.7, 4.0
# What is left of the weight of older drafts with each new one; of how many passes the median time is taken.
MEMORY, TIMED_PASSES = 0.95, 9
# After so many rounds with drafts one without, and the other way round: the way that is not gone is not measured.
EXPLORE_AFTER = 16
# A draft ends with a token that the drafter gives less than this probability, and may be so many times the best length else.
UNSURE, STRETCH = 0.2, 2


def best_draft_length(acceptance_rate: float, cost: float, verification: float = 1.0, shortest: int = 0) -> int:
    """
    The draft length at which most tokens are written in a given time.

    Args:
        acceptance_rate (`float`): The probability that a drafted token is accepted, in [0, 1].
        cost (`float`): Time of a step of the drafter, as a share of that of the verifier when it writes alone.
        verification (`float`): Time of a pass of the verifier over a draft, as such a share. It is 1 where reading the weights
            is what takes time, and about 1.5 where, as on most CPUs, one token has faster kernels than several.
        shortest (`int`): The shortest draft to consider.

    Returns:
        The number of tokens k that maximises (1 - a^(k+1)) / (1 - a) / (v + k c), which is the expected number of tokens over
        the time of a round (Leviathan et al., 2023, theorem 3.8, where v = 1); 0 where the verifier alone is faster.
    """
    rate = min(max(acceptance_rate, 0.0), 0.999)

    def tokens_per_time(k: int) -> float:
        return (1 - rate ** (k + 1)) / (1 - rate) / (verification + k * cost if k else 1.0)

    return max(range(shortest, MAX_DRAFT + 1), key=tokens_per_time)


class DraftLength:
    """
    How many tokens to draft next, from how many were accepted and how long everything took.

    [`best_draft_length`] takes one token for as likely to be accepted as another. As a draft ends where the drafter is unsure,
    which is mostly where it is wrong, what is drafted further is better than that, and pays for longer.

    Args:
        cost (`float`): Time of a step of the drafter, as a share of that of the verifier, as long as it is not measured.
        timed (`bool`): Whether to measure times. Without, the lengths are a matter of the tokens alone, and so repeat.
    """

    def __init__(self, cost: float, timed: bool):
        self.cost, self.timed = cost, timed
        self.accepted, self.seen = PRIOR_RATE * PRIOR_TOKENS, PRIOR_TOKENS
        self.seconds: dict[str, deque[float]] = {
            kind: deque(maxlen=TIMED_PASSES) for kind in ("draft", "alone", "verify")
        }
        self.drafting, self.rounds_alike = False, 0

    def choose(self) -> int:
        """How long the next draft may be; 0 for none."""
        if self.timed and not self.seconds["alone"]:
            length = 0
        else:
            length = self.best(shortest=0)
            if self.rounds_alike >= EXPLORE_AFTER and self.drafting == (length > 0):
                length = 0 if self.drafting and self.timed else self.best(shortest=1)
        self.rounds_alike = self.rounds_alike + 1 if self.drafting == (length > 0) else 1
        self.drafting = length > 0
        return min(STRETCH * length, MAX_DRAFT)

    def best(self, shortest: int) -> int:
        rate = self.accepted / self.seen
        if not self.seconds["alone"]:
            return best_draft_length(rate, self.cost, shortest=shortest)
        alone = statistics.median(self.seconds["alone"])
        verify = statistics.median(self.seconds["verify"] or [alone])
        draft = statistics.median(self.seconds["draft"] or [alone * self.cost])
        # A pass over less can't take longer: what looks like it was disturbed.
        alone = min(alone, verify)
        return best_draft_length(rate, draft / alone, verify / alone, shortest)

    def add_draft(self, num_accepted: int, num_seen: int) -> None:
        """Count a draft of which `num_seen` tokens were looked at, up to the first wrong one, and `num_accepted` accepted."""
        self.accepted = MEMORY * self.accepted + num_accepted
        self.seen = MEMORY * self.seen + num_seen

    def add_time(self, kind: str, seconds: float) -> None:
        """Count the time of a step of the drafter (`"draft"`), or of a pass of the verifier, `"alone"` or to `"verify"`."""
        if self.timed:
            self.seconds[kind].append(seconds)


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
        cost (`float`): Time of a step of the SLM, as a share of that of the LLM, as long as it is not measured.
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
        eos = getattr(generation_config, "_eos_token_tensor", None)
        self.eos_token_ids = set() if eos is None else set(eos.flatten().tolist())
        self.position_limit = position_limit(decoder_text_config(slm.config), slm)
        self.draft_length = draft_length
        self.schedule = DraftLength(cost, timed=not generation_config.do_sample)
        self.cache_argument = cache_argument(slm.forward)
        self.options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if accepts(slm.forward, "logits_to_keep"):
            self.options["logits_to_keep"] = 1
        self.prompt: dict[str, Any] | None = None
        self.cache: Any = None
        self.cached: list[int] = []  # tokens of the response that the cache holds
        self.has_read = False  # whether the LLM has
        self.num_drafted = self.num_accepted = 0
        # Of this round: the draft, where it begins in the LLM's tokens, and when it was ready (in seconds).
        self.draft: list[int] = []
        self.begin, self.drafted_at = 0, 0.0

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(1, sequence_length)`): The LLM's tokens so far.

        Returns:
            `input_ids` with the draft behind them, and the scores `(1, draft_length, vocab_size)` that it was drawn by;
            `None` for these where nothing was drawn.
        """
        self.draft, self.begin, scores = [], input_ids.shape[1], []
        response = input_ids[0, self.context_length :].tolist()
        length = self.length(len(response))
        if length > 0:
            self.rewind(response)
        new = response[len(self.cached) :]
        for _ in range(length):
            start = time.perf_counter()
            logits = self.logits_processor(input_ids, self.step(new).to(input_ids.device))
            probabilities = logits.softmax(dim=-1)
            if self.generation_config.do_sample:
                scores.append(logits)
                token = torch.multinomial(probabilities, num_samples=1)
            else:
                token = logits.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=1)
            self.draft.append(int(token))
            # After a draft that was accepted as a whole, a step takes two tokens; one that takes more is catching up.
            if len(new) <= 2 and len(self.cached) > len(new):
                self.schedule.add_time("draft", time.perf_counter() - start)
            new = self.draft[-1:]
            unsure = self.draft_length is None and float(probabilities[0, token]) < UNSURE
            if unsure or new[0] in self.eos_token_ids:
                break
        self.drafted_at = time.perf_counter()
        return input_ids, torch.stack(scores, dim=1) if scores else None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Count what was accepted, and how long the LLM took. A draft is looked at up to its first wrong token."""
        if self.has_read:
            self.schedule.add_time("verify" if self.draft else "alone", time.perf_counter() - self.drafted_at)
        self.has_read = True
        if self.draft:
            # `num_matches` leaves out the last one of a draft that ends the response.
            accepted = num_equal(self.draft, input_ids[0, self.begin :].tolist())
            seen = min(accepted + 1, len(self.draft))
            self.schedule.add_draft(accepted, seen)
            self.num_accepted += accepted
            self.num_drafted += seen

    def length(self, response_length: int) -> int:
        """How many tokens to draft after a response of so many: none before the LLM has read, or where there is no room."""
        if self.prompt is None:
            self.prompt = self.read_prompt()
        if self.prompt is None:
            return 0
        length = self.schedule.choose() if self.draft_length is None else self.draft_length
        room = self.generation_config.max_length - self.context_length - response_length - 1
        if self.position_limit is not None:
            prompt_length = 1 if self.start_token_id is not None else self.prompt["inputs_embeds"].shape[1]
            room = min(room, self.position_limit - prompt_length - response_length)
        return min(length, room)

    def rewind(self, response: list[int]) -> None:
        """Take from the cache what is not of the response. The last token stays out of it: its successor is asked for."""
        same = num_equal(self.cached, response[:-1])
        if self.cache is not None:
            self.cache.crop(same - len(self.cached))
        self.cached = self.cached[:same]

    def step(self, new: list[int]) -> torch.Tensor:
        """
        Logits `(1, vocab_size)` after the response's tokens `new`, in the LLM's vocabulary.

        What one of the two vocabularies lacks can't be drafted.
        """
        prompt = self.prompt or {}
        tokens = torch.tensor([new], dtype=torch.long, device=self.slm.device)
        if self.slm.config.is_encoder_decoder:
            if self.cache is None:
                tokens = torch.tensor([[self.start_token_id, *new]], device=self.slm.device)
            inputs = prompt | {"decoder_input_ids": tokens}
        elif self.cache is None:
            self.cache = prompt.get(self.cache_argument)  # the prompt is there already with `fusion="kv"`
            embeds = prompt["inputs_embeds"][:, 0 if self.cache is None else self.cache.get_seq_length() :]
            inputs = {"inputs_embeds": torch.cat([embeds, embed_tokens(self.slm, tokens)], dim=1)}
        else:
            inputs = {"input_ids": tokens}
        if self.cache is None:
            self.cache = self.new_cache()
        outputs = self.slm(**inputs, **{self.cache_argument: self.cache}, **self.options)
        self.cached += new
        logits = outputs.logits[:, -1].float()
        missing = self.vocab_size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits

    def new_cache(self) -> Cache:
        """An empty cache of the SLM's, from which tokens can be taken again."""
        cache: Cache = DynamicCache(config=self.slm.config.get_text_config(decoder=True))
        cache.activate_past_recording()
        return EncoderDecoderCache(cache, DynamicCache()) if self.slm.config.is_encoder_decoder else cache


def num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def writing_parameters(model: PreTrainedModel) -> int:
    """Number of parameters that a step of writing reads: of the decoder, without embeddings, and of the LM head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embeddings = {id(parameter) for parameter in decoder.get_input_embeddings().parameters()}
    body = {id(p): p.numel() for p in decoder.parameters() if id(p) not in embeddings}
    return sum((body | {id(p): p.numel() for p in head.parameters()}).values())


_DRAFTING = threading.Lock()


@contextmanager
def drafting_by(llm: PreTrainedModel, make: Callable[..., CandidateGenerator]) -> Iterator[None]:
    """
    `llm` with candidates from the generator that `make` gives, for one thread at a time. transformers has no argument for one of
    one's own.
    """
    with _DRAFTING:
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

    The drafts are as long as pays, by how many of their tokens were accepted in this call and by how long the SLM's steps and
    the LLM's passes took in it; where no draft pays, the LLM writes alone, and one is tried now and then. Which tokens are
    written does not depend on it when they are the LLM's most probable ones. When they are sampled, their distribution doesn't
    but the single tokens do; so there times are not measured but taken from the numbers of parameters, and a seed repeats.

    Args:
        model: The LLM-to-SLM model.
        llm: The whole LLM, whose reading part is the model's.
        prompt: What the processor makes of one prompt.
        generation_config: Defaults to the LLM's.
        args, kwargs: Arguments of `generate`. `num_assistant_tokens` drafts always so many tokens.

    Returns:
        What the LLM's `generate` returns, response only. With `return_dict_in_generate=True` also `num_drafted` and
        `num_accepted`, the tokens that were drafted (up to the first wrong one of each draft) and accepted.

    Raises:
        ValueError: for more than one prompt, for beams, or for `assistant_ensemble_weight`.
    """
    ids, mask = prompt.get("input_ids"), prompt.get("attention_mask")
    if ids is None:
        raise ValueError("Lossless generation needs the LLM's tokens as `input_ids`: the LLM reads and verifies.")
    check_prompt_length(ids, llm, "LLM")
    if len(ids) != 1:
        raise ValueError(f"Lossless generation takes one prompt at a time, got {len(ids)}. Loop over them.")
    beams = option("num_beams", kwargs, generation_config, llm.generation_config) or 1
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

    if config.fusion == "kv":
        recording = recorded_key_values(body, config.llm_layers, ids.shape[1])
    else:
        recording = recorded_states(body, config.llm_layers, config.num_llm_layers)
    with recording as recorded:

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
            if getattr(generation_config, "assistant_ensemble_weight", None) is not None:
                raise ValueError(
                    "`assistant_ensemble_weight` mixes the drafter's distribution into the LLM's, so the output would not be "
                    "the LLM's own. Leave it out for lossless generation."
                )
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
