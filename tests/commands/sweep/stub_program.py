"""Replaces torchrun_main.py: writes a run's record within milliseconds, or fails or waits if its flags say so.

--weight_decay 1: fails with exit code 1. --weight_decay 2: makes half its updates, saves, and waits for a signal.
--weight_decay 3: makes half its updates, saves and is killed. --weight_decay 4: its losses and perplexity are not finite.
--weight_decay 5: waits until two runs have begun, and fails if it is the only one for long.
A resumed run makes the remaining updates. Every start adds a line to starts.txt beside its folder.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from peft_pretraining.config.arguments import as_dict
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import make_plan


def row(step: int, loss: float | None = 5.0) -> dict:
    return {"update_step": step, "loss": loss, "tokens_seen": 10 * step, "throughput_tokens": 5.0, "max_memory": 2**20}


def two_have_begun(starts: Path) -> bool:
    for _ in range(1200):
        if len(starts.read_text().split()) >= 2:
            return True
        time.sleep(0.05)
    return False


def main() -> int:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    args = parse_args(sys.argv[1:])
    plan = make_plan(args, World())
    folder = Path(args.save_dir)
    with (folder.parent / "starts.txt").open("a") as file:
        file.write(f"{folder.name}\n")
    if args.weight_decay == 1:
        print("stub: error: asked to fail", file=sys.stderr)
        return 1
    if args.weight_decay == 5 and not two_have_begun(folder.parent / "starts.txt"):
        print("stub: error: no other run began", file=sys.stderr)
        return 1
    resumed = any(folder.glob("step_*"))
    folder.mkdir(parents=True, exist_ok=True)
    document = {"arguments": as_dict(args), "plan": {**asdict(plan), "save_dir": str(folder)}}
    (folder / "run.json").write_text(json.dumps(document))
    half = args.num_training_steps // 2
    if args.weight_decay in (2, 3) and not resumed:
        (folder / f"step_{half:08d}").mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, half + 1)))
        if args.weight_decay == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(0.05)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(half + 1 if resumed else 1, args.num_training_steps + 1):
            file.write(json.dumps(row(step, None if args.weight_decay == 4 else 5.0)) + "\n")
        perplexity = None if args.weight_decay == 4 else 20.0 + args.lr
        last = {"update_step": args.num_training_steps, "final_eval_loss": 3.0, "final_eval_perplexity": perplexity}
        file.write(json.dumps({**last, "final_eval_tokens": 100}) + "\n")
    (folder / f"step_{args.num_training_steps:08d}").mkdir(exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
