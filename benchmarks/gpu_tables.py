"""Prints the tables of the docs from the JSON files of benchmarks/on_gpu.py, so that no figure is typed by hand.

`python benchmarks/gpu_tables.py DIR` writes Markdown: card, versions, date and command, a table for each section that DIR holds,
and what was predicted before any measurement beside what was measured. A value that DIR does not hold is "not measured".
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpu.record import read_json

SECTIONS = ("env", "gate", "ceilings", "layers", "updates", "memory", "learn")
Row = dict[str, Any]


class Results:
    """The sections' files in a folder."""

    def __init__(self, folder: Path):
        """Reads the files that exist."""
        self.contents = {name: content for name in SECTIONS if (content := read_json(folder / f"{name}.json"))}

    def rows(self, section: str, *keys: str) -> Iterator[Row]:
        """Yields a section's rows that hold all `keys`. A step that failed or was killed leaves what it had measured before."""
        for row in self.contents.get(section, {}).get("rows", []):
            if all(key in row for key in keys):
                yield row

    def update(self, name: str, *keys: str) -> Row | None:
        """Returns the row of `updates` with this name; None if it does not hold all `keys`."""
        return next((row for row in self.rows("updates", *keys) if row["name"] == name), None)


# --- What was predicted ---
#
# By a model of an H100 (800 TFLOP/s in bfloat16, 3 TB/s, 2.5 us for a small kernel), 2026-11-28, before anything ran on a GPU.


class Prediction(NamedTuple):
    """A figure, what was predicted for it, and the function that returns what was measured, or None."""

    figure: str
    predicted: str
    measured: Callable[[Results], str | None]


def launches(variant: str, direction: str) -> Callable[[Results], str | None]:
    """Returns a function that gives the smallest and largest number of launches over all shapes."""

    def measured(results: Results) -> str | None:
        numbers = [row["launches"][variant][direction] for row in results.rows("layers", "launches")]
        if not numbers:
            return None
        return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"

    return measured


def kernels(case: str) -> Callable[[Results], str | None]:
    """Returns a function that gives the number of kernels of an update."""
    return lambda results: None if (row := results.update(case, "kernels")) is None else f"{row['kernels']:,}"


def speed(case: str) -> Callable[[Results], str | None]:
    """Returns a function that gives a case's tokens/s relative to full-rank's; "METHOD" in the case stands for the method."""

    def measured(results: Results) -> str | None:
        method, _, pattern = case.partition(": ")
        own, full = (results.update(pattern.replace("METHOD", name), "tokens_per_second") for name in (method, "full"))
        return None if own is None or full is None else f"{own['tokens_per_second'] / full['tokens_per_second']:.2f}"

    return measured


def waits(case: str) -> Callable[[Results], str | None]:
    """Returns a function that gives the number of times that the host waits in an update."""
    return lambda results: (
        None if (row := results.update(case, "tensors")) is None else f"{row['waits']} ({row['tensors']} tensors)"
    )


def longer(case: str, than: str) -> Callable[[Results], str | None]:
    """Returns a function that gives the difference of two cases' seconds per update."""

    def measured(results: Results) -> str | None:
        own, other = (results.update(name, "tokens_per_second") for name in (case, than))
        if own is None or other is None:
            return None
        return f"{statistics.median(own['seconds']) - statistics.median(other['seconds']):.3f} s"

    return measured


def loss_share(results: Results) -> str | None:
    """Returns the milliseconds of the loss and of a compiled update at 350m."""
    update = results.update("350m 16384 tokens full adamw compile", "tokens_per_second")
    loss = results.update("350m loss", "rows")
    if update is None or loss is None:
        return None
    return f"{1e3 * loss['seconds']:.1f} of {1e3 * statistics.median(update['seconds']):.1f} ms"


def context(results: Results) -> str | None:
    """Returns the context's size."""
    return next((f"{row['context'] / 1e9:.2f} GB" for row in results.rows("env", "context")), None)


def width_effect(results: Results) -> str | None:
    """Returns the time per output of products with 5461 outputs, relative to 5504."""
    seconds = {row["name"].split(",")[0]: row["seconds_replayed"] for row in results.rows("ceilings", "seconds_replayed")}
    ratios = []
    for product in ("y", "dx", "dW"):
        odd, even = (seconds.get(f"{product} of {wide} x 2048") for wide in (5461, 5504))
        if odd is None or even is None:
            return None
        ratios.append(f"{product} {odd / 5461 / (even / 5504):.2f}")
    return ", ".join(ratios)


def account_ratio(results: Results) -> str | None:
    """Returns the memory that the account predicts for the 7B settings, relative to what was allocated."""
    ratios = [f"{row['predicted_to_measured']:.3f}" for row in results.rows("memory", "predicted_to_measured")]
    return ", ".join(ratios) or None


UNIFORM = "350m 16384 tokens uniform"
PREDICTIONS = (
    Prediction("launches of nn.Linear, forward", "1", launches("dense", "forward")),
    Prediction("launches of nn.Linear, backward", "2", launches("dense", "backward")),
    Prediction("launches of a uniform linear, forward", "17 to 21", launches("uniform materialised", "forward")),
    Prediction("launches of a uniform linear, backward", "22 to 26", launches("uniform materialised", "backward")),
    Prediction("kernels of an update, 60m, 16k tokens, uniform", "3,100", kernels("60m 16384 tokens uniform adamw eager")),
    Prediction("kernels of an update, 60m, 16k tokens, full-rank", "1,400", kernels("60m 16384 tokens full adamw eager")),
    *(
        Prediction(f"tokens/s of uniform, {name}, relative to full-rank", ".97 and more with W kept", speed(f"uniform: {case}"))
        for name, case in (
            ("60m", "60m 65536 tokens METHOD adamw eager"),
            ("350m", "350m 16384 tokens METHOD adamw eager"),
            ("1b", "1b 16384 tokens METHOD adamw eager"),
        )
    ),
    *(
        Prediction(
            f"tokens/s of block, {size}, relative to full-rank", predicted, speed(f"block: {size} 16384 tokens METHOD {rest}")
        )
        for size, rest, predicted in (
            ("350m", "adamw eager", "below 1; 1.14 with new blocks"),
            ("1b", "adamw eager", "below 1; 1.56 with new blocks"),
            ("350m", "adamw compile", "above 1.15 with new blocks and a fused loss"),
        )
    ),
    Prediction("waits of an update, adam8bit", "1 + one per tensor", waits(f"{UNIFORM} adam8bit eager")),
    Prediction("waits of an update, adam8bit_per_layer", "two per tensor", waits(f"{UNIFORM} adam8bit_per_layer eager")),
    Prediction(
        "4-bit moments, 350m: an update longer by", ".2 to .3 s", longer(f"{UNIFORM} adamw4bit eager", f"{UNIFORM} adamw eager")
    ),
    Prediction(
        "stochastic rounding, 350m: an update longer by",
        ".2 to .3 s",
        longer(f"{UNIFORM} adamw eager --stochastic_rounding", f"{UNIFORM} adamw eager"),
    ),
    Prediction("the loss at 350m, compiled", "12 of 70 ms", loss_share),
    Prediction("context", "0.50 GB", context),
    Prediction("time per output, 5461 relative to 5504", "above 1", width_effect),
    Prediction("7B: peak predicted / allocated, 8-bit and 4-bit", "1", account_ratio),
)


# --- Tables ---


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Returns the lines of a Markdown table; none without rows."""
    names, lines = list(columns), ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *lines, ""] if lines else []


def header(results: Results) -> list[str]:
    """Returns the lines that say what was measured where, when and how, for each section."""
    lines = []
    if any(content.get("tiny") for content in results.contents.values()):
        lines += ["**Made with `--tiny`: a test of the program. The figures mean nothing.**", ""]
    rows = []
    for name, content in results.contents.items():
        versions = content.get("versions", {})
        shown = ", ".join(
            f"{key} {versions[key]}" for key in ("torch", "transformers", "triton", "bitsandbytes") if key in versions
        )
        command = f"`{' '.join(content.get('command', []))}`"
        rows.append((name, content.get("state"), content.get("device"), shown, content.get("date"), command))
    return [*lines, *table(("section", "state", "device", "versions", "date", "command"), rows)]


def predictions(results: Results) -> list[str]:
    """Returns the table of predictions."""
    rows = ((p.figure, p.predicted, p.measured(results) or "not measured") for p in PREDICTIONS)
    return ["## Predicted and measured", "", *table(("figure", "predicted", "measured"), rows)]


def gate(results: Results) -> list[str]:
    """Returns the largest errors, and the tests' outcome."""
    errors = [(row["name"], row["errors"]) for row in results.rows("gate", "errors")]
    worst = [(name, f"{max(each.values()):.1e}", max(each, key=lambda key: each[key])) for name, each in errors]
    lines = table(("linear", "largest error relative to float64", "of"), worst)
    for row in results.rows("gate", "failures"):
        numbers = ", ".join(f"{row[f'num_{kind}']} {kind}" for kind in ("passed", "failed", "skipped"))
        lines += [f"Tests marked `gpu`: {numbers}{', ' + row['error'] if 'error' in row else ''}.", ""]
        lines += [f"- failed: `{failure['test']}`" for failure in row["failures"]] + ([""] if row["failures"] else [])
    return lines


def ceilings(results: Results) -> list[str]:
    """Returns the limits of the card."""
    rows = []
    for row in results.rows("ceilings", "seconds_replayed"):
        rates = [f"{row[key] / 1e12:.2f}" if key in row else "" for key in ("bytes_per_second", "flops_per_second")]
        rows.append((row["name"], f"{1e6 * row['seconds']:.1f}", f"{1e6 * row['seconds_replayed']:.1f}", *rates))
    return table(("step", "us, called", "us, replayed", "TB/s", "TFLOP/s"), rows)


def layers(results: Results) -> list[str]:
    """Returns the linears' times relative to nn.Linear."""
    rows = []
    for row in results.rows("layers", "launches", "weights"):
        for kind in ("uniform", "block", "none"):
            own = row[kind]
            launched = row["launches"][f"{kind} {own['chosen']}"]
            best = min(own["paths"], key=lambda path: own["paths"][path]["median"])
            replayed = row.get("replayed_seconds", {})
            pair = (replayed.get(f"{kind} {own['chosen']}"), replayed.get("dense"))
            graph = f"{pair[0] / pair[1]:.2f}" if all(isinstance(seconds, float) for seconds in pair) else "-"
            figures = (f"{own['ratio']:.2f}", graph, f"{own['floor']:.2f}", own["chosen"], best)
            parts = row["weights"][kind]
            decode = f"{1e6 * parts['decode_seconds']:.0f}" if "decode_seconds" in parts else "-"
            rows.append((row["name"], kind, *figures, f"{launched['forward']} + {launched['backward']}", decode))
            for kept, spread in own.get("cached", {}).items():
                launched, graph = row["launches"][f"{kind} {kept}"], replayed.get(f"{kind} {kept}")
                relative = f"{graph / pair[1]:.2f}" if isinstance(graph, float) and isinstance(pair[1], float) else "-"
                figures = (f"{spread['median']:.2f}", relative, f"{own['floor']:.2f}", "materialised", "-")
                number = f"{launched['forward']} + {launched['backward']}"
                rows.append((row["name"], f"{kind}, {kept} cached", *figures, number, "-"))
    columns = ("weight", "support", "of nn.Linear", "replayed", "floor", "chosen", "faster", "launches", "decode, us")
    return table(columns, rows)


def updates(results: Results) -> list[str]:
    """Returns the updates' speed, kernels and memory."""
    rows = []
    for row in results.rows("updates", "tokens_per_second"):
        seconds = statistics.median(row["seconds"])
        peaks = [f"{row[key] / 2**30:.2f}" if key in row else "-" for key in ("peak_predicted", "allocated", "reserved")]
        busy = (f"{1e3 * row['busy_seconds']:.1f}", f"{row['kernels']:,}", row["waits"]) if "kernels" in row else ("-", "-", "-")
        times = (f"{row['tokens_per_second']:,.0f}", f"{1e3 * seconds:.1f}", f"{1e3 * row['step_seconds']:.1f}")
        rows.append((row["name"], *times, *busy, *peaks))
    columns = ("update", "tokens/s", "ms", "step, ms", "busy, ms", "kernels", "waits", "GiB predicted", "allocated", "reserved")
    return table(columns, rows)


def memory(results: Results) -> list[str]:
    """Returns the 7B settings' memory, GiB."""
    rows = []
    for row in results.rows("memory", "predicted_to_measured"):
        measured = row["measured"]
        cells = [
            f"{measured[key] / 2**30:.2f}" if key in measured else "-" for key in ("allocated", "reserved", "card", "nvidia_smi")
        ]
        rows.append((row["name"], f"{row['peak_predicted'] / 2**30:.2f}", *cells))
    return table(("setting", "GiB predicted", "allocated", "reserved", "in use on the card", "nvidia-smi"), rows)


def learn(results: Results) -> list[str]:
    """Returns the course of the training run."""
    lines = []
    for row in results.rows("learn", "updates"):
        if row["updates"]:
            first, last = row["updates"][0], row["updates"][-1]
            lines += [
                f"{row['name']}: loss {first['loss']:.3f} at update {first['update_step']:,}, {last['loss']:.3f} at update "
                f"{last['update_step']:,} ({last['tokens_seen']:,} tokens).",
                "",
            ]
        rows = ((e["update_step"], f"{e['final_eval_perplexity']:.2f}") for e in row.get("evaluations", []))
        lines += table(("update", "held-out perplexity"), rows)
    return lines


def missing(results: Results) -> list[str]:
    """Returns what was not measured, and why."""
    lines = []
    for name, content in results.contents.items():
        for row in content.get("rows", []):
            if reason := row.get("skipped") or row.get("error"):
                lines.append(f"- {name}, {row['name']}: {reason}")
        if (running := content.get("running")) is not None:
            lines.append(f"- {name}, {running}: not finished ({content.get('state')})")
    return ["## Not measured", "", *lines, ""] if lines else []


def document(results: Results) -> str:
    """Returns all tables as Markdown."""
    parts = {
        "Correctness": gate,
        "Limits of the card": ceilings,
        "Linears": layers,
        "Updates": updates,
        "7B": memory,
        "Learning": learn,
    }
    lines = [*header(results), *predictions(results)]
    for title, part in parts.items():
        if body := part(results):
            lines += [f"## {title}", "", *body]
    return "\n".join([*lines, *missing(results)])


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns exit code 2 if the folder holds no results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of benchmarks/on_gpu.py")
    folder: Path = parser.parse_args(argv).folder
    results = Results(folder)
    if not results.contents:
        names = ", ".join(f"{name}.json" for name in SECTIONS)
        print(f"gpu_tables.py: {folder} holds no results: none of {names} can be read; run benchmarks/on_gpu.py", file=sys.stderr)
        return 2
    print(document(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
