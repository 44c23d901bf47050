"""`python -m peft_pretraining generate` writes the same text alone, in a batch and from every form of a model."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peft_pretraining.__main__ import main
from peft_pretraining.commands.generate import Printer, printable
from peft_pretraining.data.tokenizer import load_tokenizer

Trained = Callable[[str], Path]
Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
GREEDY = ["--temperature", "0", "--max_new_tokens", "10", "--device", "cpu"]


def generated(capsys: Captured, *flags: object) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, flags)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["sltrain", "sltrain_block", "sltrain_int8"])
def test_every_form_of_a_model_generates_the_same_text(trained: Trained, tmp_path: Path, capsys: Captured, name: str) -> None:
    forms = [trained(name), tmp_path / "dense", tmp_path / "factored"]
    for form, more in zip(forms[1:], ([], ["--keep_factors"]), strict=True):
        assert main(["export", "--checkpoint", str(forms[0]), "--out", str(form), *more]) == 0
    texts = {generated(capsys, "--checkpoint", form, "--prompt", "Fox 3 jumps", *GREEDY) for form in forms}
    assert len(texts) == 1


def test_a_prompt_in_a_batch_is_continued_as_alone(trained: Trained, capsys: Captured) -> None:
    prompts = ["Fox", "Fox 3 jumps over dog 21 in"]
    alone = [generated(capsys, "--checkpoint", trained("sltrain"), "--prompt", prompt, *GREEDY) for prompt in prompts]
    together = generated(capsys, "--checkpoint", trained("sltrain"), "--prompt", *prompts, *GREEDY)
    assert together == f"[1] {alone[0]}\n[2] {alone[1]}"


def test_prompts_can_come_from_a_file_or_standard_input(
    trained: Trained, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("Fox 3")
    expected = generated(capsys, "--checkpoint", trained("sltrain"), "--prompt", "Fox 3", *GREEDY)
    assert generated(capsys, "--checkpoint", trained("sltrain"), "--file", tmp_path / "prompt.txt", *GREEDY) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("Fox 3"))
    assert generated(capsys, "--checkpoint", trained("sltrain"), "--file", "-", *GREEDY) == expected


def test_sampling_depends_on_the_seed_top_k_and_top_p(trained: Trained, capsys: Captured) -> None:
    flags = ["--checkpoint", trained("sltrain"), "--prompt", "Fox", "--max_new_tokens", 20, "--temperature", 1.5]
    texts = [generated(capsys, *flags, "--top_k", 0, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = generated(capsys, *flags[:-2], "--temperature", 0)
    assert generated(capsys, *flags, "--top_k", 1) == greedy
    assert generated(capsys, *flags, "--top_k", 0, "--top_p", 1e-6) == greedy


def test_a_character_of_several_tokens_is_written_when_complete(tiny_run: list[str]) -> None:
    tokenizer = load_tokenizer(tiny_run[tiny_run.index("--tokenizer") + 1])
    text = "Fox 你好 3"
    pieces: list[str] = []
    printer = Printer(tokenizer, pieces.append)
    ids = tokenizer.encode_batch([text])[0]
    for index in ids:
        printer.put(torch.tensor([index]))
    printer.end()
    assert len(ids) > len(text)  # three bytes, and so tokens, for each of the two characters
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert printable("a\tb\x1b[2J\r\n") == "a\tb\\x1b[2J\\r\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_p", "0"], "--top_p 0.0: must be above 0 and at most 1"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--temperature", "1e-45"], "must be 0 (the most likely token), or a number of at least 1e-06"),
        (["--max_new_tokens", "64"], "--max_new_tokens 64: must be below the model's 64 positions"),
        (["--prompt", "\udcff"], "--prompt: is not UTF-8 text"),
        (["--prompt", ""], "prompt '' has 0 tokens: must be 1 to 54"),
        (
            ["--prompt", "Fox " * 100],
            "tokens: must be 1 to 54, so that prompt and continuation fit the model's 64 positions",
        ),
        (["--file", "not-there.txt"], "not-there.txt"),
    ],
)
def test_invalid_arguments_of_generate_are_named(trained: Trained, capsys: Captured, flags: list[str], message: str) -> None:
    base = ["generate", "--checkpoint", str(trained("sltrain")), "--max_new_tokens", "10", "--device", "cpu"]
    assert main([*base, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_closed_pipe_ends_generate_without_traceback(trained: Trained) -> None:
    """As in `generate ... | head -c 1`: there is no traceback, and the exit code is that of a broken pipe."""
    command = [sys.executable, "-m", "peft_pretraining", "generate", "--checkpoint", str(trained("sltrain"))]
    flags = ["--prompt", "a", "b", "--max_new_tokens", "20", "--temperature", "0", "--device", "cpu"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == 141
    assert "Traceback" not in said
    assert "Errno" not in said
