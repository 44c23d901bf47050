"""A data set's name determines its files and splits, or gives one message that names the problem."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import json_lines, texts

from peft_pretraining.data.records import belongs_to_split, check_source, document_text, read_records
from peft_pretraining.data.source import DataError, default_lanes, open_source

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json_lines(texts(3, start=3 * number)))
    return folder


def names(dataset, split="train", **options):
    source = open_source(str(dataset), split, **options)
    return [shard.name for shard in source.shards], source.keep


def documents(source):
    found = []
    for shard in source.shards:
        for record in read_records(shard, source):
            text = document_text(record, shard, source.text_field)
            if isinstance(text, str) and belongs_to_split(text, source):
                found.append(text)
    return found


def test_importing_the_source_module_loads_no_slow_library():
    """A dry run describes its data without importing torch, numpy or fsspec."""
    heavy = ("torch", "numpy", "fsspec", "datasets", "transformers")
    code = f"import sys, peft_pretraining.data.source; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_c4s_files_are_known_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train, validation = open_source("c4", "train"), open_source("c4", "validation")
    assert (len(train.shards), len(validation.shards)) == (1024, 8)
    assert train.shards[7].url == "hf://datasets/allenai/c4/en/c4-train.00007-of-01024.json.gz"
    assert validation.shards[0].url == "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz"
    assert train.keep == validation.keep == "all"
    assert train.default_tokenizer == "t5-base"
    assert "1024 files" in train.describe()
    assert (default_lanes("c4"), default_lanes("demo")) == (64, 24)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
@pytest.mark.parametrize("dataset", ["c4", "hub:someone/something"])
def test_offline_mode_refuses_the_hub(monkeypatch, variable, dataset):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DataError, match=f"{variable} is set"):
        check_source(open_source(dataset, "train"))


def test_describing_a_source_uses_no_network_and_builds_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for dataset in ("hub:someone/something", "s3://bucket/folder", "demo"):
        source = open_source(dataset, "train", cache_dir=tmp_path, resolve=False)
        assert "when the run starts" in source.describe()
    assert list(tmp_path.iterdir()) == []


def test_file_names_determine_the_splits(tmp_path):
    make(
        tmp_path,
        "c4-train.0.json",
        "c4-train.1.json",
        "c4-validation.0.json",
        "README.md",
        "test.jsonl",
        ".hidden.json",
    )
    assert names(tmp_path) == (["c4-train.0.json", "c4-train.1.json"], "all")
    assert names(tmp_path, "validation") == (["c4-validation.0.json"], "all")


def test_folder_names_determine_the_splits_if_file_names_do_not(tmp_path):
    make(tmp_path, "train/0.jsonl", "train/1.jsonl", "validation/0.jsonl")
    assert names(tmp_path) == (["train/0.jsonl", "train/1.jsonl"], "all")
    assert names(tmp_path, "validation") == (["validation/0.jsonl"], "all")


def test_a_file_named_train_and_validation_is_for_validation_only(tmp_path):
    make(tmp_path, "train.jsonl", "validation-of-training.jsonl")
    assert names(tmp_path) == (["train.jsonl"], "all")
    assert names(tmp_path, "validation") == (["validation-of-training.jsonl"], "all")


def test_without_train_in_a_name_all_other_files_are_for_training(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl", "my-validation.jsonl")
    assert names(tmp_path) == (["a.jsonl", "b.jsonl"], "all")


def test_without_validation_files_one_document_in_a_hundred_is_held_out(tmp_path):
    """The two splits share no document and together contain all, for any file names."""
    all_texts = texts(4000)
    (tmp_path / "only-train.jsonl").write_bytes(json_lines(all_texts))
    train, validation = (documents(open_source(str(tmp_path), split)) for split in ("train", "validation"))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(all_texts)
    # 4000 draws with probability 1/100: mean 40, standard deviation 6.3; up to six of them.
    assert 40 - 38 < len(validation) < 40 + 38
    whole = open_source(str(tmp_path), "validation", hold_out=False)
    assert documents(whole) == all_texts


def test_held_out_documents_do_not_depend_on_order_or_files(tmp_path):
    """The split depends only on a document's text, so it stays the same when files are merged or sorted."""
    make(tmp_path / "a", "x.jsonl")
    (tmp_path / "a/x.jsonl").write_bytes(json_lines(texts(500)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.jsonl").write_bytes(json_lines(texts(500)[::-1][:200]))
    (tmp_path / "b/2.jsonl").write_bytes(json_lines(texts(500)[::-1][200:]))
    held_out = [set(documents(open_source(str(tmp_path / name), "validation"))) for name in "ab"]
    assert held_out[0] == held_out[1]


def test_one_file_a_glob_and_a_folder_name_the_same_documents(tmp_path):
    make(tmp_path, "x.jsonl")
    sources = [open_source(str(tmp_path / name), "train") for name in ("", "x.jsonl", "*.jsonl", "**/x.*")]
    assert len({source.fingerprint for source in sources}) == 1
    assert len({tuple(documents(source)) for source in sources}) == 1


def test_a_validation_file_alone_is_for_evaluation_only(tmp_path):
    make(tmp_path, "c4-validation.json")
    assert names(tmp_path / "c4-validation.json", "validation") == (["c4-validation.json"], "all")
    with pytest.raises(DataError, match="only validation files"):
        open_source(str(tmp_path), "train")


def test_the_fingerprint_depends_on_content_not_on_the_path(tmp_path):
    first = open_source(str(make(tmp_path / "a", "x.jsonl", "y.jsonl")), "train")
    moved = open_source(str(make(tmp_path / "b", "x.jsonl", "y.jsonl")), "train")
    assert moved.fingerprint == first.fingerprint
    path = tmp_path / "b/y.jsonl"
    path.write_bytes(path.read_bytes().replace(b"document 4", b"Document 4"))  # same size
    assert open_source(str(tmp_path / "b"), "train").fingerprint != first.fingerprint
    assert open_source(str(tmp_path / "a"), "train", text_field="url").fingerprint != first.fingerprint
    path.unlink()
    assert open_source(str(tmp_path / "b"), "train").fingerprint != first.fingerprint


def test_a_source_is_immutable_and_picklable(tmp_path):
    source = open_source(str(make(tmp_path, "x.jsonl")), "train")
    assert pickle.loads(pickle.dumps(source)) == source
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.text_field = "other"


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("nowhere", "no such file or folder; give c4, demo, hub:NAME"),
        ("*.json.gz", "the pattern matches no file"),
        ("empty", "holds no files"),
        ("other", r"no file with a known extension \(\.json .*among: a\.csv, b\.tar\.gz"),
        ("other/a.csv", "no file with a known extension"),
        ("nosuchprotocol://x/y.jsonl", "nosuchprotocol"),
    ],
)
def test_a_data_set_that_cannot_be_found_is_named(tmp_path, monkeypatch, dataset, said):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "other/a.csv", "other/b.tar.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said) as caught:
        open_source(dataset, "train")
    assert repr(dataset) in str(caught.value)


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="split 'test'"):
        open_source("c4", "test")
