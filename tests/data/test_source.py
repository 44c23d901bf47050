"""A data set's name determines its files and splits, or gives one message that names the problem."""

import dataclasses
import gzip
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


# --- Splits by whole words ---


@pytest.mark.parametrize("folder", ["pretrain_books", "trains", "constraints", "restrained", "étrain"])
def test_a_word_inside_a_word_tells_no_split(tmp_path, folder):
    make(tmp_path, f"{folder}/b.jsonl", "web/a.jsonl")
    assert names(tmp_path) == (sorted([f"{folder}/b.jsonl", "web/a.jsonl"]), "train")
    make(tmp_path, "invalidation.jsonl", "developers.jsonl", "contest.jsonl", "value.jsonl")
    assert len(names(tmp_path)[0]) == 6


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev", "VALIDATION"])
@pytest.mark.parametrize(
    "name", ["{}.jsonl", "c4-{}.0.jsonl", "x_{}_1.jsonl", "{}00.jsonl", "{}/a.jsonl", "data/{}-00000-of-00001/b.jsonl"]
)
def test_every_word_of_the_field_tells_the_held_out_split(tmp_path, word, name):
    make(tmp_path, name.format(word), "train.0.jsonl")
    assert names(tmp_path) == (["train.0.jsonl"], "all")
    assert names(tmp_path, "validation") == ([name.format(word)], "all")


def test_test_files_are_never_trained_on_and_named(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl", "test.jsonl")
    source = open_source(str(tmp_path), "train")
    assert [shard.name for shard in source.shards] == ["a.jsonl", "b.jsonl"]
    assert "2 of 3 files" in source.describe()
    assert "for tests: test.jsonl" in source.describe()
    # A data set that is used for evaluation only may have nothing but test files beside its training files.
    assert names(tmp_path, "validation", hold_out=False) == (["test.jsonl"], "all")
    assert names(tmp_path / "test.jsonl") == (["test.jsonl"], "train")


def test_files_named_train_alone_do_not_exclude_the_others(tmp_path):
    """A journey by train among other subjects: nothing is named validation or test, so the names tell no splits."""
    make(tmp_path, "cooking.jsonl", "gardening.jsonl", "train_travel.jsonl")
    assert names(tmp_path) == (["cooking.jsonl", "gardening.jsonl", "train_travel.jsonl"], "train")
    make(tmp_path, "validation.jsonl")
    source = open_source(str(tmp_path), "train")
    assert [shard.name for shard in source.shards] == ["train_travel.jsonl"]
    assert "cooking.jsonl, gardening.jsonl (no split in the name)" in source.describe()
    assert "for validation: validation.jsonl" in source.describe()


def test_the_innermost_name_wins(tmp_path):
    make(tmp_path, "test_data/train.jsonl", "test_data/validation.jsonl")
    assert names(tmp_path) == (["test_data/train.jsonl"], "all")
    assert names(tmp_path, "validation") == (["test_data/validation.jsonl"], "all")


def test_what_is_left_out_is_named_where_it_is_little_and_counted_where_it_is_much(tmp_path):
    make(tmp_path, "a.jsonl", "notes.md", "_drafts/b.jsonl", ".c.jsonl", *(f"x{number}.csv" for number in range(5)))
    said = open_source(str(tmp_path), "train").describe()
    assert "notes.md, x0.csv, x1.csv and 3 more (another extension)" in said
    assert ".c.jsonl, _drafts (the name begins with . or _)" in said


# --- Links ---


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    make(tmp_path / "away", "b.jsonl", "deep/c.jsonl")
    make(tmp_path / "data", "a.jsonl")
    (tmp_path / "data/linked").symlink_to(tmp_path / "away")
    (tmp_path / "data/again").symlink_to(tmp_path / "away/deep")
    (tmp_path / "away/circle").symlink_to(tmp_path / "data")
    (tmp_path / "data/up").symlink_to(tmp_path)
    (tmp_path / "data/self").symlink_to(tmp_path / "data/self")
    (tmp_path / "data/gone.jsonl").symlink_to(tmp_path / "unmounted/gone.jsonl")
    source = open_source(str(tmp_path / "data"), "train")
    read = [(tmp_path / "data" / shard.name).resolve() for shard in source.shards]
    assert sorted(read) == sorted(tmp_path / name for name in ("data/a.jsonl", "away/b.jsonl", "away/deep/c.jsonl"))
    said = source.describe()
    assert f"gone.jsonl -> {tmp_path}/unmounted/gone.jsonl" in said
    assert "(a broken link)" in said
    for name in ("linked/circle", "up"):
        assert name in said
    globbed = open_source(str(tmp_path / "data/**/*.jsonl"), "train")
    assert len({Path(shard.url).resolve() for shard in globbed.shards}) == len(globbed.shards)


def test_a_folder_of_broken_links_and_a_broken_link_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").symlink_to("/nowhere/x.jsonl")
    for dataset in ("data", "data/*.jsonl", "data/x.jsonl"):
        with pytest.raises(DataError, match="broken link") as caught:
            open_source(str(tmp_path / dataset), "train")
        assert "/nowhere/x.jsonl" in str(caught.value)


# --- Files that only look like data ---

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 318000000\n"
GOOD = json_lines(texts(3))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json.gz", POINTER, r"git-lfs pointer, not the file of 318,000,000 bytes .*git lfs pull"),
        ("x.jsonl.zst", POINTER, "git-lfs pointer"),
        ("x.txt", POINTER, "git-lfs pointer"),
        ("x.parquet", POINTER, "git-lfs pointer"),
        ("x.arrow", POINTER, "git-lfs pointer"),
        ("x.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16 text, not UTF-8; convert it: iconv"),
        ("x.jsonl", GOOD.decode().encode("utf-16-be"), "is UTF-16 text"),
        ("x.jsonl", GOOD.decode().encode("utf-32"), "is UTF-32 text"),
        ("x.txt", "plain text".encode("utf-16"), "is UTF-16 text"),
        ("x.txt", "plain text".encode("utf-16-le"), "is UTF-16 text"),
        ("x.jsonl.gz", gzip.compress(GOOD.decode().encode("utf-16")), "is UTF-16 text"),
        ("x.jsonl", gzip.compress(GOOD), "compressed by gzip; add .gz"),
        ("x.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
    ],
    # Compressed bytes contain the time, and both test processes must collect the same names.
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_one_file_of_many_that_holds_something_else_is_refused_by_name(tmp_path, name, content, said):
    make(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        open_source(str(tmp_path), "train")
    assert str(tmp_path / name) in str(caught.value)
    # Where it belongs to the other split, it is not in the way.
    (tmp_path / name).rename(tmp_path / f"validation-{name}")
    assert names(tmp_path)[0] == ["a.jsonl", "b.jsonl"]


def test_a_pointer_over_a_network_is_named_too(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    for name in ("x.jsonl.gz", "x.txt", "x.parquet", "x.arrow"):
        fsspec.filesystem("memory").pipe(f"/pointers/{name}", POINTER)
        with pytest.raises(DataError, match="git-lfs pointer"):
            check_source(open_source(f"memory://pointers/{name}", "train"))


# --- Folders of save_to_disk ---


def saved(folder: Path, documents: list[str], splits: bool = False) -> Path:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": documents, "id": list(range(len(documents)))})
    (datasets.DatasetDict({"train": table, "test": table}) if splits else table).save_to_disk(str(folder))
    return folder


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    folder = saved(tmp_path / "data", texts(30))
    source = open_source(str(folder), "validation", hold_out=False)
    assert documents(source) == texts(30)
    shard = source.shards[0]
    assert [record.number for record in read_records(shard, source, 7)] == list(range(7, 30))
    splits = saved(tmp_path / "splits", texts(5), splits=True)
    assert [name.split("/")[0] for name in names(splits)[0]] == ["train"]
    # What map() left beside the data is not data.
    (folder / "cache-0123.arrow").write_bytes((folder / shard.name).read_bytes())
    again = open_source(str(folder), "train")
    assert len(again.shards) == 1
    assert "cache-0123.arrow (not listed in state.json)" in again.describe()
    (folder / shard.name).unlink()
    with pytest.raises(DataError, match=r"state\.json lists files that are missing: data-00000"):
        open_source(str(folder), "train")


def test_an_arrow_file_is_read_like_an_arrow_stream(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": range(30), "text": texts(30)})
    for name, new in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        source = open_source(str(tmp_path / f"{name}.arrow"), "validation", hold_out=False)
        assert documents(source) == texts(30)
        assert [record.number for record in read_records(source.shards[0], source, 8)] == list(range(8, 30))
        with pytest.raises(DataError, match=r"no column 'body'; the columns are 'id', 'text'"):
            check_source(open_source(str(tmp_path / f"{name}.arrow"), "train", text_field="body"))


def test_a_later_table_without_the_column_is_refused_before_the_start(tmp_path):
    """When its turn comes, perhaps after hours, it would end the run; a damaged one is a bad record then."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, column in (("a", "text"), ("z", "content")):
        parquet.write_table(pyarrow.table({column: texts(300)}), str(tmp_path / f"{name}.parquet"))
    with pytest.raises(DataError, match=r"z\.parquet: no column 'text'; the columns are 'content'"):
        check_source(open_source(str(tmp_path), "train"))
    (tmp_path / "z.parquet").write_bytes(b"PAR1 and nothing more")
    check_source(open_source(str(tmp_path), "train"))


# --- The rules of earlier versions ---


def test_a_run_of_an_earlier_version_keeps_its_files(tmp_path):
    """The choice by parts of words, without links and .arrow files, as recorded runs need it."""
    make(tmp_path / "away", "c.jsonl")
    make(tmp_path / "data", "cooking.jsonl", "train_travel.jsonl", "pretraining/d.jsonl", "x.arrow")
    (tmp_path / "data/linked").symlink_to(tmp_path / "away")
    assert names(tmp_path / "data", rules=1) == (["train_travel.jsonl"], "train")
    (tmp_path / "data/train_travel.jsonl").unlink()
    assert names(tmp_path / "data", rules=1) == (["pretraining/d.jsonl"], "train")
    make(tmp_path / "data", "revalidation.jsonl")
    assert names(tmp_path / "data", "validation", rules=1) == (["revalidation.jsonl"], "all")
