"""Values of arguments, for the command line and the example scripts."""

from __future__ import annotations


def integers(option: str, text: str | None) -> int | list[int] | None:
    """`4` is a number, `4,8` and `4,` are lists. Raises a `ValueError` that names the option."""
    if text is None:
        return None
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"`--{option}` takes a number or a list of them, such as 4 or 0,5,11, got {text!r}.")
    return numbers if "," in text else numbers[0]
