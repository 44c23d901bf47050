"""Computes the perplexity of a bigram model with backoff, as a baseline, on the targets that the trainer's evaluation counts.

`python benchmarks/bigram.py --dataset demo --packing`, or, to compare with a run on its data, tokenizer and layout,
`python benchmarks/bigram.py --run runs/quickstart` (exit code 1 if the run's perplexity is not below the bigram's).

Interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999, eq. 24) with the discount n1 / (n1 + 2 n2), backing
off to the continuation unigram and from there to the uniform distribution over the vocabulary. Fitted on the training split only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_pretraining.commands.report import load_run
from peft_pretraining.data.loader import EvalSet
from peft_pretraining.data.source import Source, open_source
from peft_pretraining.data.tokenizer import load_tokenizer


def token_pairs(sequences: EvalSet) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids (previous, target) of every counted target, both (targets,) int64."""
    previous, targets = [], []
    for batch in sequences:
        labels = batch.labels[:, 1:]
        valid = labels != -100
        previous.append(batch.input_ids[:, :-1][valid].numpy())
        targets.append(labels[valid].numpy())
    return np.concatenate(previous), np.concatenate(targets)


class KneserNeyBigram:
    """An interpolated Kneser-Ney bigram model over token ids 0 .. vocab_size - 1."""

    def __init__(self, previous: np.ndarray, targets: np.ndarray, vocab_size: int):
        """Counts the training pairs; both arrays are (n,)."""
        self.vocab_size = vocab_size
        self.pairs, self.counts = np.unique(previous * vocab_size + targets, return_counts=True)
        once, twice = (int((self.counts == n).sum()) for n in (1, 2))
        self.discount = once / (once + 2 * twice)
        heads, tails = np.divmod(self.pairs, vocab_size)
        self.context_total = np.bincount(heads, weights=self.counts, minlength=vocab_size)
        self.context_types = np.bincount(heads, minlength=vocab_size)
        continuations = np.bincount(tails, minlength=vocab_size).astype(np.float64)
        seen = (continuations > 0).sum()
        total = continuations.sum()
        # The probability mass discounted from seen tokens is distributed evenly over the whole vocabulary.
        self.unigram = np.maximum(continuations - self.discount, 0) / total
        self.unigram += self.discount * seen / total / vocab_size

    def probabilities(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Returns p(target | previous), (n,) float64."""
        keys = previous * self.vocab_size + targets
        positions = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        counts = np.where(self.pairs[positions] == keys, self.counts[positions], 0)
        total = self.context_total[previous]
        known = np.maximum(total, 1)
        backoff = np.where(total > 0, self.discount * self.context_types[previous] / known, 1.0)
        return np.maximum(counts - self.discount, 0) / known + backoff * self.unigram[targets]


def score(dataset: str, eval_dataset: str | None, tokenizer_name: str | None, max_length: int, packing: bool) -> dict:
    """Fits on the training split and scores the held-out split."""
    train = open_source(dataset, "train")
    held_out = open_source(eval_dataset or dataset, "validation", hold_out=eval_dataset is None)
    tokenizer = load_tokenizer(tokenizer_name or train.default_tokenizer)

    def pairs(source: Source) -> tuple[np.ndarray, np.ndarray]:
        return token_pairs(EvalSet(source, tokenizer, max_length=max_length, packing=packing, max_tokens=None, batch_size=64))

    previous, targets = pairs(train)
    model = KneserNeyBigram(previous, targets, tokenizer.text_vocab_size)
    held_previous, held_targets = pairs(held_out)
    loss = float(-np.log(model.probabilities(held_previous, held_targets)).mean())
    return {
        "train_targets": len(targets),
        "held_out_targets": len(held_targets),
        "discount": model.discount,
        "loss": loss,
        "perplexity": math.exp(loss),
    }


def main() -> int:
    """Fits, scores and prints; returns exit code 1 if the perplexity of --run is not below the bigram's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="demo", help="as for torchrun_main.py (default: demo)")
    parser.add_argument("--tokenizer", help="as for torchrun_main.py (default: the data set's)")
    parser.add_argument("--max_length", type=int, default=256, help="sequence length, tokens (default: 256)")
    parser.add_argument("--packing", action="store_true", help="packed sequences instead of padded ones")
    parser.add_argument("--run", type=Path, help="a run's folder: compare with it, on its data, tokenizer and layout")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    layout = (args.dataset, None, args.tokenizer, args.max_length, args.packing)
    if args.run is not None:
        document, rows = load_run(args.run)
        names = ("dataset", "eval_dataset", "tokenizer", "max_length", "packing")
        layout = tuple(document["arguments"][name] for name in names)
    figures = score(*layout)
    if args.run is not None:
        evaluations = [row for row in rows if row.get("final_eval_perplexity") is not None]
        if not evaluations:
            print(f"--run {args.run}: has no evaluation with a finite perplexity to compare with", file=sys.stderr)
            return 1
        last = evaluations[-1]
        if last["final_eval_tokens"] != figures["held_out_targets"]:
            print(
                f"--run {args.run}: was evaluated on {last['final_eval_tokens']} targets, the bigram on "
                f"{figures['held_out_targets']}; run it without a limit on --eval_tokens",
                file=sys.stderr,
            )
            return 1
        figures |= {"run_perplexity": last["final_eval_perplexity"]}
        figures |= {"run_to_bigram": last["final_eval_perplexity"] / figures["perplexity"]}
    print(json.dumps(figures) if args.json else "\n".join(f"{name:<18}{value:,.4f}" for name, value in figures.items()))
    return int(figures.get("run_to_bigram", 0.0) >= 1)


if __name__ == "__main__":
    sys.exit(main())
