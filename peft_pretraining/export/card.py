"""Writes the README.md of an exported model: architecture, training, results, how to load it. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from peft_pretraining.methods import METHODS

_LOAD_DENSE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
_LOAD_FACTORED = """from peft_pretraining.export import load_factored

model, tokenizer = load_factored("{name}")"""
# Flags left out of the card's command: they only name folders and services. Values of --config appear as flags.
_PLACES = ("config", "save_dir", "continue_from", "resume", "dry_run", "device", "wandb", "tracker")


def model_card(record: dict[str, Any], folder: Path, name: str, *, factored: bool, dtype: str) -> str:
    """Returns the text of README.md. record: the checkpoint's run.json; folder: the checkpoint; name: the export's name."""
    args, plan = record["arguments"], record["plan"]
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))["train"]
    parameters, full_rank = plan["parameters"]["total"], plan["full_rank_parameters"]
    rows = [
        ("architecture", f"LLaMA, {plan['model']['name']}: {full_rank:,} parameters as a dense model"),
        ("trained as", f"{METHODS[args['peft_model']].description}: {parameters:,} parameters"),
        ("stored as", f"{'factors' if factored else 'dense weights'}, {dtype}"),
        ("data", _data(record)),
        ("trained on", f"{state['tokens_seen']:,} tokens in {state['update_step']:,} updates"),
        ("held-out perplexity", _perplexity(folder, state["update_step"])),
        ("context", f"{plan['model']['max_position_embeddings']:,} positions; trained with {args['max_length']:,}"),
        ("loads in", "transformers 4 (tested with 4.57) and 5" if not factored else "this project's load_factored"),
        ("made with", ", ".join(f"{key} {value}" for key, value in record["versions"].items())),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    load = (_LOAD_FACTORED if factored else _LOAD_DENSE).format(name=name)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {name}\n\n| | |\n|---|---|\n{table}\n\n"
        f"```python\n{load}\n```\n\n"
        "A base model: it continues text. Documents were tokenised without a token before them and end with the end token.\n\n"
        f"The training command without its folders:\n\n```bash\n{_command(args)}\n```\n"
    )


def _data(record: dict[str, Any]) -> str:
    source = record.get("dataset") or {}
    args = record["arguments"]
    return f"{args['dataset']} (fingerprint {source.get('fingerprint', 'not known')}), tokenizer beside this file"


def _perplexity(folder: Path, step: int) -> str:
    """The perplexity evaluated after this update, from the run's metrics.jsonl if that file exists."""
    try:
        # A checkpoint may be named by a link from elsewhere.
        content = (folder.resolve().parent / "metrics.jsonl").read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return "not known: the run's metrics.jsonl was not beside the checkpoint"
    text = None
    for line in content.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # The line is damaged, or the last one and incomplete.
            continue
        if not isinstance(row, dict):
            continue
        loss, tokens = row.get("final_eval_loss"), row.get("final_eval_tokens", 0)
        if row.get("update_step") == step and isinstance(loss, float) and math.isfinite(loss) and type(tokens) is int:
            text = f"{math.exp(min(loss, 700)):,.2f} over {tokens:,} tokens"
    return text or "not evaluated after this update"


def _command(args: dict[str, Any]) -> str:
    """The training command with all flags that differ from their defaults."""
    from peft_pretraining.config.arguments import ROWS
    from peft_pretraining.config.command_line import flags_for

    flags = flags_for({name: value for name, value in args.items() if name in ROWS}, _PLACES)
    return " \\\n    ".join(["torchrun --nproc_per_node N torchrun_main.py", *flags])
