"""Counts the project's files that an update, a forward pass and a micro-batch enter, and those that the entry program imports.

`python benchmarks/walk.py [--out FILE]` trains a tiny SLTrain model in this process (two seconds on a CPU) under sys.setprofile.

update        one iteration of torchrun_main.loop, from the loaded micro-batches to the logged row
forward       the forward pass of one low-rank plus sparse linear, as in training
micro_batch   the same iteration, preceded by reading, encoding and packing its sequences
window        the sequences of one file of 512 records (a window): opening, reading, encoding and packing
closure       non-empty files that torchrun_main.py imports, late imports included, and their lines

A file is entered if one of its functions is called. A change is a call to, or a return to, another file of the project.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OURS = ("torchrun_main.py", "peft_pretraining/", "sparse_lora/")
MODEL = {
    "architectures": ["LLaMAForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_sequence_length": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "vocab_size": 320,
}
# Each file has as many documents as a window has records.
NUM_FILES, NUM_DOCUMENTS = 3, 512
NUM_UPDATES = 6
# Counted from 0. By then optimizer states and supports exist, and memory has been logged.
WATCHED_UPDATE = 4


class Walk:
    """The files of this project that were entered while watching, and how often the file changed."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.changes = 0
        self._last: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the calls in the block, which must not use sys.setprofile itself."""
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def start(self) -> None:
        """Watches all calls until `stop`."""
        sys.setprofile(self._note)

    @staticmethod
    def stop() -> None:
        """Ends watching."""
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_back is not None:
            file = our_file(frame.f_back.f_code.co_filename)
        elif event == "call":
            file = our_file(frame.f_code.co_filename)
            if file is not None:
                self.files.add(file)
        else:
            return
        if file is not None and file != self._last:
            self.changes += self._last is not None
            self._last = file

    def figures(self) -> dict[str, Any]:
        """Returns the counts as JSON-serialisable values."""
        return {"files": len(self.files), "changes": self.changes, "entered": sorted(self.files)}


def our_file(filename: str) -> str | None:
    """Returns a file's path relative to the project, None for other files."""
    if not filename.startswith(f"{ROOT}/"):
        return None
    inside = filename[len(str(ROOT)) + 1 :]
    return inside if inside.startswith(OURS) else None


def write_inputs(folder: Path) -> list[str]:
    """Writes a model's JSON, a corpus and a tokenizer; returns the flags of a run with them."""
    import sentencepiece

    numbers = range(NUM_FILES * NUM_DOCUMENTS)
    texts = [f"Fox {n} jumps over dog {n * 7 % 101} in month {n % 12}. " * (1 + n % 5) for n in numbers]
    corpus = folder / "corpus"
    corpus.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    for number in range(NUM_FILES):
        (corpus / f"words-train.{number}.jsonl").write_text("".join(lines[number::NUM_FILES]))
    (corpus / "words-validation.jsonl").write_text("".join(lines[:8]))
    (folder / "tiny.json").write_text(json.dumps(MODEL))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:200]),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return [
        *("--model_config", str(folder / "tiny.json"), "--tokenizer", str(folder / "tiny.model"), "--dataset", str(corpus)),
        *("--peft_model", "sltrain", "--rank", "8", "--sp_ratio", "0.1", "--dtype", "float32", "--optimizer", "adamw"),
        *("--lr", "0.001", "--warmup_steps", "2", "--num_training_steps", str(NUM_UPDATES), "--batch_size", "8"),
        *(
            "--max_length",
            "64",
            "--packing",
            "--data_lanes",
            "1",
            "--data_order",
            "lanes",
            "--eval_every",
            "1000",
            "--save_every",
            "1000",
        ),
        *("--wandb", "disabled", "--device", "cpu", "--workers", "0", "--log_every", "1"),
    ]


def watch_training(folder: Path) -> dict[str, Walk]:
    """Trains a tiny run in this process; returns the walks "update" and "micro_batch" of one of its updates."""
    import torchrun_main
    from peft_pretraining.run import assemble

    flags = write_inputs(folder)
    update, reading = Walk(), Walk()
    number = 0
    original = assemble.next_micro_batches

    def watched(run: Any, world: Any) -> Any:
        """Watches from the loading of one update's micro-batches to that of the next update's."""
        nonlocal number
        Walk.stop()
        number += 1
        if number != WATCHED_UPDATE + 1:
            return original(run, world)
        with reading.watching():
            micro_batches = original(run, world)
        update.start()
        return micro_batches

    assemble.next_micro_batches = watched
    try:
        assert torchrun_main.main([*flags, "--save_dir", str(folder / "run")]) == 0
    finally:
        Walk.stop()
        assemble.next_micro_batches = original
    # The watched micro-batch may come from a window that was read earlier, so the reading of a window is added.
    reading.files |= watch_window(folder).files
    both = Walk()
    both.files, both.changes = update.files | reading.files, update.changes + reading.changes
    return {"update": update, "micro_batch": both}


def watch_window(folder: Path) -> Walk:
    """Watches a lane from near the end of one file to near the end of the next."""
    from peft_pretraining.data.lanes import LaneState, Order, lane_sequences
    from peft_pretraining.data.source import open_source
    from peft_pretraining.data.tokenizer import load_tokenizer

    source, tokenizer = open_source(str(folder / "corpus"), "train"), load_tokenizer(str(folder / "tiny.model"))
    sequences, near_end = lane_sequences(source, tokenizer, Order(1, 0, 64, True), 0, LaneState()), NUM_DOCUMENTS - 8
    while next(sequences).state < LaneState(0, 0, 0, near_end):
        pass
    walk = Walk()
    with walk.watching():
        while next(sequences).state < LaneState(0, 1, 0, near_end):
            pass
    return walk


def watch_forward() -> Walk:
    """Watches one call of a linear, as in training."""
    import torch

    from sparse_lora import SparseLowRankLinear

    layer = SparseLowRankLinear(64, 96, 8, 0.1, seed=0)
    x = torch.ones(4, 16, 64, requires_grad=True)
    layer(x).sum().backward()
    walk = Walk()
    with walk.watching():
        layer(x)
    return walk


def import_closure(root: Path = ROOT) -> dict[str, int]:
    """Returns the lines of each file that torchrun_main.py imports, directly or indirectly, late imports included."""
    lines: dict[str, int] = {}
    todo = [root / "torchrun_main.py"]
    while todo:
        path = todo.pop()
        name = str(path.relative_to(root))
        if name in lines:
            continue
        text = path.read_text(encoding="utf-8")
        lines[name] = len(text.splitlines())
        todo += [target for module in imported_modules(path, text, root) for target in module_files(module, root)]
    return {name: count for name, count in sorted(lines.items()) if count}


def imported_modules(path: Path, text: str, root: Path) -> Iterator[str]:
    """Yields the names that a file imports: modules, and names in modules, which may be modules themselves."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(root).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_files(module: str, root: Path) -> list[Path]:
    """Returns the file of a module of the project and the __init__.py of its packages; [] for other modules."""
    parts = module.split(".")
    around = [root.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
    return [path for path in [*around, root.joinpath(*parts).with_suffix(".py")] if path.is_file()]


def lines_by_folder(root: Path = ROOT) -> dict[str, int]:
    """Returns the lines of all Python files of each folder, imported by the entry program or not."""
    folders: dict[str, int] = {"torchrun_main": len((root / "torchrun_main.py").read_text().splitlines())}
    for package in ("sparse_lora", "peft_pretraining"):
        for path in sorted((root / package).rglob("*.py")):
            inside = path.relative_to(root).parts
            folder = inside[0] if package == "sparse_lora" or len(inside) == 2 else inside[1]
            folders[folder] = folders.get(folder, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return dict(sorted(folders.items()))


def measure() -> dict[str, Any]:
    """Returns all figures."""
    with tempfile.TemporaryDirectory() as folder:
        walks = watch_training(Path(folder))
        walks["window"] = watch_window(Path(folder))
    walks["forward"] = watch_forward()
    closure = import_closure()
    return {
        **{name: walks[name].figures() for name in ("update", "forward", "micro_batch", "window")},
        "closure": {"files": len(closure), "lines": sum(closure.values()), "imported": closure},
        "lines_by_folder": lines_by_folder(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this file, as JSON")
    args = parser.parse_args()
    figures = measure()
    for name in ("update", "forward", "micro_batch", "window"):
        print(f"{name:12} {figures[name]['files']:3} files, {figures[name]['changes']:5} changes of file")
    print(f"closure      {figures['closure']['files']:3} files, {figures['closure']['lines']:,} lines")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
