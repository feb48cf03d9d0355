"""A shortlist: the tokens that the SLM may write, and an LM head of their size.

In a small model with a large vocabulary most of a decoding step is its LM head, which scores every token for the few that a task
needs. The name and the idea are those of machine translation (Jean et al., 2015, arXiv 1412.2007; `--shortlist` in Marian).
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .few_rows import FewRowLinear, few_row_linear

if TYPE_CHECKING:
    from .processing_llm2slm import LLM2SLMProcessor

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ALWAYS = ("eos_token_id", "pad_token_id", "bos_token_id", "forced_bos_token_id", "forced_eos_token_id")


def make_shortlist(processor: LLM2SLMProcessor, texts: Sequence[str], size: int | None = None) -> list[int]:
    """
    The tokens of some texts, for `model.shortlist`.

    Args:
        processor ([`LLM2SLMProcessor`]): The processor of the model.
        texts (`Sequence[str]`): Thousands of texts like those that it is to write: the training answers, and the prompts too where
            answers quote names from them.
        size (`int`, *optional*): Take the most frequent ones, so many. By default all that occur.

    Returns:
        `list[int]`: Token ids in order: those of the texts, the special ones, and single bytes and characters, by which a word that
        is in no text can still be spelled.

    Raises:
        ValueError: if there are no texts.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"`texts` must be a list of texts like those to write, thousands of them, got {texts!r:.80}.")
    tokenizer, counts = processor.tokenizer, Counter[int]()
    for start in range(0, len(texts), 1000):
        for labels in processor(text_target=list(texts[start : start + 1000]))["labels"]:
            counts.update(labels)
    frequent = {token for token, _ in counts.most_common(size)}
    characters = set("".join(texts)) | set(bytes_to_unicode().values())
    spelling = {
        token
        for text, token in tokenizer.get_vocab().items()
        if text.lstrip("\u2581") in characters or _BYTE.fullmatch(text)
    }
    return sorted((frequent | spelling | set(tokenizer.all_special_ids)) - {-100})


def as_token_ids(values: Any) -> list[int]:
    """A list of integers, which a config can hold, of a sequence, tensor or array of them; what is none stays as it is."""
    return [index(value) if hasattr(value, "__index__") else value for value in values]


class ShortlistHead(nn.Linear):
    """
    An LM head that scores some tokens, and gives all others negative infinity.

    Args:
        head (`nn.Linear`): The whole one, `vocab_size` rows; its rows are copied.
        token_ids (`Sequence[int]`): Tokens to score.
        required (`set[int]`): More of them, which generation needs.

    Raises:
        ValueError: for what is no token.
    """

    token_ids: torch.Tensor
    unlisted: torch.Tensor

    def __init__(self, head: Any, token_ids: Sequence[int], required: set[int]):
        whole = head.weight.detach()
        listed = _checked(token_ids, required, len(whole))
        # On "meta", as the weights are the other's.
        super().__init__(whole.shape[1], len(listed), bias=head.bias is not None, device="meta")
        self.made_of, self.vocab_size, self.listed = _state(head, token_ids, required), len(whole), listed
        self.source = (head.weight,)  # kept alive, so that no other weight gets its id
        chosen = torch.tensor(listed, device=whole.device)
        self.weight = nn.Parameter(whole[chosen], requires_grad=False)
        if head.bias is not None:
            self.bias = nn.Parameter(head.bias.detach()[chosen], requires_grad=False)
        self.register_buffer("token_ids", chosen)
        self.register_buffer("unlisted", torch.ones_like(whole[:, 0], dtype=torch.bool).index_fill(0, chosen, False))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(..., vocab_size)`."""
        listed = few_row_linear(hidden_states, self.weight, self.bias)
        logits = listed.new_full((*listed.shape[:-1], self.vocab_size), -torch.inf)
        return logits.index_copy(-1, self.token_ids, listed)


def _state(head: Any, token_ids: Sequence[int], required: set[int]) -> tuple[Any, ...]:
    """What tells whether a shortlist's head has to be made anew."""
    weight = head.weight
    # Some of it as well, for what is written to `weight.data`, as adapters are merged, leaves no other trace.
    sample = weight.detach()[:: max(len(weight) // 256, 1)].float().sum().item()
    return id(weight), weight._version, weight.data_ptr(), weight.dtype, sample, list(token_ids), required


class _Turns:
    """Calls in several threads: those that write with the same LM head run side by side, others wait until it is free."""

    def __init__(self) -> None:
        self.condition, self.inside, self.wanted, self.undo = threading.Condition(), 0, None, ExitStack()

    @contextmanager
    def take(self, wanted: Any, change: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """The block runs after `change` was entered by the first of those that want the same, which the last leaves."""
        with self.condition:
            self.condition.wait_for(lambda: not self.inside or self.wanted == wanted)
            if not self.inside:
                self.undo.enter_context(change())
                self.wanted = wanted
            self.inside += 1
        try:
            yield
        finally:
            with self.condition:
                self.inside -= 1
                if not self.inside:
                    self.undo.close()
                    self.condition.notify_all()


# Beside the models, as a lock can be neither copied nor saved with one.
_TURNS: WeakKeyDictionary[PreTrainedModel, _Turns] = WeakKeyDictionary()


@contextmanager
def shortlisted(slm: PreTrainedModel, token_ids: Sequence[int] | None, *sources: Any) -> Iterator[None]:
    """
    The SLM with an LM head for some tokens, for as long as the block runs. Calls in other threads with another shortlist, or with
    none, wait.

    Args:
        slm: The SLM.
        token_ids: What it may write; `None` and an empty list mean all tokens.
        sources: Generation configs, and arguments of `generate`, whose special tokens it may write as well.

    Raises:
        ValueError: for what is no token, or for another shortlist than that of an exported SLM.
    """
    listed = list(token_ids or [])
    if slm.get_output_embeddings() is None:  # in a graph
        if sorted(listed) != sorted(getattr(slm.generation_config, "shortlist", None) or []):
            raise ValueError(
                "An exported model writes by the shortlist that it was exported with: set `model.shortlist` before you export."
            )
        yield
        return
    required = _required(sources) if listed else set()
    change = partial(_narrowed, slm, listed, required) if listed else nullcontext
    with _TURNS.setdefault(slm, _Turns()).take((listed, required), change):
        yield


@contextmanager
def _narrowed(slm: PreTrainedModel, token_ids: list[int], required: set[int]) -> Iterator[None]:
    """The SLM with a head for these tokens."""
    head: Any = slm.get_output_embeddings()
    # Kept beside the model's modules, not among them: it is no part of its weights.
    narrow = vars(slm).get("_shortlist_head")
    if narrow is None or narrow.made_of != _state(head, token_ids, required):
        narrow = vars(slm)["_shortlist_head"] = ShortlistHead(head, token_ids, required)

    def mask(_: nn.Module, __: Any, output: Any) -> Any:
        # What a model does to logits behind its head, such as capping them, must not bring the others back.
        output.logits = output.logits.masked_fill(narrow.unlisted, -torch.inf)
        return output

    hook = slm.register_forward_hook(mask)
    # A head that is more than a matrix, with an adapter say, scores all tokens.
    if type(head) in (nn.Linear, FewRowLinear):
        slm.set_output_embeddings(narrow)
    try:
        yield
    finally:
        slm.set_output_embeddings(head)
        hook.remove()


def _required(sources: Sequence[Any]) -> set[int]:
    """The special tokens that generation configs and arguments name."""
    required: set[Any] = set()
    for source in sources:
        named = source if isinstance(source, Mapping) else vars(source) if source is not None else {}
        for name in _ALWAYS:
            value = named.get(name)
            required |= set(value) if isinstance(value, list) else {value}
    return required - {None}


def _checked(token_ids: Sequence[int], required: set[int], vocab_size: int) -> list[int]:
    """A shortlist in order, with the tokens that generation needs."""
    if wrong := [token for token in token_ids if not isinstance(token, int) or not 0 <= token < vocab_size]:
        raise ValueError(
            f"`shortlist` must hold token ids in [0, {vocab_size - 1}] of the SLM's vocabulary, got {wrong[0]!r}. Make it with "
            "`make_shortlist(processor, texts)`."
        )
    return sorted({*token_ids, *(token for token in required if token < vocab_size)})
