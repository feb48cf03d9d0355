"""
Checkpoints that carry a copy of this code (`save_pretrained(..., include_code=True)`), so that they load where the package
is not installed, with `trust_remote_code=True`.

A configuration or processor with an `auto_map` is saved with the code; the installed package drops it when it loads one.
What is copied is what `auto_llm2slm.py` imports, directly or not, wherever the import stands. What a copy can do without, or
what needs other packages or files, is imported in a `try`, by the name of the package: `from transformers_llm2slm.x import y`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, PushToHubMixin

from .version import __version__

# Whether this is a checkpoint's copy, which transformers imports as part of a package of its own.
IS_COPY = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")

ENTRY_MODULE = "auto_llm2slm"
TASK = "text2text-generation"
PROCESSOR_AUTO_MAP = {"AutoProcessor": f"{ENTRY_MODULE}.LLM2SLMProcessor"}

HEADER = f"""\
# A copy of transformers-llm2slm {__version__} (Apache-2.0), which later releases do not reach. To update it, load this checkpoint
# with a newer package installed, and save model and processor again with `include_code=True`.
"""


def with_code(config_dict: dict[str, Any]) -> dict[str, Any]:
    """What the `config.json` of a checkpoint with code holds: which classes and which pipeline to take of it, too."""
    model = f"{ENTRY_MODULE}.LLM2SLMForConditionalGeneration"
    auto_map = {"AutoConfig": f"{ENTRY_MODULE}.LLM2SLMConfig", "AutoModel": model, "AutoModelForSeq2SeqLM": model}
    pipeline = {"impl": f"{ENTRY_MODULE}.Text2TextGenerationPipeline", "pt": ["AutoModelForSeq2SeqLM"], "type": "text"}
    pipelines = config_dict.get("custom_pipelines", {}) | {TASK: pipeline}
    return config_dict | {"auto_map": auto_map, "custom_pipelines": pipelines}


def without_code(config_dict: dict[str, Any]) -> dict[str, Any]:
    """
    What the class that loads a `config.json` is to see of it: a checkpoint's copy all, the installed package the rest.

    It needs no `auto_map`, and `pipeline` would ask for `trust_remote_code` where it finds the task in `custom_pipelines`.
    """
    if IS_COPY:
        return config_dict
    kept = {key: value for key, value in config_dict.items() if key != "auto_map"}
    if isinstance(pipelines := kept.pop("custom_pipelines", None), dict):
        if others := {task: pipeline for task, pipeline in pipelines.items() if task != TASK}:
            kept["custom_pipelines"] = others
    return kept


@contextmanager
def code_included(part: PushToHubMixin, include_code: bool) -> Iterator[None]:
    """
    While this lasts, a configuration, model or processor is saved with the code, if so asked.

    A checkpoint's copy always saves itself too: what it trains is to load where it was trained.
    """
    part = getattr(part, "config", part)  # a model's `auto_map` is its configuration's
    if hasattr(part, "auto_map") or not (include_code or IS_COPY):
        yield
        return
    part.auto_map = {}  # what is written is `with_code`'s
    try:
        yield
    finally:
        del part.auto_map


def save_code(save_directory: str | os.PathLike) -> None:
    """Copy the entry module and all that it imports of this package: the files that transformers looks for on loading."""
    entry = Path(__file__).with_name(f"{ENTRY_MODULE}.py")
    for file in (entry, *map(Path, get_relative_import_files(entry))):
        text = file.read_text(encoding="utf-8").removeprefix(HEADER)
        Path(save_directory, file.name).write_text(HEADER + text, encoding="utf-8")


class IncludesCode(PushToHubMixin):
    """
    A configuration, model or processor that can be saved with a copy of the code.

    With `include_code=True`, `save_pretrained` and `push_to_hub` put the copy beside the weights, for people who load the
    checkpoint with `trust_remote_code=True` where the package is not installed. It is of the version that saves, and grows
    stale: it is updated by loading the checkpoint with a newer package and saving it so again.
    """

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with `include_code`."""
        with code_included(self, kwargs.pop("include_code", False)):
            return super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with `include_code`."""
        with code_included(self, kwargs.pop("include_code", False)):
            return super().push_to_hub(*args, **kwargs)

    def _save_code_and_push(self, save_directory: str | os.PathLike, push_to_hub: bool, **kwargs: Any) -> None:
        """The end of saving a configuration or processor: its code, if so asked, before all goes to the Hub, if so asked."""
        if hasattr(self, "auto_map"):
            save_code(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "") -> None:
        """
        Does nothing. Elsewhere it has a class saved with its module, for one Auto class; `include_code=True` serves all.

        transformers calls it on each class that it loads with `trust_remote_code=True`, and that may be the installed
        package's, see `auto_llm2slm.py`.
        """
