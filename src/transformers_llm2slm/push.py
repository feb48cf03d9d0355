"""What a push of a model does beside uploading what was just saved: its card, an LLM that was asked for, stale weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from .configuration_llm2slm import LLM_SUBFOLDER
from .weight_files import stale_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _PreTrainedModel
else:
    _PreTrainedModel = object

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"


class _Timestamps(dict[str, float]):
    """When files were changed, and the card that lay among them."""

    card: str | None = None


class PushMixin(_PreTrainedModel):
    """
    Writes our card into the folder that `push_to_hub` or `save_pretrained(..., push_to_hub=True)` is about to upload.

    Both put the repository's card there, or a boilerplate, over what is there, and then call `_upload_modified_files`, which
    uploads what is newer than the folder was (`PushToHubMixin` in transformers/utils/hub.py).
    """

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """What lay in a folder before it was saved to, and is not pushed: not the LLM, which is saved first."""
        # Only `save_pretrained` asks, before it writes, and hands the answer on to the upload.
        found = super()._get_files_timestamps(working_dir)
        if self.config.llm_in_checkpoint:
            found.pop(LLM_SUBFOLDER, None)
        timestamps = _Timestamps(found)
        card = Path(working_dir, CARD_NAME)
        if card.is_file():
            with card.open(encoding="utf-8-sig", newline="") as file:
                timestamps.card = file.read()
        return timestamps

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        files_timestamps: dict[str, float],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        try:
            from transformers_llm2slm.model_card import update_pushed_card
        except ImportError:  # a checkpoint's copy of the code has no template; transformers' card goes up
            pass
        else:
            local_card = getattr(files_timestamps, "card", None)
            update_pushed_card(self, working_dir, repo_id, token=kwargs.get("token"), local_card=local_card)
        commit = super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)
        if not kwargs.get("create_pr"):
            now = super()._get_files_timestamps(working_dir)
            written = [name for name, time in now.items() if time > files_timestamps.get(name, float("-inf"))]
            delete_stale_weights(repo_id, written, kwargs.get("revision"), kwargs.get("token"))
        return commit


def delete_stale_weights(repo_id: str, written: Sequence[str], revision: str | None, token: str | bool | None) -> None:
    """Delete what an earlier push left of weights in other files: whoever loads would be given those, or refused."""
    api = HfApi(token=token)
    if stale := stale_weights(api.list_repo_files(repo_id, revision=revision), written):
        logger.info(f"Deleting weights of an earlier push to {repo_id}: {', '.join(stale)}")
        api.delete_files(repo_id, stale, revision=revision, commit_message="Delete weights of an earlier push")
