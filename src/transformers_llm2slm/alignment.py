"""Which LLM token covers the same characters as an SLM token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

Offsets = Sequence[tuple[int, int]]


def align_tokens(slm_offsets: Offsets, llm_offsets: Offsets) -> list[int]:
    """
    For each SLM token, the index of the LLM token that covers its last character.

    The last one, because a decoder-only LLM has then read the whole of the SLM's token. Where two LLM tokens end at that
    character (the bytes of one emoji), the later is taken; where none covers it (white space that a tokenizer leaves
    out), the next one. Special tokens cover no characters: those before the text go to the LLM's first token, those
    after it to its last.

    Args:
        slm_offsets, llm_offsets (`Sequence[tuple[int, int]]`): Start and end of each token in characters of one text, as
            `return_offsets_mapping=True` gives them; special tokens are `(0, 0)`.

    Returns:
        `list[int]` of the length of `slm_offsets`, with values in `[0, len(llm_offsets))`.
    """
    content = [index for index, (start, end) in enumerate(llm_offsets) if end > start]
    ends = [llm_offsets[index][1] for index in content]
    last = len(llm_offsets) - 1
    alignment, seen_text = [], False
    for start, end in slm_offsets:
        if end <= start or not content:
            alignment.append(last if seen_text else 0)
            continue
        seen_text = True
        place = bisect_right(ends, end) - 1
        if place < 0 or ends[place] < end:
            place += 1
        alignment.append(content[min(place, len(content) - 1)])
    return alignment
