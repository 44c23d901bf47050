"""The demo data is readable prose, split by a hash of its text, and built once, completely or not at all."""

import gzip
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from peft_pretraining.__main__ import main as command
from peft_pretraining.data import DataError, demo
from peft_pretraining.data.demo import build_demo, collect_documents, demo_folder, demo_tokenizer_path, prose
from peft_pretraining.data.loader import EvalSet, TrainLoader
from peft_pretraining.data.source import open_source, prepared_folder
from peft_pretraining.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOCSTRING = """
Compute the mean of `x` along ``axis``, as in :func:`torch.mean` and [`Trainer`].

The mean is the sum of the values divided by their number, which has to be larger
than zero; see `the manual <https://example.org>`_ for what is done with *missing* values.

Parameters
----------
x : array_like
    The values of which the mean is taken.

Examples
--------
>>> mean([1, 2])
1.5

It can be called like this::

    mean(x, axis=0)

.. math::

    \\frac{1}{n} \\sum_i x_i

.. note::

    This text of a note stays in the document.

```python
mean(y)
```

Notes
-----
The last paragraph stays as well.
"""
PROSE = """Compute the mean of x along axis, as in torch.mean and Trainer.

The mean is the sum of the values divided by their number, which has to be larger
than zero; see the manual for what is done with missing values.

Parameters:
x : array_like
    The values of which the mean is taken.

note:

This text of a note stays in the document.

Notes:
The last paragraph stays as well."""


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory) -> Path:
    """Returns the demo data of the standard library only, which takes a few seconds less than all packages."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PACKAGES", ())
        return build_demo(cache, vocab_size=2000)


def read(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob(f"demo-{split}.*.json.gz")) for line in gzip.open(path, "rt")]


def test_prose_keeps_sentences_and_drops_code_formulas_and_markup():
    assert prose(DOCSTRING.strip()) == PROSE


@pytest.mark.parametrize("text", ["Too short.", "x = 1\n" * 100, "0.123 0.456 " * 50, "name_a name_b name_c " * 40])
def test_text_that_is_not_prose_is_left_out(text):
    assert prose(text) == ""


def test_docstrings_are_found_and_other_strings_are_not(tmp_path):
    """The scan distinguishes strings, comments and docstrings as Python does."""
    long = "This is the text of a long enough paragraph, which is about the {} and is as good as any. "
    path = tmp_path / "module.py"
    path.write_text(
        f'"""Module docstring. {3 * long.format("module")}"""\n'
        f'# a comment with """ in it, and it\'s fine\n'
        f'data = """A value. {3 * long.format("value")}"""\n'
        f'other = \'no """ docstring here\'\n'
        f'table = {{"key": """A dictionary. {3 * long.format("dictionary")}"""}}\n'
        f"def f(a: str = ':',\n      b=1) -> None:  # noqa\n"
        f"    r'''Function docstring \\d. {3 * long.format('function')}'''\n"
        f'    return """A result. {3 * long.format("result")}"""\n'
        f"class C:\n\n"
        f'    """Class docstring\\t. {3 * long.format("class")}"""\n'
        f'add_docstr(f, """Added docstring. {3 * long.format("call")}""")\n'
    )
    found = demo._documents_of_file("package", path, tmp_path)
    assert [text.split(".")[0].strip() for _, text in found] == [
        "Module docstring",
        "Function docstring \\d",
        "Class docstring",
        "Added docstring",
    ]
    assert found[0][0] == "package:module#1"


def test_repeated_texts_and_paragraphs_are_kept_once():
    shared = "This paragraph is the same in many of the documents, as in the classes that inherit it from one. " * 3
    own = "That is what the {} document says of itself, and it is not said in any of the other ones. "
    documents = [(str(i), f"{shared}\n\n{own.format(word) * 3}") for i, word in enumerate(("first", "second", "third"))]
    kept = dict(demo._distinct([*documents, ("copy", documents[0][1].upper())]))
    assert set(kept) == {"0", "1", "2"}
    assert sum(shared.strip() in text for text in kept.values()) == 1


def test_the_demo_data_is_english_prose(small_demo):
    """More than 1,000 documents, none of them short or repeated, mostly letters."""
    records = read(small_demo, "train") + read(small_demo, "validation")
    texts = [record["text"] for record in records]
    assert len(texts) > 1000
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= demo.MIN_CHARACTERS
    assert not any(">>> " in text and "```" in text for text in texts)
    everything = "".join(texts)
    assert sum(c.isalpha() or c.isspace() for c in everything) > 0.85 * len(everything)
    assert set(records[0]) == {"text", "timestamp", "url"}
    assert any("with statement" in text for text in texts)  # from a topic page


def test_train_and_validation_are_split_by_the_text(small_demo):
    train, validation = ({record["text"] for record in read(small_demo, split)} for split in ("train", "validation"))
    assert not train & validation
    assert all(demo._is_validation(text) for text in validation)
    assert not any(demo._is_validation(text) for text in train)
    share = len(validation) / (len(train) + len(validation))
    # One in 50 of about 2,000: mean 40, standard deviation 6.3; up to five of them.
    assert abs(share - 1 / 50) < 5 * (share / 50 / len(train)) ** 0.5 + 0.01


def test_the_demo_tokenizer_is_lossless(small_demo):
    tokenizer = load_tokenizer(demo_tokenizer_path(small_demo))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.text_vocab_size) == (0, 1, 2000)
    texts = [record["text"] for record in read(small_demo, "validation")]
    ids = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(document) for document in ids] == texts
    assert all(2 not in document for document in ids)
    num_bytes = sum(len(text.encode()) for text in texts)
    lengths = tokenizer.bytes_per_id()
    assert sum(int(lengths[document].sum()) for document in ids) == num_bytes + len(texts)  # + the first space of each document
    assert num_bytes / sum(map(len, ids)) > 2.5  # most pieces are longer than one letter


def test_the_demo_data_works_in_training_and_evaluation(small_demo, monkeypatch):
    """The demo data gives training batches, and an evaluation set of its held-out documents."""
    monkeypatch.setattr(demo, "PACKAGES", ())
    train, validation = (open_source(str(small_demo), split) for split in ("train", "validation"))
    assert len(train.shards) == demo.TRAIN_SHARDS
    assert train.keep == validation.keep == "all"
    tokenizer = load_tokenizer(small_demo)
    loader = TrainLoader(train, tokenizer, max_length=128, packing=True, lanes=24, seed=0, batch_size=4)
    batch = next(iter(loader))
    assert batch.input_ids.shape == (4, 128)
    evaluation = EvalSet(validation, tokenizer, max_length=128, packing=False, max_tokens=None, batch_size=8)
    assert evaluation.num_sequences == len(read(small_demo, "validation"))


def test_building_again_changes_nothing(small_demo, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ())
    monkeypatch.setattr(demo, "collect_documents", lambda: pytest.fail("built again"))
    before = {path: path.stat().st_mtime_ns for path in small_demo.iterdir()}
    assert build_demo(small_demo.parent, vocab_size=2000) == small_demo
    assert {path: path.stat().st_mtime_ns for path in small_demo.iterdir()} == before


def test_the_demo_with_fewer_pieces_is_a_data_set_with_a_tokenizer_of_its_own(small_demo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PACKAGES", ())
    cache = small_demo.parent
    source = open_source("demo-2k", "train", cache_dir=cache)
    assert source.default_tokenizer == str(demo_tokenizer_path(small_demo))
    assert source.default_tokenizer != open_source("demo", "train", cache_dir=cache, resolve=False).default_tokenizer
    assert load_tokenizer(source.default_tokenizer).vocab_size == 2000
    assert prepared_folder("demo-2k") is None
    assert command(["data", "demo", "--name", "demo-2k", "--cache_dir", str(cache), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 2000


def test_the_same_versions_give_the_same_bytes(small_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ())
    again = build_demo(tmp_path, vocab_size=2000)
    assert again.name == small_demo.name
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in small_demo.iterdir()}


def test_other_versions_have_another_folder(tmp_path, monkeypatch):
    first = demo_folder(tmp_path)
    assert demo_folder(tmp_path, vocab_size=4000) != first
    monkeypatch.setattr(demo.importlib.metadata, "version", lambda package: "0.0.1")
    assert demo_folder(tmp_path) != first


def test_two_processes_build_the_demo_data_once(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        textwrap.dedent("""
        from peft_pretraining.data import demo
        demo.PACKAGES = ()
        print(demo.build_demo(vocab_size=2000))
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPARSE_LORA_CACHE": str(tmp_path / "cache")}
    started = [subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=240)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(folders) == 1
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert left == [Path(folders.pop()).name, left[1]]
    assert left[1].endswith(".lock")


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ())
    monkeypatch.setattr(demo, "train_sentencepiece", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left on device; set SPARSE_LORA_CACHE"):
        build_demo(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set SPARSE_LORA_CACHE to a writable folder"):
        build_demo(tmp_path / "file")


def test_demo_documents_are_in_an_order_that_mixes_their_sources(small_demo, monkeypatch):
    """Docstrings of one file share a subject, so the order must separate them."""
    monkeypatch.setattr(demo, "PACKAGES", ())
    origins = [origin.split("#")[0] for origin, _ in collect_documents()]
    same = sum(a == b for a, b in itertools.pairwise(origins))
    assert same < 0.05 * len(origins)
