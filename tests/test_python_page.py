"""The example of docs/python.md, executed as in a notebook: with output streams that are no files."""

import io
import re
import sys
from pathlib import Path

from peft_pretraining.data import demo

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_trains_and_reads_its_record(monkeypatch, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # A small corpus of its own: of each package only some files, beside the help pages of Python's language reference.
    monkeypatch.setenv("SPARSE_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "PACKAGES", ("numpy",))
    monkeypatch.setattr(demo, "_source_files", lambda root, files=demo._source_files: files(root)[:60])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    folder = tmp_path / "notebook"
    exec(compile(example.replace("runs/notebook", str(folder)), "docs/python.md", "exec"), {})
    assert re.fullmatch(r"4 updates, last loss \d+\.\d\d, perplexity \d+\n", sys.stdout.getvalue().splitlines(True)[-1])
    assert (folder / "step_00000004" / "manifest.json").is_file()
