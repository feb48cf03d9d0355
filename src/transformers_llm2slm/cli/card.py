"""The command `llm2slm card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .shared import check_checkpoint, quiet


def card(
    model: Annotated[Path, Argument(metavar="DIR", help="Checkpoint: a local folder.", show_default=False)],
    dataset: Annotated[
        str | None, Option(metavar="NAME", help="What it was trained on: a data set of the hub, or a few words.")
    ] = None,
    license: Annotated[
        str | None,
        Option(metavar="ID", help="The licence of this checkpoint as the hub writes it, such as apache-2.0."),
    ] = None,
    language: Annotated[
        list[str] | None, Option(metavar="CODE", help="What it writes, such as de; repeatable.")
    ] = None,
    repo_id: Annotated[
        str | None, Option(metavar="NAME", help="Its place on the hub; else the card's, or the folder's name.")
    ] = None,
    base_model: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Hub id of the LLM, then of the SLM, if the checkpoint names local copies."),
    ] = None,
    tag: Annotated[list[str] | None, Option(metavar="NAME", help="A tag for the hub; repeatable.")] = None,
    limit: Annotated[list[str] | None, Option(metavar="TEXT", help="What it can't do; repeatable.")] = None,
    example: Annotated[str | None, Option(metavar="PROMPT", help="A prompt like those of the training.")] = None,
) -> None:
    """Write the model card of a checkpoint, or update it in place, from what lies in its folder."""
    from ..measurements import QUALITY, TRAINING, read_records, trainer_records
    from ..model_card import checkpoint_skeleton, write_model_card

    quiet()
    if not model.is_dir():
        raise ValueError(f"`card` takes a local folder, and {str(model)!r} is none: download the checkpoint first.")
    check_checkpoint(str(model))
    records = read_records(model)
    # What the trainer wrote by itself does not say of which weights it is, and knows less than our own records.
    missing = {TRAINING, QUALITY} - {record["kind"] for record in records}
    records = [record for record in trainer_records(model) if record["kind"] in missing] + records
    path = write_model_card(
        model,
        checkpoint_skeleton(model),
        dataset=dataset,
        license=license,
        language=language,
        repo_id=repo_id,
        base_model=base_model,
        tags=tag or (),
        limits=limit or (),
        example=example,
        records=records,
    )
    typer.echo(f"Wrote {path}.")
