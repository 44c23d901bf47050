"""The blocks of docs/after_training.md do what the page says, run as they stand in one folder."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peft_pretraining.__main__ import main
from peft_pretraining.export.load import load_model
from peft_pretraining.export.write import export

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")
Trained = Callable[[str], Path]


def block(language: str, part: str) -> str:
    """The page's block of this language that holds `part`."""
    (found,) = [text for kind, text in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL) if kind == language and part in text]
    return found


@pytest.fixture
def folder(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the run `runs/quickstart` and its export `my-model`."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(trained("sltrain"))
    export(trained("sltrain"), tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def greedy(model: torch.nn.Module, ids: list[int], number: int, end: int) -> list[int]:
    """The most likely tokens after `ids`, one at a time, up to the end token."""
    for _ in range(number):
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == end:
            break
    return ids


def test_the_pipeline_continues_a_text_as_the_runs_model_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(compile(block("python", "pipeline"), "docs/after_training.md", "exec"), names)
    printed = capsys.readouterr().out
    model, tokenizer, _ = load_model(folder / "runs" / "quickstart", torch.device("cpu"))
    ids = greedy(model, tokenizer.encode_batch(["Return the"])[0], 20, tokenizer.eos_id)
    assert printed == tokenizer.decode(ids) + "\n"
    assert len(ids) > len(tokenizer.encode_batch(["Return the"])[0]) + 1
    (plain,) = names["generate"]("Return the", max_new_tokens=20, do_sample=False)
    assert plain["generated_text"].replace(" ", "") == printed.replace(" ", "").removesuffix("\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saves_again_has_identical_logits(
    folder: Path, trained: Trained, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    (folder / "my-model").rename(folder / "first")
    export(trained("sltrain"), folder / "my-model", dtype=dtype)
    names: dict = {}
    exec(compile(block("python", "saved-again"), "docs/after_training.md", "exec"), names)
    assert "identical logits: True" in capsys.readouterr().out
    assert str(names["again"].dtype) == f"torch.{dtype}"
    assert main(["generate", "--checkpoint", "saved-again", "--prompt", "Fox", "--max_new_tokens", "2", "--device", "cpu"]) == 0
    ids = [names["tokenizer"].from_pretrained(name)("Fox 3 jumps </s>")["input_ids"] for name in ("my-model", "saved-again")]
    assert ids[0] == ids[1]


def expected_scores(run: Path, tasks: Path) -> dict[str, float]:
    """The scores of the page's two tasks, computed with the run's own model, texts beginning with the end token."""
    model, tokenizer, _ = load_model(run, torch.device("cpu"))

    def log_likelihood(ids: list[int], first: int) -> float:
        """Of ids[first:], in nats, given what is before them."""
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logits[position - 1, ids[position]]) for position in range(first, len(ids)))

    total, size, right = 0.0, 0, []
    for line in (tasks / "documents.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        total += log_likelihood([tokenizer.eos_id, *tokenizer.encode_batch([text])[0]], 1)
        size += len(text.encode())
    for line in (tasks / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        context = len(tokenizer.encode_batch([row["question"]])[0])
        each = [log_likelihood(tokenizer.encode_batch([row["question"] + choice])[0], context) for choice in row["choices"]]
        right.append(each.index(max(each)) == row["answer"])
    return {"bits_per_byte": -total / size / math.log(2), "acc": sum(right) / len(right)}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness (lm_eval) is not installed")
def test_lm_evaluation_harness_gives_the_scores_of_the_runs_model(folder: Path) -> None:
    (folder / "lm_eval").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lm_eval "$@"\n')
    (folder / "lm_eval").chmod(0o755)
    commands = block("bash", "cat > my-tasks/questions.yaml").replace("max_length=128", "max_length=64")  # the tiny run's
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    subprocess.run(["bash", "-ec", commands], env=environment, check=True)
    (file,) = (folder / "scores").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    expected = expected_scores(folder / "runs" / "quickstart", folder / "my-tasks")
    assert results["documents"]["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert results["questions"]["acc,none"] == expected["acc"]
