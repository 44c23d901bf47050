"""Writes the report as one HTML file with embedded images and without scripts or external files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from peft_pretraining.commands.report import tables
from peft_pretraining.commands.report.drawing import DPI
from peft_pretraining.commands.report.groups import Group
from peft_pretraining.commands.report.published import MISPRINTS
from peft_pretraining.commands.report.tables import Table

_PIXELS_PER_INCH = 90
_CAPTIONS = {
    "loss": "Training loss of every run, smoothed over about 3 % of its updates; values far above the final loss are cut off. "
    "Time is training time, without evaluation, saving and stops.",
    "perplexity": "Held-out perplexity at every evaluation; values far above the final one are cut off.",
    "perplexity_memory": "Final perplexity against memory (the paper's Fig. 1): filled circles are these runs, whiskers the "
    "95 % interval over seeds, dashed circles the published results of the same model. Markers that "
    "would overlap at the same memory are drawn side by side; the circles are at the true position.",
    "memory": "Memory by class, predicted and measured, mean over seeds (the paper's Fig. 3). On a CPU the peak is the resident "
    "memory of the process, with Python and its libraries; on a GPU it is the memory allocated by torch.",
    "throughput": "Tokens of text per second; padding does not count.",
    "learning_rate": "Final perplexity against the learning rate, for settings that were run at several rates.",
}
_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #111; background: #fff;
  max-width: 1360px; margin: 2rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin: 0 0 .25rem } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem }
p, li { max-width: 60rem } figure { margin: 1.2rem 0 } figcaption { max-width: 60rem; color: #333; font-size: .93rem }
img { max-width: max(100%, 54rem); height: auto; display: block }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem } figure .scroll { margin: 0 0 .4rem }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .5rem; border-bottom: 1px solid #ccc; text-align: right; vertical-align: top }
th { vertical-align: bottom; border-bottom: 2px solid #444; font-weight: 600; min-width: 3.6rem }
th:first-child, td:first-child, td.text, th.text { text-align: left } td:first-child { font-weight: 600; min-width: 9rem }
td.unbroken { white-space: nowrap } td.text { min-width: 5.5rem }
tbody tr:nth-child(even) { background: #f5f6f8 }
pre { background: #f5f6f8; padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
details { margin: .4rem 0 } summary { cursor: pointer }
dt { font-weight: 600 } dd { margin: 0 0 .3rem 1.2rem; overflow-wrap: anywhere }
.missing { background: #fff4d6; border-left: 4px solid #b26a00; padding: .6rem 1rem; overflow-wrap: anywhere }
@page { margin: 12mm }
@media print {
  html, body { font-size: 11px } body { max-width: none; margin: 0; padding: 0 } img { max-width: 100% }
  .scroll { overflow: visible } table { font-size: 8px; width: 100% }
  th, td { padding: .25rem .3rem; min-width: 0 !important } td.unbroken { white-space: normal }
  figure, tr, .missing { break-inside: avoid } h2 { break-after: avoid }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""


def write_page(groups: Sequence[Group], figures: Mapping[str, Path], path: Path, title: str) -> Path:
    """Writes the page of the groups with their figures; returns its path."""
    runs = [run for group in groups for run in group.runs]
    sections = [
        f"<h1>{escape(title)}</h1>\n<p>{escape(_overview(groups))}</p>",
        _missing(groups),
        "<h2>Methods</h2>\n" + _methods(groups),
    ]
    rank_delta = tables.rank_delta_table(groups)
    if rank_delta is not None:
        sections.append("<h2>Rank and sparsity</h2>\n" + _html_table(rank_delta))
    headings = (
        ("Perplexity and memory", ("perplexity_memory",)),
        ("Curves", ("perplexity", "loss", "learning_rate")),
        ("Memory", ("memory",)),
        ("Throughput", ("throughput",)),
    )
    for heading, names in headings:
        available = [_figure(name, figures[name]) for name in names if name in figures]
        if available:
            sections.append(f"<h2>{heading}</h2>\n" + "\n".join(available))
        if heading == "Memory":
            sections.append(_html_table(tables.memory_table(groups)))
            peaks = tables.published_memory_table(groups)
            sections.append("" if peaks is None else f"{_html_table(peaks)}\n<p>{escape(_PEAK_CONDITIONS)}</p>")
    sections.append("<h2>Runs</h2>\n" + _html_table(tables.runs_table(runs)))
    published = tables.published_table(groups)
    if published is not None:
        note = f"<p>Published figures are for comparison only: machines and data order differ, {escape(_EVALUATION)}. "
        sections.append(f"<h2>Published figures</h2>\n{_html_table(published)}\n{note}{escape(MISPRINTS)}</p>")
    sections.append(_commands(groups))
    path.write_text(_document(title, "\n".join(section for section in sections if section)), encoding="utf-8")
    return path


_PEAK_CONDITIONS = (
    "Published peaks (SLTrain, arXiv 2406.02214, Fig. 3): one A100-80G, batch 1, bfloat16, no activation checkpointing."
)
_EVALUATION = "and the published evaluation reported perplexities 1.7 to 3.5 % too low"


def _document(title: str, body: str) -> str:
    # An empty icon keeps browsers from requesting one.
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _overview(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    finished = sum(run.finished for run in runs)
    settings = f"{len(groups)} setting{'s' if len(groups) > 1 else ''}"
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    return (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''} ({finished} finished) of {settings}; model {models}. Runs that differ "
        "only in their seed are one setting; its perplexity is the mean over seeds with Student's 95 % interval."
    )


def _missing(groups: Sequence[Group]) -> str:
    lines = tables.problems(groups)
    if not lines:
        return ""
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="missing"><strong>Note before comparing</strong>\n<ul>\n{items}\n</ul></div>'


def _methods(groups: Sequence[Group]) -> str:
    """Two tables: the results of the methods and their costs."""
    table = tables.methods_table(groups)
    results = [heading for heading in table.headings if heading not in tables.COSTS]
    costs = [heading for heading in table.headings if heading in ("setting", *tables.COSTS)]
    return (
        f"{_html_table(table.columns(results))}\n{_html_table(table.columns(costs))}\n"
        "<p>States: parameters, support and moments, measured after the first update. Against the baseline: ratio of "
        "perplexities, minus one, paired by seed; the baseline is the best full-rank setting of the same model, data, batch and "
        "length, or the first setting if none is full-rank. Published: with the number of training tokens. "
        f"{tables.MISSING}: not known, or not published.</p>"
    )


def _html_table(table: Table) -> str:
    texts = {
        column for column, heading in enumerate(table.headings) if heading in ("model", "source", "state", "method", "tokens")
    }

    def cells(row: Sequence[str], tag: str) -> str:
        def kind(column: int, text: str) -> str:
            return ' class="text"' if column in texts else ' class="unbroken"' if text.endswith(")") else ""

        return "".join(f"<{tag}{kind(column, text)}>{escape(text)}</{tag}>" for column, text in enumerate(row))

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    head = f"<thead><tr>{cells(table.headings, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _figure(name: str, path: Path) -> str:
    content = path.read_bytes()
    data = base64.b64encode(content).decode("ascii")
    caption = escape(_CAPTIONS[name])
    # Bytes 16 to 19 of a PNG hold its width. All figures are shown at one scale, so that their text has one size.
    width = round(int.from_bytes(content[16:20], "big") / DPI * _PIXELS_PER_INCH)
    image = f'<img width="{width}" alt="{caption}" src="data:image/png;base64,{data}">'
    # On a narrow screen figures scroll sideways, as tables do: shrunk to fit, their text would be too small.
    return f'<figure><div class="scroll">{image}</div><figcaption>{caption}</figcaption></figure>'


def _commands(groups: Sequence[Group]) -> str:
    parts = ["<h2>Commands and versions</h2>\n<p>As recorded in each run.json; defaults are left out.</p>"]
    names = tables.run_names([run for group in groups for run in group.runs])
    for group in groups:
        for run in group.runs:
            provenance = "\n".join(
                f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in tables.made_with(run).items()
            )
            summary = f"{names[run.folder]}: {group.label}, seed {run.seed}, {run.status}"
            parts.append(
                f"<details><summary>{escape(summary)}</summary>\n<pre>{escape(tables.command_of(run))}</pre>\n<dl>{provenance}</dl></details>"
            )
    return "\n".join(parts)
