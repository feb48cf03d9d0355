"""The command `llm2slm`: its entry point, and how it tells errors. The commands are in `commands.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """
    Run the command line and exit: 0, 2 for an error (one line on stderr), 130 if interrupted.

    Args:
        arguments (`Sequence[str]`, *optional*): Defaults to those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Taken wherever it stands, as one adds it to a command that has just failed.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
            sys.exit(fail('The command line needs typer and rich: pip install "transformers-llm2slm[cli]".'))
        import typer

        from .commands import app

        # What `typer.Exit` carries is returned; a command itself returns nothing.
        code = typer.main.get_command(app).main(args=arguments, prog_name="llm2slm", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        # Abort, which older versions of typer make of an interrupt, has no text and nothing to tell.
        code = INTERRUPTED if type(error).__name__ == "Abort" else fail(describe(error))
    if code == INTERRUPTED:
        sys.stderr.write("\ninterrupted\n")
    sys.exit(code or 0)


def fail(text: str) -> int:
    """Tell an error in one line on stderr; the exit code that goes with it."""
    sys.stderr.write(f"error: {' '.join(text.split())}\n")
    return 2


def describe(error: BaseException) -> str:
    """The text of an error, without what wraps it; with its class where the text alone says too little."""
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    if hasattr(error, "format_message"):  # wrong usage: typer's own errors, whose classes are not public
        context = getattr(error, "ctx", None)
        usage = f" See `{context.command_path} --help`." if context is not None else ""
        return f"{error.format_message().rstrip('.')}.{usage}"
    text = str(error).strip()
    if text and isinstance(error, (ImportError, OSError, RuntimeError, ValueError)):
        return text
    return f"{type(error).__name__}: {text} (`--debug` shows where)"
