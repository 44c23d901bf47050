"""Measures what only a GPU can tell, in a few minutes: correctness, limits of the card, layers, updates, memory, learning.

`python benchmarks/on_gpu.py --out DIR --minutes 9 [--sections env gate ceilings layers updates memory learn]`

Each section is a process of its own with a deadline and writes DIR/SECTION.json after every step, so that a hang or an illegal
access costs one section. Together they take at most --minutes: each gets its share of what is left. Missing packages are named in
the JSON and their steps skipped. If a result is further than 1e-2 from float64, the sections after `gate` are not run.
`benchmarks/gpu_tables.py DIR` prints the tables. Exit code: 0; 1 if a section failed; 2 for invalid arguments.

`--device cpu --tiny` executes the same code with the smallest sizes on a CPU, for tests; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.record import WRONG_NUMBERS, Options, Record, WrongNumbers, read_json, write_json

from peft_pretraining.distributed.device import set_allocator

# Seconds for each section when there is time for all; its share of the time otherwise.
SECONDS = {"env": 60, "gate": 150, "ceilings": 60, "layers": 150, "updates": 420, "memory": 120, "learn": 120}
MODULES = {name: f"gpu.{name}" for name in SECONDS} | {"memory": "gpu.memory_7b"}
# A section stops by itself this share of its time before it is killed.
_MARGIN = 0.06


def main(argv: list[str] | None = None) -> int:
    """Runs the sections, or with --section one of them in this process; returns the exit code."""
    args = arguments(argv)
    if args.section is not None:
        return run_section(args.section, args)
    if problem := problem_of(args):
        print(f"on_gpu.py: {problem}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    return run_all(args, sys.argv[1:] if argv is None else argv)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the sections' JSON files, at most seven"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all sections together (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=list(SECONDS), default=list(SECONDS), help="default: all, in this order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --tiny (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to test the program")
    parser.add_argument("--dataset", default="demo", help="text of the section learn, as for the trainer (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer of the section learn, as for the trainer (default: the data set's)")
    # Of the processes that this program starts.
    parser.add_argument("--section", choices=list(SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def problem_of(args: argparse.Namespace) -> str | None:
    """Returns why the arguments cannot work, and what to type instead; None if they can."""
    if not 0 < args.minutes < float("inf"):
        return f"--minutes {args.minutes:g}: must be above 0"
    if args.device == "cpu" and not args.tiny:
        return "--device cpu: the sizes are a GPU's and would take hours; add --tiny to test the program"
    for folder in (args.out, *args.out.absolute().parents):
        if folder.exists():
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                return f"--out {args.out}: {folder} is not a folder that can be written; name another one"
            break
    if args.device == "cuda":
        try:
            import torch
        except ImportError as error:
            return f"torch cannot be imported ({error}): pip install -r requirements.txt -c constraints.txt"
        if not torch.cuda.is_available():
            return f"--device cuda: torch {torch.__version__} finds no GPU; to test the program without one: --device cpu --tiny"
    return None


def run_all(args: argparse.Namespace, words: list[str]) -> int:
    """Runs the sections one after the other; returns 1 if one failed. words: the command line."""
    end, failed = time.monotonic() + 60 * args.minutes, False
    sections = [name for name in SECONDS if name in args.sections]
    for number, name in enumerate(sections):
        seconds = share(name, sections[number:], end - time.monotonic())
        print(f"== {name}: at most {seconds:.0f} s", flush=True)
        state = finish(args.out / f"{name}.json", name, words, *run_process(name, args, seconds))
        failed |= state != "done"
        if state != "done":
            print(f"== {name}: {state}", file=sys.stderr, flush=True)
        if state == "wrong numbers" and sections[number + 1 :]:
            print(f"== not run, because the numbers are wrong: {', '.join(sections[number + 1 :])}", file=sys.stderr)
            break
    print(f"== {60 * args.minutes - (end - time.monotonic()):.0f} s; tables: python benchmarks/gpu_tables.py {args.out}")
    return int(failed)


def share(name: str, remaining: list[str], seconds_left: float) -> float:
    """Returns a section's seconds: what is left, divided in the proportion of SECONDS over the remaining sections."""
    return max(1.0, seconds_left * SECONDS[name] / sum(SECONDS[other] for other in remaining))


def command(name: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """Returns the command line of a section's process."""
    words = [sys.executable, __file__, "--out", str(args.out), "--section", name, "--seconds", f"{seconds:.1f}"]
    words += ["--device", args.device, "--dataset", args.dataset, *(["--tiny"] if args.tiny else [])]
    return [*words, *(["--tokenizer", args.tokenizer] if args.tokenizer else [])]


def run_process(name: str, args: argparse.Namespace, seconds: float) -> tuple[int | None, str]:
    """Runs a section; returns its exit code, None if it was killed at its deadline, and the end of its output."""
    # A file and not a pipe, which a process that a section leaves behind would keep open.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command(name, args, seconds * (1 - _MARGIN)), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    print("\n".join(line for line in text.splitlines() if line.startswith(f"{name}: ")), flush=True)
    return code, text[-4000:]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a section's process with all that it started. One that hangs in the driver is left behind after a while."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def finish(path: Path, name: str, words: list[str], code: int | None, output: str) -> str:
    """Adds to a section's file the command and how its process ended, with its last output if it failed; returns the state."""
    content = read_json(path) or {"section": name, "rows": []}
    content["command"] = ["benchmarks/on_gpu.py", *words]
    if code is None:
        content["state"] = "killed at its deadline"
    elif code == WRONG_NUMBERS:
        content["state"] = "wrong numbers"
    elif code:
        content["state"] = f"ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    if code != 0 or any("error" in row for row in content["rows"]):
        content["output"] = output
    write_json(path, content)
    path.with_name(path.name + ".part").unlink(missing_ok=True)
    state: str = content.get("state", "wrote nothing")
    return state


def run_section(name: str, args: argparse.Namespace) -> int:
    """Runs a section in this process; returns its exit code."""
    # Without tqdm's and the tokenizer's lines, and with the package's own folder for compiled code.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # As the trainer does, before torch is imported.
    set_allocator()
    options = Options.of(args)
    record = Record(args.out / f"{name}.json", name, args.seconds, facts(args))
    try:
        importlib.import_module(MODULES[name]).run(record, options)
    except WrongNumbers as error:
        print(f"{name}: {error}", file=sys.stderr)
        record.end("wrong numbers")
        return WRONG_NUMBERS
    except ModuleNotFoundError as error:
        record.end(f"not run: {error.name} is not installed")
        return 0
    record.end("done")
    return 0


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what every section's file says about its run."""
    import torch

    from peft_pretraining.run.folder import versions

    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return {"tiny": args.tiny, "device": name, "allocator": allocator, "versions": {**versions(), "torch": torch.__version__}}


if __name__ == "__main__":
    sys.exit(main())
