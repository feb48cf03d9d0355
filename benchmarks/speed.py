"""
How fast LLM, SLM and LLM-to-SLM write, eager and exported, beside the LLM's other ways to decode.

    python benchmarks/speed.py [--pair PAIR] [--rounds 7] [--sweep-rounds 2] [--models DIR] [--work-dir DIR] [--fresh]
    python benchmarks/speed.py --trained CHECKPOINT --prompts FILE.jsonl [--pair none]

Pairs of published sizes, with random weights, or with those of the checkpoints in the folder `--models`. For each pair all
contestants are loaded into one process (CTranslate2, which would slow torch there, into one beside it) and run one after another in rounds, after a short one to warm up, so that a load that
comes and goes on the machine meets all of them. Everything is greedy (or by beams) and always of the length that is asked for. The
conditions are a base, 128 tokens in and 128 out, batch size 1, and for the pair of T5 others that differ from it in one thing each.

    LLM                     its own `generate`; and in bfloat16
    SLM alone               its own `generate` on the encoded prompt; in the base also with static cache and torch.compile
    hybrid                  the LLM-to-SLM model; in the base also with its LLM in bfloat16
    ..., linear layers ...  (base) the LLM with the linear layers for few rows that SLM and hybrid write with
    hybrid, onnx ...        the model exported for ONNX Runtime and OpenVINO
    LLM, ctranslate2 int8   the whole LLM in CTranslate2
    assisted, 70 % ...      (base) transformers' assisted generation with the SLM as assistant, at given acceptance rates: the
                            assistant does all its work, and some of its tokens are replaced by wrong ones. Drafts are as long
                            as is best at that rate by the measured times of bare steps
    prompt lookup           (base) of a text of which half is quoted from the prompt

`assisted` and `prompt lookup` have the LLM write a given text, as the own text of random weights is one token over and over.
What every step must read at least, weights and cache, over the bandwidth of the memory, is the limit for its time. Start-up is
measured in processes that load one contestant each. With `--trained`, real prompts are answered to their own end.

Results are written as they come, and what is there already is not measured again, unless with `--fresh`. The exit code is 1
if a target is missed or could not be measured. `--tiny` tries all of this out on toy models, where targets mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from speed_pairs import PAIRS, Loaded, SpeedPair, cells, export_label, load, load_hybrid, prepare
from speed_plots import draw_all
from speed_report import (
    COMPILED,
    CT2,
    HYBRID_BF16,
    LLM_ALIKE,
    LLM_BF16,
    assisted_name,
    checks,
    show,
)
from speed_rivals import (
    CTranslate2,
    StepClock,
    assisted_contestant,
    fitting_draft_lengths,
    lookup_of_given_text,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, CompileConfig, PreTrainedConfig
from transformers.utils import logging

from transformers_llm2slm.contestants import (
    HYBRID,
    LLM,
    LOOKUP,
    SLM,
    TOTAL,
    Conditions,
    Contestant,
    figures_of,
    hybrid_contestant,
    int8_block_of,
    least_bytes,
    llm_contestant,
    race,
    random_prompts,
    read_by_llm,
    read_by_slm,
    slm_contestant,
    with_few_row_linears,
)
from transformers_llm2slm.exported import LLM2SLMExportedModel
from transformers_llm2slm.few_rows import few_row_linears
from transformers_llm2slm.measurements import provenance
from transformers_llm2slm.speed import Decoding, memory_bandwidth, seconds_of, spread, step_bytes

RATES = (0.5, 0.7, 0.9)
# Exports that take part in the rounds; that of OpenVINO in float32 is among the steps alone.
RACING = (("onnx", False), ("onnx", True), ("openvino", True))
LIBRARIES = ("onnxruntime", "openvino", "ctranslate2")
# A step of the SLM by PyTorch's linear layers.
PLAIN = "eager, PyTorch's linear layers"
# Seconds before each contestant, for the threads of the one before to fall asleep.
PAUSE = 0.05
WARM_UP_TOKENS, START_UP_TOKENS, MIN_ROUNDS = 8, 16, 2
# The base may take so many times as long as a cell of the sweep.
BASE_FACTOR = 36


# Contestants ---------------------------------------------------------------------------------------------------------
def contestants_for(
    loaded: Loaded, conditions: Conditions, base: bool, failures: dict[str, str]
) -> tuple[dict[str, Contestant], dict[str, Any]]:
    """The contestants, the LLM first, and how the drafts of some were set; what fails is noted in `failures` and left out."""
    model, llm, pair = loaded.model, loaded.llm, loaded.pair
    inputs = random_prompts(model, conditions)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    whole = pair.llm_dtype == torch.float32
    slm = slm_contestant(model, inputs, conditions)
    found = {LLM if whole else LLM_BF16: llm_contestant(llm, inputs, conditions)}
    found |= {SLM: slm, HYBRID if whole else HYBRID_BF16: hybrid_contestant(model, inputs, conditions, slm.step_bytes)}
    if base and whole:
        found[LLM_ALIKE] = with_few_row_linears(found[LLM], llm)
    if base and loaded.halved is not None:
        halved = loaded.halved
        found[LLM_BF16] = llm_contestant(halved.model.whole_llm, inputs, conditions)
        found[HYBRID_BF16] = hybrid_contestant(halved, inputs, conditions, slm.step_bytes)
    for label in [export_label(*kind) for kind in RACING if export_label(*kind) in loaded.exported]:
        other = loaded.exported[label]
        precision = (torch.float32, int8_block_of(other))
        step = least_bytes(model.slm, read_by_slm(model, inputs), conditions, *precision)
        found[f"{HYBRID}, {label}"] = hybrid_contestant(other, inputs, conditions, step)
    if loaded.ctranslate2 is not None:
        step = least_bytes(llm, read_by_llm(llm, prompt), conditions, torch.float32, 0)
        found[CT2] = loaded.ctranslate2.contestant(inputs, conditions, step)
    drafts: dict[str, Any] = {}
    if base:
        if pair.one_tokenizer:
            assistant = Decoding(model.slm, read_by_slm(model, inputs))
            drafts = {"draft lengths": fitting_draft_lengths(llm, assistant, prompt, RATES)}
            for rate, length in drafts["draft lengths"].items():
                found[assisted_name(rate)] = assisted_contestant(llm, model.slm, prompt, conditions, rate, length)
        found[LOOKUP] = lookup_of_given_text(llm, prompt, conditions)
        compiled = slm_contestant(model, inputs, conditions, **compiling())
        found[COMPILED] = dataclasses.replace(compiled, write=always_compiled(compiled, conditions))
    for name in list(found):
        try:
            found[name].write(min(conditions.new_tokens, WARM_UP_TOKENS))
        except Exception as error:  # the others are measured all the same
            failures[name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"  FAILED: {name}: {failures[name][:300]}", flush=True)
            del found[name]
    return found, drafts


def compiling() -> dict[str, Any]:
    """Arguments of `generate` for a static cache and a compiled step; transformers compiles on accelerators alone."""
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def always_compiled(contestant: Contestant, conditions: Conditions) -> Callable[[int], torch.Tensor]:
    """Writes a single token, or all of them, as the cache's length is a part of what is compiled."""
    return lambda new_tokens: contestant.write(1 if new_tokens == 1 else conditions.new_tokens)[:, :new_tokens]


# One pair, in a process of its own -----------------------------------------------------------------------------------
class Results:
    """The results of all pairs, on disk after every change."""

    def __init__(self, path: pathlib.Path, fresh: bool = False):
        self.path = path
        there = path.exists() and not fresh
        self.content: dict[str, Any] = json.loads(path.read_text()) if there else {"pairs": {}}

    def pair(self, name: str) -> dict[str, Any]:
        empty = {"cells": {}, "steps": {}, "start-up": {}, "failures": {}}
        return self.content["pairs"].setdefault(name, empty)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def measure(pair: SpeedPair, options: argparse.Namespace) -> None:
    """Everything that all contestants take part in."""
    results = Results(options.output)
    stored, began = results.pair(pair.name), time.perf_counter()

    def log(text: str) -> None:
        print(f"  [{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    loaded = load(pair, options.folder)
    log("loaded")
    conditions = cells(pair.sweeps, options.tiny)
    for index, cell in enumerate(conditions):
        if str(cell) in stored["cells"]:
            continue
        base, failures = index == 0, {}
        contestants, drafts = contestants_for(loaded, cell, base, failures)
        seconds, written = race(
            contestants,
            cell,
            options.rounds if base else options.sweep_rounds,
            warm_up_tokens=min(cell.new_tokens, WARM_UP_TOKENS),
            max_seconds=options.cell_seconds * (BASE_FACTOR if base else 1),
            min_rounds=MIN_ROUNDS if base else 1,
            pause=PAUSE,
        )
        accepted = {name: it.drafts.acceptance_rate for name, it in contestants.items() if it.drafts is not None}
        stored["cells"][str(cell)] = {
            **provenance(options.command, *LIBRARIES),
            "conditions": dataclasses.asdict(cell),
            "wait policy": os.environ.get("OMP_WAIT_POLICY", "default"),
            "rounds": len(next(iter(seconds.values()))[TOTAL]),
            "figures": with_ratios(figures_of(seconds, cell)),
            "step bytes": {name: it.step_bytes for name, it in contestants.items() if it.step_bytes is not None},
            "accepted": accepted,
            **drafts,
            "written as the first of the kind": agreements(written),
            "failures": failures,
            "seconds": seconds,
        }
        # The base first, whatever was measured before.
        stored["cells"] = {str(it): stored["cells"][str(it)] for it in conditions if str(it) in stored["cells"]}
        results.save()
        log(f"{cell}: {stored['cells'][str(cell)]['rounds']} rounds")
    if not stored["steps"]:
        stored["steps"] = measure_steps(loaded, conditions[0], options.rounds)
        results.save()
        log("steps")


def with_ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures, with the ratio of each median to that of the first contestant, the LLM."""
    first = next(iter(figures.values()))
    for row in figures.values():
        shared = [key for key in row if key in first and key != "times the first"]
        row["over the LLM's"] = {key: row[key]["median"] / first[key]["median"] for key in shared}
    return figures


def agreements(written: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Share of the tokens that are those of the LLM, for its other ways to write, and of the hybrid, for its others."""
    shares = {}
    for names in (
        [name for name in written if name.startswith(LLM)],
        [name for name in written if name.startswith((SLM, HYBRID))],
    ):
        shares |= {name: float((written[name] == written[names[0]]).float().mean()) for name in names[1:]}
    return shares


def measure_steps(loaded: Loaded, conditions: Conditions, rounds: int) -> dict[str, Any]:
    """
    Seconds of a step of the SLM in each runtime, inside of `generate` and bare, beside the bandwidth of the memory, which is
    measured in each round, and the limit that follows.
    """
    model = loaded.model
    inputs = random_prompts(model, conditions)
    prompt, read = model.model.slm_prompt(model.encode_prompt(**inputs)), read_by_slm(model, inputs)
    kinds: dict[str, tuple[Any, dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
        "eager": (model.slm, prompt, read, ()),
        PLAIN: (model.slm, prompt, read, ()),
        "compiled, static cache": (model.slm, prompt | compiling(), {}, ()),
    }
    for label, other in loaded.exported.items():
        own = other.model.slm_prompt(other.encode_prompt(**inputs))
        kinds[label] = (other.slm, own, read_by_slm(other, inputs), (torch.float32, int8_block_of(other)))

    def in_generate(slm: Any, arguments: dict[str, Any]) -> float:
        clock = StepClock()
        slm.generate(**dict(arguments), **conditions.arguments(conditions.new_tokens), streamer=clock)
        return clock.step_seconds(conditions.new_tokens)

    def bare(slm: Any, read: dict[str, Any]) -> float:
        decoding = Decoding(slm, read)
        return statistics.median(seconds_of(decoding.step) for _ in range(conditions.new_tokens - 1))

    seconds: dict[str, dict[str, list[float]]] = {}
    failures: dict[str, str] = {}
    bandwidth = []
    for index in range(rounds + 1):
        bandwidth.append(memory_bandwidth(passes=3))
        for label, (slm, arguments, state, _) in kinds.items():
            if label in failures:
                continue
            time.sleep(PAUSE)
            try:
                with nullcontext() if label == PLAIN else few_row_linears(slm):
                    row = {"in generate": in_generate(slm, arguments)} | ({"bare": bare(slm, state)} if state else {})
            except Exception as error:
                failures[label] = f"{type(error).__name__}: {error}"[:2000]
                seconds.pop(label, None)
                continue
            for name, value in row.items() if index else ():
                seconds.setdefault(label, {}).setdefault(name, []).append(value)
    table: dict[str, Any] = {}
    speed = statistics.median(bandwidth[1:])
    for label, times in seconds.items():
        least = step_bytes(model.slm, read, conditions.new_tokens, *kinds[label][3])
        limit = least["total"] / speed
        table[label] = {
            "bytes": least,
            "limit, s": limit,
            **{f"{name}, s": spread(values) for name, values in times.items()},
            **{f"{name}, times the limit": statistics.median(values) / limit for name, values in times.items()},
        }
    return {"bandwidth, bytes/s": spread(bandwidth[1:]), "table": table, "failures": failures}


# Start-up, one contestant in a process -------------------------------------------------------------------------------
def start_up(name: str, pair: SpeedPair, folder: pathlib.Path) -> dict[str, Any]:
    """Seconds to load one contestant, and the peak of this process's memory when it has written a little."""
    conditions = Conditions(prompt_length=16, new_tokens=START_UP_TOKENS)
    ids = torch.randint(3, 500, (1, conditions.prompt_length), generator=torch.Generator().manual_seed(1))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pair.fusion == "align":
        own = {"slm_input_ids": ids, "slm_attention_mask": torch.ones_like(ids), "alignment": torch.arange(16)[None]}
        inputs |= own

    def plain(subfolder: str) -> Any:
        config = PreTrainedConfig.from_pretrained(folder / subfolder)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(folder / subfolder, dtype="auto").eval()

    halved = pair.llm_dtype == torch.float32 and name in (LLM_BF16, HYBRID_BF16)
    llm = "llm-bfloat16" if halved else "llm"
    began = time.perf_counter()
    if name in (LLM, LLM_BF16, SLM):
        contestant = llm_contestant(plain("slm" if name == SLM else llm), inputs, conditions)
    elif name in (HYBRID, HYBRID_BF16):
        contestant = hybrid_contestant(load_hybrid(folder, llm), inputs, conditions)
    elif name == CT2:
        contestant = CTranslate2(folder / "ctranslate2").contestant(inputs, conditions, None)
    elif name == "assisted":
        contestant = assisted_contestant(plain("llm"), plain("slm"), inputs, conditions, 0.7, 4)
    elif name != "nothing":
        exported = LLM2SLMExportedModel.from_pretrained(folder / name.removeprefix(f"{HYBRID}, "))
        contestant = hybrid_contestant(exported, inputs, conditions)
    loading = time.perf_counter() - began
    if name != "nothing":
        contestant.write(START_UP_TOKENS)
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"load, s": loading, "peak memory, bytes": 1024 * peak}


def start_ups(pair: SpeedPair, prepared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is to be started, with its bytes on disk and the seconds that it took to make."""
    sizes, made = prepared["bytes"], prepared["seconds"]
    disk = {"nothing": 0}
    if pair.llm_dtype == torch.float32:
        disk |= {LLM: sizes["llm"], LLM_BF16: sizes["llm-bfloat16"], HYBRID: sizes["hybrid"] + sizes["reading part"]}
    else:
        disk |= {LLM_BF16: sizes["llm"]}
    disk |= {SLM: sizes["slm"], HYBRID_BF16: sizes["hybrid"] + sizes["reading part, bfloat16"]}
    found: dict[str, dict[str, Any]] = {name: {"on disk, bytes": size} for name, size in disk.items()}
    for label in [export_label(*kind) for kind in RACING]:
        if label in made:
            found[f"{HYBRID}, {label}"] = {"on disk, bytes": sizes[label], "export, s": made[label]}
    if "ctranslate2 int8" in made:
        found[CT2] = {"on disk, bytes": sizes["ctranslate2"], "export, s": made["ctranslate2 int8"]}
    if pair.one_tokenizer:
        found["assisted"] = {"on disk, bytes": sizes["llm"] + sizes["slm"]}
    return found


# All of them ---------------------------------------------------------------------------------------------------------
def child(options: argparse.Namespace, *arguments: str, capture: bool = False) -> str:
    """Run a part of this script in a process of its own, with the same options; what it printed, if that is captured."""
    command = [sys.executable, __file__, *arguments, "--output", str(options.output), "--command", options.command]
    for name in ("rounds", "sweep_rounds", "cell_seconds", "threads", "models", "num_prompts"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--tiny"] if options.tiny else []
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with exit code {done.returncode}")
    return done.stdout or ""


def run_pair(pair: SpeedPair, options: argparse.Namespace, folder: pathlib.Path) -> None:
    """Make, measure and start what is not measured yet."""
    stored = Results(options.output).pair(pair.name)
    cells_missing = [cell for cell in cells(pair.sweeps, options.tiny) if str(cell) not in stored["cells"]]
    if not cells_missing and stored["steps"] and stored["start-up"]:
        print("  measured already", flush=True)
        return
    where = ("--pair", pair.name, "--folder", str(folder))
    if not (folder / "prepared.json").exists():
        child(options, "--part", "prepare", *where)
    prepared = json.loads((folder / "prepared.json").read_text())
    results = Results(options.output)
    results.pair(pair.name).update(
        {"models": prepared["sources"], "parameters": prepared["parameters"], "failures": prepared["failures"]}
    )
    results.save()
    if cells_missing or not stored["steps"]:
        child(options, "--part", "measure", *where)
    results = Results(options.output)
    stored = results.pair(pair.name)
    for name, known in start_ups(pair, prepared).items():
        if name not in stored["start-up"]:
            try:
                printed = child(options, "--part", "start", "--contestant", name, *where, capture=True)
                row = stored["start-up"][name] = known | json.loads(printed.splitlines()[-1])
                print(
                    f"  started {name}: {row['load, s']:.1f} s, {row['peak memory, bytes'] / 1e6:.0f} MB", flush=True
                )
            except RuntimeError as error:
                stored["failures"][f"start of {name}"] = str(error)
            results.save()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=[*PAIRS, "none"], action="append", help="this pair only; repeatable")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the base, 7 by default")
    parser.add_argument("--sweep-rounds", type=int, default=2, help="rounds of the other conditions, 2 by default")
    parser.add_argument(
        "--cell-seconds",
        type=float,
        default=25,
        help=f"begin no round after so long, {BASE_FACTOR} times as long in the base; 25 s",
    )
    parser.add_argument(
        "--threads", type=int, help="threads of torch and of the runtimes; else as many as torch takes"
    )
    parser.add_argument("--models", type=pathlib.Path, help="folder of checkpoints to use where their names are there")
    parser.add_argument("--work-dir", type=pathlib.Path, help="keep models and exports here; else a temporary folder")
    parser.add_argument(
        "--trained", type=pathlib.Path, help="a trained checkpoint, which names an LLM on this machine"
    )
    parser.add_argument("--prompts", type=pathlib.Path, help="JSON lines (also .gz) with a `prompt`, for --trained")
    parser.add_argument("--num-prompts", type=int, default=12, help="how many of them, 12 by default")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--tiny", action="store_true", help="toy models, to try the script out")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/speed.json"))
    for name in ("--part", "--contestant", "--command"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.trained is None) != (options.prompts is None):
        parser.error("--trained and --prompts go together")
    if options.command is None:
        options.command = f"python benchmarks/speed.py --rounds {options.rounds} --sweep-rounds {options.sweep_rounds}"
        options.command += f" --cell-seconds {options.cell_seconds:g}" + (" --tiny" if options.tiny else "")
    return options


def run_part(options: argparse.Namespace) -> int:
    """What a child does."""
    pair = PAIRS.get(options.pair[0]) if options.pair else None
    if options.part == "prepare":
        options.folder.mkdir(parents=True, exist_ok=True)
        prepare(pair, options.folder, options.models, options.tiny)
    elif options.part == "measure":
        measure(pair, options)
    elif options.part == "start":
        print(json.dumps(start_up(options.contestant, pair, options.folder)))
    else:
        from speed_trained import measure_trained

        results = Results(options.output)
        measured = measure_trained(options.trained, options.prompts, options.num_prompts, options.sweep_rounds)
        results.content["trained"] = provenance(options.command, *LIBRARIES) | measured
        results.save()
    return 0


def main() -> int:
    options = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.part:
        return run_part(options)
    began = time.perf_counter()
    if options.fresh:
        options.output.unlink(missing_ok=True)
    chosen = [name for name in options.pair or PAIRS if name in PAIRS]
    broken = []
    for name in chosen:
        print(f"[{time.perf_counter() - began:5.0f} s] {name}", flush=True)
        try:
            with tempfile.TemporaryDirectory() as temporary:
                place = options.work_dir / name.replace(" ", "_").replace(">", "") if options.work_dir else temporary
                run_pair(PAIRS[name], options, pathlib.Path(place))
        except RuntimeError as error:  # of a child; the other pairs are measured all the same
            broken.append(f"{name}: {error}")
            print(f"  FAILED: {error}", flush=True)
    if options.trained is not None:
        print(f"[{time.perf_counter() - began:5.0f} s] trained", flush=True)
        try:
            where = ("--trained", str(options.trained), "--prompts", str(options.prompts))
            child(options, "--part", "trained", *where)
        except RuntimeError as error:
            broken.append(f"trained: {error}")
    results = Results(options.output)
    results.content["checks"] = checks(results.content, list(dict.fromkeys([*chosen, *results.content["pairs"]])))
    results.save()
    show(results.content)
    for text in broken:
        print(f"FAILED {text}")
    draw_all(results.content, options.output)
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0 if not broken and all(check["holds"] for check in results.content["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
