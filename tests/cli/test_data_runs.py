"""The whole program on prepared data and on data with bad records."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
from resealing import reseal

import torchrun_main
from peft_pretraining.__main__ import main as command
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.run import folder as run_folder

SHORT = [
    *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--lr", "0.003"),
    *(
        "--warmup_steps",
        "1",
        "--num_training_steps",
        "3",
        "--batch_size",
        "4",
        "--max_length",
        "64",
        "--eval_every",
        "3",
    ),
    *("--save_every", "3", "--data_lanes", "4", "--wandb", "disabled", "--device", "cpu", "--dtype", "float32"),
]


def value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def train(folder: Path, *flags: str) -> list[dict]:
    assert torchrun_main.main([*SHORT, *flags, "--save_dir", str(folder)]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def tokens(tiny_run, tmp_path) -> str:
    folder = tmp_path / "tokens"
    source = ["--dataset", value(tiny_run, "--dataset"), "--tokenizer", value(tiny_run, "--tokenizer")]
    assert command(["data", "prepare", *source, "--out", str(folder)]) == 0
    return str(folder)


@pytest.mark.parametrize("layout", [[], ["--packing"]])
def test_a_run_on_prepared_data_equals_the_run_on_its_source(tmp_path, tiny_run, tokens, monkeypatch, layout):
    """Losses and evaluations are bit-identical, nothing is encoded, no network is used, and the tokenizer is included."""
    rows = train(tmp_path / "text", *tiny_run, *layout, "--workers", "0")
    without_source = ["--model_config", value(tiny_run, "--model_config"), "--dataset", tokens]
    encode = Tokenizer.encode_batch

    def only_probes(self, texts):  # texts with which a tokenizer is checked when it is loaded
        assert not any("Fox" in text for text in texts), "a document is encoded"
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", only_probes)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepared = train(tmp_path / "prepared", *without_source, *layout)
    for name in ("loss", "tokens_seen", "gradnorm", "final_eval_loss", "final_eval_bits_per_byte", "bad_records"):
        assert [row[name] for row in prepared if name in row] == [row[name] for row in rows if name in row] != []
    monkeypatch.undo()
    assert command(["generate", "--checkpoint", str(tmp_path / "prepared"), "--prompt", "Fox", "--max_new_tokens", "3"]) == 0


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_on_data_prepared_from_another_field_resumes(tmp_path, tiny_run, capsys, mixed):
    """The field is that of the preparation, whatever --text_field says; alone, and as the first of a mixture."""
    text = Path(value(tiny_run, "--dataset"))
    (tmp_path / "content").mkdir()
    for path in text.iterdir() if text.is_dir() else [text]:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        lines = [json.dumps({"content": row["text"]}) for row in rows]
        name = path.name.removesuffix(".gz")
        (tmp_path / "content" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = ["--tokenizer", value(tiny_run, "--tokenizer")]
    prepare = ["data", "prepare", "--dataset", str(tmp_path / "content"), "--text_field", "content", *tokenizer]
    assert command([*prepare, "--out", str(tmp_path / "tokens")]) == 0
    data = f"{tmp_path / 'tokens'}:0.5, {text}:0.5" if mixed else str(tmp_path / "tokens")
    flags = ["--model_config", value(tiny_run, "--model_config"), "--dataset", data, *tokenizer, "--workers", "0"]
    train(tmp_path / "run", *flags)
    longer = ["--num_training_steps", "4", "--allow_changes", "num_training_steps"]
    assert train(tmp_path / "run", *flags, *longer)[-1]["update_step"] == 4


def test_a_tokenizer_or_model_that_does_not_fit_prepared_data_is_refused(tmp_path, tiny_run, tokens, capsys):
    import sentencepiece

    texts = (f"Other words {number} in another order" for number in range(300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(tmp_path / "other"), model_type="bpe", vocab_size=300,
        byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    flags = [*SHORT, "--model_config", value(tiny_run, "--model_config"), "--dataset", tokens]
    flags += ["--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main([*flags, "--tokenizer", str(tmp_path / "other.model")]) == 2
    said = capsys.readouterr().err
    assert "other.model (fingerprint" in said
    assert "tiny.model (fingerprint" in said
    small = json.loads(Path(value(tiny_run, "--model_config")).read_text()) | {"vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(small))
    assert torchrun_main.main([*flags, "--model_config", str(tmp_path / "small.json")]) == 2
    assert "vocab_size 100 is too small" in capsys.readouterr().err
    (Path(tokens) / "00001.index").unlink()
    for more in ([], ["--dry_run"]):
        assert torchrun_main.main([*flags, *more]) == 2
        said = capsys.readouterr().err
        assert "00001.index cannot be read" in said
        assert "Traceback" not in said


def test_a_changed_tokenizer_at_the_same_path_is_refused(tmp_path, tiny_run, capsys):
    """Another vocabulary would go on under the same name; an identical one at another path is accepted."""
    data = ["--model_config", value(tiny_run, "--model_config"), "--dataset", value(tiny_run, "--dataset"), "--workers", "0"]

    def make(vocab_size: int) -> None:
        settings = ["--vocab_size", str(vocab_size), "--out", str(tmp_path / "mine")]
        assert command(["data", "tokenizer", "--dataset", value(tiny_run, "--dataset"), *settings]) == 0

    make(300)
    train(tmp_path / "run", *data, "--tokenizer", str(tmp_path / "mine"))
    longer = ["--num_training_steps", "4", "--allow_changes", "num_training_steps"]
    shutil.rmtree(tmp_path / "mine")
    make(296)
    again = [*SHORT, *data, *longer, "--save_dir", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "mine")]
    capsys.readouterr()
    assert torchrun_main.main(again) == 2
    refusal = capsys.readouterr().err
    checkpoint = tmp_path / "run" / "step_00000003"
    assert "gives other ids" in refusal
    assert str(checkpoint / "tokenizer") in refusal
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(checkpoint / "tokenizer", tmp_path / "mine")
    assert torchrun_main.main(again) == 0


def test_bad_records_are_counted_and_end_a_strict_run(tmp_path, tiny_run, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in Path(value(tiny_run, "--dataset")).iterdir():
        lines = path.read_text().splitlines(keepends=True)
        for number in range(0, len(lines), 4):
            lines[number] = "broken\n" if number % 8 else lines[number]
        (corpus / path.name).write_text("".join(lines))
    flags = [*tiny_run[:4], "--dataset", str(corpus), "--log_every", "1", "--workers", "0"]
    rows = train(tmp_path / "run", *flags, "--num_training_steps", "20")
    counts = [row["bad_records"] for row in rows if "loss" in row]
    assert counts == sorted(counts)
    state = json.loads(next((tmp_path / "run").glob("step_*20/state.json")).read_text())
    assert state["data"]["bad_records"] == {"malformed_json": counts[-1]}
    assert counts[-1] > 3
    assert f"records skipped since the run began: {counts[-1]} malformed json" in capsys.readouterr().err
    strict = [*SHORT, *flags, "--on_bad_record", "fail", "--save_dir", str(tmp_path / "strict")]
    assert torchrun_main.main(strict) == 1  # 1: some updates were made and are saved
    said = capsys.readouterr().err
    assert "bad record in " in said
    assert ".jsonl, line 5: malformed json" in said
    assert "Traceback" not in said


def test_counts_of_bad_records_continue_in_a_resumed_run(tmp_path, tiny_run):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    source = Path(value(tiny_run, "--dataset"))
    (corpus / "a-train.jsonl").write_text("broken\n".join((source / "words-train.0.jsonl").read_text().splitlines(True)[:9]))
    (corpus / "b-train.jsonl").write_text((source / "words-train.1.jsonl").read_text())
    (corpus / "a-validation.jsonl").write_text((source / "words-validation.jsonl").read_text())
    flags = [*tiny_run[:4], "--dataset", str(corpus), "--workers", "0"]
    flags += ["--data_lanes", "1", "--num_training_steps", "24", "--save_every", "4"]
    whole = train(tmp_path / "run", *flags)
    again = train(tmp_path / "again", *flags, "--continue_from", str(tmp_path / "run/step_00000004"))
    counts, later = ([row["bad_records"] for row in rows if "loss" in row] for rows in (whole, again))
    assert later == counts
    assert counts[-1] > counts[4] > 0


def test_a_run_of_before_todays_rules_for_files_keeps_its_own(tmp_path, tiny_run, capsys, monkeypatch):
    """By parts of words "retrained" is the training file; today both files are read. --allow_changes dataset takes today's."""
    source = Path(value(tiny_run, "--dataset")) / "words-train.0.jsonl"
    (tmp_path / "texts").mkdir()
    for name in ("retrained", "other"):
        shutil.copyfile(source, tmp_path / "texts" / f"{name}.jsonl")
    run = [*tiny_run, "--dataset", str(tmp_path / "texts")]
    with monkeypatch.context() as earlier:
        earlier.setattr(run_folder, "READING_RULES", 1)
        train(tmp_path / "run", *run)
    # The versions before did not record their rules.
    checkpoint = tmp_path / "run" / "step_00000003"
    for path in (tmp_path / "run" / "run.json", checkpoint / "run.json"):
        document = json.loads(path.read_text())
        assert document["dataset"].pop("reading_rules") == 1
        path.write_text(json.dumps(document))
    reseal(checkpoint)
    longer = [*run, "--num_training_steps", "4", "--eval_every", "4"]
    capsys.readouterr()
    train(tmp_path / "run", *longer, "--allow_changes", "num_training_steps")
    said = capsys.readouterr().err
    assert "this run keeps the rules for files and splits that it began with" in said
    assert "--allow_changes dataset" in said
    assert "(train): 1 of 2 files" in described(tmp_path / "run")
    train(tmp_path / "run", *longer, "--num_training_steps", "5", "--allow_changes", "num_training_steps, dataset")
    assert "this run keeps" not in capsys.readouterr().err
    assert "(train): 2 files" in described(tmp_path / "run")


def test_a_run_of_rules_2_goes_on_with_evaluation_data_that_it_is_trained_on(tmp_path, tiny_run, capsys, monkeypatch):
    """It read all of it, which today's rules do not, and its record stays comparable."""
    (tmp_path / "texts").mkdir()
    text = (Path(value(tiny_run, "--dataset")) / "words-train.0.jsonl").read_text()
    (tmp_path / "texts" / "all.jsonl").write_text(text * 20)
    run = [*tiny_run, "--dataset", str(tmp_path / "texts"), "--eval_dataset", str(tmp_path / "texts")]
    with monkeypatch.context() as earlier:
        earlier.setattr(run_folder, "READING_RULES", 2)
        before = train(tmp_path / "run", *run)[-1]
    longer = ["--num_training_steps", "4", "--eval_every", "4", "--allow_changes", "num_training_steps"]
    after = train(tmp_path / "run", *run, *longer)[-1]
    today = train(tmp_path / "today", *run)[-1]
    assert after["final_eval_tokens"] == before["final_eval_tokens"] > 20 * today["final_eval_tokens"]


def described(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["dataset"]["description"]


def test_a_packed_run_records_its_order_and_keeps_it(tmp_path, tiny_run, capsys):
    """Small data has the global order. A run of an earlier version, whose record names no order, goes on by lanes."""
    flags = [*SHORT, *tiny_run, "--packing", "--workers", "0", "--data_lanes", "4"]
    assert torchrun_main.main([*flags, "--dry_run"]) == 0
    assert "global order, every document once per pass" in capsys.readouterr().out
    orders = {"new": [], "old": ["--data_order", "lanes"]}
    for name, order in orders.items():
        assert torchrun_main.main([*flags, *order, "--save_dir", str(tmp_path / name)]) == 0
    longer = [*flags, "--allow_changes", "num_training_steps", "--num_training_steps", "6", "--eval_every", "6"]
    capsys.readouterr()
    other = {"new": "lanes", "old": "global"}
    for name in orders:
        where = ["--save_dir", str(tmp_path / name)]
        assert torchrun_main.main([*longer, *where, "--data_order", other[name]]) == 2
        assert re.search(f"--data_order {other[name]}: .* was made with (lanes|global); use ", capsys.readouterr().err)
        assert torchrun_main.main([*longer, *where]) == 0
        assert ("global order" in capsys.readouterr().err) == (name == "new")
    states = {name: json.loads((tmp_path / name / "step_00000006/state.json").read_text())["data"] for name in orders}
    assert {name: state["order"]["version"] for name, state in states.items()} == {"new": 2, "old": 1}
    recorded = [json.loads((tmp_path / name / "run.json").read_text())["dataset"]["order"] for name in orders]
    assert recorded == ["global", "lanes"]


def test_the_global_order_of_files_of_unknown_size_is_refused_before_work(tmp_path, tiny_run, capsys):
    flags = [*SHORT, *tiny_run, "--data_order", "global", "--dataset", "c4"]
    for more in (["--dry_run"], ["--save_dir", str(tmp_path / "run")]):
        assert torchrun_main.main([*flags, *more]) == 2
        assert "--data_order global: the sizes of the files of c4 are unknown" in capsys.readouterr().err
