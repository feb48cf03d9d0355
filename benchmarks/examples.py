#!/usr/bin/env python3
"""
Run the commands that `examples/README.md` gives for two CPU cores without the Hub, and record their scores.

    python benchmarks/examples.py

Each command runs as it stands there, in a new output folder. Writes `results/examples.json`, by the script's name.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

from transformers_llm2slm.measurements import provenance

PROJECT = pathlib.Path(__file__).resolve().parent.parent
KEPT = re.compile(r"(eval|predict)_(loss|rougeL|chrf|bleu|samples)")


def commands() -> dict[str, str]:
    """The training commands of the page that use the models of `prepare_models.py`, by script."""
    page = (PROJECT / "examples" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(python examples/(run_\w+)\.py.*?)```", page, re.DOTALL)
    return {script: command for command, script in blocks if "_path models/" in command}


def run(command: str) -> dict[str, float]:
    """Run one; returns its scores and the seconds it took."""
    folder = PROJECT / command.rpartition("--output_dir ")[2].strip()
    shutil.rmtree(folder, ignore_errors=True)
    # So that `python` is this one.
    paths = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    began = time.perf_counter()
    subprocess.run(["bash", "-c", command], cwd=PROJECT, env=os.environ | {"PATH": paths}, check=True)
    seconds = time.perf_counter() - began
    scores = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    found = {name: round(value, 3) for name, value in scores.items() if KEPT.fullmatch(name)}
    return found | {"seconds": round(seconds)}


if __name__ == "__main__":
    file = PROJECT / "benchmarks" / "results" / "examples.json"
    results = {name: run(arguments) for name, arguments in commands().items()}
    file.write_text(json.dumps({"scores": results} | provenance("python benchmarks/examples.py"), indent=1) + "\n")
