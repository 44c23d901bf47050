"""`python -m peft_pretraining evaluate` gives the same perplexity for every form of a model, equal to transformers'."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torchrun_main
from peft_pretraining.__main__ import main
from peft_pretraining.commands import evaluate as evaluation
from peft_pretraining.commands.evaluate import interval

Trained = Callable[[str], Path]
Captured = pytest.CaptureFixture[str]


def evaluate(capsys: Captured, *flags: object) -> dict | list:
    capsys.readouterr()
    assert main(["evaluate", *map(str, flags), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def held_out(tiny_run: list[str]) -> Path:
    return Path(tiny_run[tiny_run.index("--dataset") + 1]) / "words-validation.jsonl"


stored_both_ways = pytest.mark.parametrize("forms", ["sltrain", "sltrain_int8"], indirect=True)


@pytest.fixture
def forms(request: pytest.FixtureRequest, trained: Trained, tmp_path: Path) -> list[Path]:
    """Returns a run, its checkpoint, and its dense and factored exports; of SLTrain unless a test names another kind."""
    run = trained(getattr(request, "param", "sltrain"))
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "dense")]) == 0
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "factored"), "--keep_factors"]) == 0
    return [run, run / "step_00000008", tmp_path / "dense", tmp_path / "factored"]


@stored_both_ways
def test_every_form_of_a_model_has_the_runs_perplexity(forms: list[Path], tiny_run: list[str], capsys: Captured) -> None:
    last = json.loads((forms[0] / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluate(capsys, "--checkpoint", *forms, "--dataset", held_out(tiny_run), "--max_length", 64)
    assert [each["checkpoint"] for each in found] == [str(form) for form in forms]
    for each in found:
        assert each["loss"] == pytest.approx(last["final_eval_loss"], rel=1e-5)
        assert each["perplexity"] == pytest.approx(last["final_eval_perplexity"], rel=1e-4)
        assert each["bits_per_byte"] == pytest.approx(last["final_eval_bits_per_byte"], rel=1e-5)
        assert each["tokens"] == last["final_eval_tokens"]
        assert each["perplexity_low"] < each["perplexity"] < each["perplexity_high"]
    flat = evaluate(capsys, "--checkpoint", forms[0])  # with the run's data, sequence length and tokenizer
    assert flat == found[0]


@stored_both_ways
def test_transformers_alone_gives_the_same_perplexity(forms: list[Path], tiny_run: list[str], capsys: Captured) -> None:
    """Evaluates documents one by one, as in padded training: with an end token, truncated to 64 tokens."""
    model, tokenizer = (kind.from_pretrained(forms[2]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    total, count = 0.0, 0
    for line in held_out(tiny_run).read_text().splitlines():
        ids = [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids), 64):
            piece = torch.tensor([ids[start : start + 64]])
            if piece.shape[1] > 1:
                with torch.inference_mode():
                    total += float(model(piece, labels=piece).loss) * (piece.shape[1] - 1)
                count += piece.shape[1] - 1
            break  # padded: a document is one sequence
    found = evaluate(capsys, "--checkpoint", forms[2], "--dataset", held_out(tiny_run), "--max_length", 64)
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_layout_and_number_of_tokens_can_be_chosen(trained: Trained, capsys: Captured) -> None:
    run = trained("sltrain_packed")
    packed, padded = (evaluate(capsys, "--checkpoint", run, *flags) for flags in ((), ("--no-packing",)))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert packed["perplexity"] == pytest.approx(last["final_eval_perplexity"], rel=1e-5)
    assert padded["tokens"] != packed["tokens"]
    few = evaluate(capsys, "--checkpoint", run, "--eval_tokens", 70, "--batch_size", 1)
    assert 70 <= few["tokens"] < packed["tokens"]
    one = evaluate(capsys, "--checkpoint", run, "--eval_tokens", 1)
    assert one["perplexity_low"] is one["perplexity_high"] is None


def test_the_table_has_one_line_per_model(forms: list[Path], tiny_run: list[str], capsys: Captured) -> None:
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", *map(str, forms[:2]), "--eval_tokens", "200", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert [line.split()[0] for line in lines[1:]] == [str(forms[0]), str(forms[1])]
    assert len({len(line) for line in lines}) == 1


def test_of_training_data_only_the_held_out_part_is_evaluated(tiny_run: list[str], tmp_path: Path, capsys: Captured) -> None:
    """However its path is written, and for an export beside the run; an export alone says that all documents are used."""
    text = (Path(tiny_run[tiny_run.index("--dataset") + 1]) / "words-train.0.jsonl").read_text()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "all.jsonl").write_text(text * 20)
    short = "--batch_size 2 --max_length 32 --num_training_steps 1 --warmup_steps 0 --eval_every 1 --wandb disabled --device cpu"
    flags = [*tiny_run, "--dataset", str(tmp_path / "text"), *short.split(), "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(flags) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    data = tmp_path / "text" / ".." / "text"
    pair = evaluate(capsys, "--checkpoint", tmp_path / "export", tmp_path / "run", "--dataset", data, "--max_length", 32)
    assert [each["tokens"] for each in pair] == [row["final_eval_tokens"]] * 2
    # A run that was trained on it and other data.
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["arguments"]["dataset"] = f"c4:0.5, {tmp_path / 'text'}:0.5"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    mixed = evaluate(capsys, "--checkpoint", tmp_path / "run", tmp_path / "export", "--dataset", data, "--max_length", 32)
    assert [each["tokens"] for each in mixed] == [row["final_eval_tokens"]] * 2
    alone = ["--checkpoint", str(tmp_path / "export"), "--dataset", str(data), "--max_length", "32", "--device", "cpu", "--json"]
    assert main(["evaluate", *alone]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["tokens"] > 20 * row["final_eval_tokens"]
    assert "all its documents are evaluated" in shown.err


def test_the_interval_by_hand() -> None:
    """Batches of equal size are a plain sample: its interval has n - 1 in the variance, here of n = 2 and 3."""
    assert interval([(1.0, 1)]) == (None, None)
    # Student's t of 1 and 2 degrees of freedom has the quantiles tan(0.475 pi) and c sqrt(2 / (1 - c^2)), c = 0.95.
    quantiles = {2: math.tan(0.475 * math.pi), 3: 0.95 * math.sqrt(2 / (1 - 0.95**2))}
    for losses in ([2.0, 3.0], [1.0, 2.0, 6.0]):
        n = len(losses)
        half = quantiles[n] * statistics.stdev(losses) / math.sqrt(n)
        expected = [math.exp(statistics.fmean(losses) - half), math.exp(statistics.fmean(losses) + half)]
        for size in (1, 10):
            assert interval([(loss * size, size) for loss in losses]) == pytest.approx(expected, rel=1e-9)


def test_the_perplexity_interval_covers_95_percent() -> None:
    """For 2,000 sets of 12 batches of unequal sizes, the true mean lies within the interval in about 95 %."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(2000):
        counts = torch.randint(50, 200, (12,), generator=generator)
        losses = counts * (3 + 0.3 * torch.randn(12, generator=generator))
        low, high = interval(list(zip(losses.tolist(), counts.tolist(), strict=True)))
        assert low is not None
        assert high is not None
        inside += low <= math.exp(3) <= high
    assert 0.92 <= inside / 2000 <= 0.97


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_length", "65"], ["--max_length 65", "64 positions"]),
        (["--max_length", "1"], ["--max_length 1", "at least 2"]),
        (["--batch_size", "0"], ["--batch_size 0"]),
        (["--dataset", "nowhere-at-all"], ["nowhere-at-all"]),
    ],
)
def test_invalid_arguments_of_evaluate_are_named(trained: Trained, capsys: Captured, flags: list[str], words: list[str]) -> None:
    assert main(["evaluate", "--checkpoint", str(trained("sltrain")), *flags, "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_missing_data_tokenizer_or_model_is_reported(forms: list[Path], tmp_path: Path, capsys: Captured) -> None:
    assert main(["evaluate", "--checkpoint", str(forms[2])]) == 2
    assert "--dataset is required for" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):  # each suffices
        (forms[2] / name).unlink()
    assert main(["evaluate", "--checkpoint", str(forms[2]), "--dataset", "demo"]) == 2
    assert "the folder has no tokenizer; name one with --tokenizer" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", "--checkpoint", str(tmp_path / "empty")]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_unusable_models_are_refused_before_the_first_evaluation(
    forms: list[Path], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate_one", lambda *args: pytest.fail("a model was evaluated"))
    assert main(["evaluate", "--checkpoint", str(forms[0]), str(tmp_path / "nowhere"), "--device", "cpu"]) == 2
    assert "nowhere: holds no model" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", *map(str, forms[:3]), "--device", "cpu"]) == 2
    assert f"--dataset is required for {forms[2]}: an export records no data set" in capsys.readouterr().err


def test_earlier_results_are_printed_if_a_later_model_fails(
    forms: list[Path], tiny_run: list[str], tmp_path: Path, capsys: Captured
) -> None:
    """The second export's weights are truncated, which is noticed only when they are read."""
    weights = forms[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    capsys.readouterr()
    flags = ["--checkpoint", *map(str, [forms[3], forms[2]]), "--dataset", str(held_out(tiny_run)), "--device", "cpu"]
    assert main(["evaluate", *flags]) == 2
    said = capsys.readouterr()
    assert str(forms[3]) in said.out
    assert f"{weights}: the weights cannot be read" in said.err
