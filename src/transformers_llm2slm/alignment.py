"""Which LLM token covers the same characters as an SLM token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

Offsets = Sequence[tuple[int, int]]


def align_tokens(slm_offsets: Offsets, llm_offsets: Offsets) -> list[int]:
    """
    For each SLM token, the index of the LLM token that covers its last character.

    The last one, because a decoder-only LLM has then read the whole of the SLM's token. Where several LLM tokens cover
    that character (the bytes of one emoji, a word and the mark of its beginning), the latest is taken; where none covers
    it (white space that a tokenizer leaves out), the next one, or the last with characters if there is no next. Special
    tokens cover no characters: those before the text go to the LLM's first token, those after it to its last. Equal
    offsets are those of one tokenizer: each token is then its own counterpart.

    Args:
        slm_offsets, llm_offsets (`Sequence[tuple[int, int]]`): Start and end of each token in characters of one text, as
            `return_offsets_mapping=True` gives them; special tokens are `(0, 0)`.

    Returns:
        `list[int]` of the length of `slm_offsets`, with values in `[0, len(llm_offsets))`.
    """
    if list(slm_offsets) == list(llm_offsets):
        return list(range(len(llm_offsets)))
    content = [index for index, (start, end) in enumerate(llm_offsets) if end > start]
    starts = [llm_offsets[index][0] for index in content]
    last = len(llm_offsets) - 1
    alignment, seen_text = [], False
    for start, end in slm_offsets:
        seen_text = seen_text or end > start
        if end <= start or not content:
            alignment.append(last if seen_text else 0)
            continue
        place = bisect_left(starts, end) - 1  # the last one that starts before the end of the SLM's token
        if place < 0 or llm_offsets[content[place]][1] < end:
            place += 1
        alignment.append(content[min(place, len(content) - 1)])
    return alignment
