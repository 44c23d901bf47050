"""Measures text generation: tokens/s and resident memory of a dense model and of factored models, one token at a time.

`python benchmarks/generate.py [--configs 1b] [--forms dense uniform block] [--prompt 16] [--new 64] [--rounds 3] [--threads 1]
[--dtype bfloat16] [--one_at_a_time] [--out FILE.json]`

Each form is written in the format of export, with a config's shapes and random values, and runs in a separate process with
transformers' generate (greedy, key-value cache). AutoModelForCausalLM loads the dense form, load_factored's steps the others. The
forms take turns in each round. "memory" is the resident memory after generating, minus that before the model was loaded. The
generated text is random.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from layer import SETTINGS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.distributed.device import set_allocator
from peft_pretraining.run.folder import versions

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("dense", "uniform", "block")


def write_model(config: str, form: str, dtype: str, folder: Path) -> int:
    """Writes a folder in export's format, without a tokenizer; returns the weights' bytes."""
    from peft_pretraining.export.shards import FACTORS_CONFIG, LLAMA_CONFIG, ShardWriter
    from peft_pretraining.export.write import parts_of
    from peft_pretraining.model.llama import hf_config, meta_model
    from sparse_lora import SLTrainConfig, SparseLowRankLinear, reparameterize

    rank, sparsity, _ = SETTINGS[config]
    cfg = load_model_config(ROOT / f"configs/llama_{config}.json")
    factors = SLTrainConfig(rank=rank, sparsity=sparsity, support="uniform" if form == "dense" else form)
    change = None if form == "dense" else lambda model: reparameterize(model, factors)
    model = meta_model(cfg, getattr(torch, dtype), change)
    writer = ShardWriter(folder, 2 * 10**9)
    for prefix, part in parts_of(model):
        part.to_empty(device="cpu")
        for name, module in part.named_modules():
            if isinstance(module, SparseLowRankLinear):
                module.reset_parameters(0, f"{prefix}.{name}")
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                if form == "dense" or not name.endswith(("lora_A", "sparse_value")):
                    parameter.fill_(1) if "norm" in f"{prefix}.{name}" else parameter.normal_(0, 0.02)
        for name, tensor in part.state_dict().items():
            writer.add(f"{prefix}.{name}", tensor)
        part.to("meta")
    writer.close()
    llama = hf_config(cfg)
    llama.dtype, llama.architectures = getattr(torch, dtype), ["LlamaForCausalLM"]
    llama.save_pretrained(folder)
    if form != "dense":
        from dataclasses import asdict

        (folder / "config.json").rename(folder / LLAMA_CONFIG)
        (folder / FACTORS_CONFIG).write_text(json.dumps(asdict(factors)), encoding="utf-8")
    return writer.num_bytes


def resident() -> int:
    """Returns this process's resident bytes, mapped files included."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def work(pipe: Connection, folder: Path, form: str, threads: int, prompt: int, new: int) -> None:
    """Main function of a process: loads the model, sends its memory, answers "generate" with seconds and bytes until "end"."""
    set_allocator()
    torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM

    from peft_pretraining.export.read import load_export
    from sparse_lora import prepare_for_inference

    torch.ones(8, 8) @ torch.ones(8, 8)
    before = resident()
    if form == "dense":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model, _ = load_export(folder)
        prepare_for_inference(model)
    gc.collect()
    pipe.send(resident() - before)
    ids = torch.arange(3, 3 + prompt)[None]
    while pipe.recv() != "end":
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                pad_token_id=0, use_cache=True,
            )  # fmt: skip
        assert output.shape[1] == prompt + new
        pipe.send((time.perf_counter() - start, resident() - before))


def measure(config: str, forms: Sequence[str], own: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all forms in turns; returns a row for each."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        workers = []
        for form in forms:
            folder = Path(scratch) / form
            folder.mkdir()
            size = write_model(config, form, own.dtype, folder)
            pipe, other = multiprocessing.get_context("spawn").Pipe()
            arguments = (other, folder, form, own.threads, own.prompt, own.new)
            process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
            process.start()
            workers.append((pipe, process))
            rows.append({"config": config, "form": form, "bytes": size, "loaded": pipe.recv(), "seconds": [], "memory": 0})
        for number in range(own.rounds + 1):
            for (pipe, _), row in zip(workers, rows, strict=True):
                pipe.send("generate")
                seconds, row["memory"] = pipe.recv()
                # The first round is a warm-up.
                if number:
                    row["seconds"].append(seconds)
        for pipe, process in workers:
            pipe.send("end")
            process.join()
    return rows


def print_rows(rows: list[dict[str, Any]], new: int) -> None:
    """Prints a line per form, relative to the first form."""
    for row in rows:
        ratios = [one / other for one, other in zip(rows[0]["seconds"], row["seconds"], strict=True)]
        print(
            f"{row['config']:<5} {row['form']:<8} {new / statistics.median(row['seconds']):6.2f} tokens/s, "
            f"{statistics.median(ratios):.2f} of {rows[0]['form']}'s [{min(ratios):.2f}, {max(ratios):.2f}]; on disk "
            f"{row['bytes'] / 2**30:.2f} GiB ({row['bytes'] / rows[0]['bytes']:.3f}), resident {row['memory'] / 2**30:.2f} GiB "
            f"({row['memory'] / rows[0]['memory']:.3f})",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--configs", nargs="+", choices=list(SETTINGS), default=["1b"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="the others are compared with the first")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens generated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default: %(default)s)")
    parser.add_argument(
        "--one_at_a_time",
        action="store_true",
        help="measure one form after the other instead of in turns, if memory is too small for two",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    own = parser.parse_args()
    set_allocator()
    figures: dict[str, Any] = {
        "command": ["benchmarks/generate.py", *sys.argv[1:]],
        "device": platform.processor() or platform.machine(),
        "threads": own.threads,
        "versions": versions(),
        "date": date.today().isoformat(),
        "rows": [],
    }
    for config in own.configs:
        groups = [[form] for form in own.forms] if own.one_at_a_time else [own.forms]
        rows = [row for forms in groups for row in measure(config, forms, own)]
        print_rows(rows, own.new)
        figures["rows"] += rows
    if own.out is not None:
        own.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
