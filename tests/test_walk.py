"""An update, a forward pass and a micro-batch enter few files of the project, as measured by benchmarks/walk.py."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "walk.py"


@pytest.fixture(scope="module")
def walk():
    spec = importlib.util.spec_from_file_location("walk", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def walks(walk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    return {**walk.watch_training(folder), "window": walk.watch_window(folder), "forward": walk.watch_forward()}


@pytest.mark.parametrize(
    ("name", "most"),
    [("update", 15), ("forward", 5), ("micro_batch", 20)],
)
def test_a_step_enters_few_files(walks, name, most):
    """One update, one linear's forward pass, and one micro-batch from disk to log."""
    assert 0 < len(walks[name].files) <= most, sorted(walks[name].files)


def test_records_and_documents_are_passed_in_batches(walks, walk):
    """Passing single documents would need at least one call to another file, and one return, for each of the window's records."""
    assert 0 < walks["window"].changes < walk.NUM_DOCUMENTS


def test_a_file_is_entered_by_a_call_and_changed_by_a_call_or_a_return(walk, tmp_path):
    """Tests the measurement: open_source calls demo_folder in another file, which returns to it."""
    from peft_pretraining.data.source import open_source

    watched = walk.Walk()
    with watched.watching():
        open_source("demo", "train", cache_dir=tmp_path, resolve=False)
    assert watched.files == {"peft_pretraining/data/source.py", "peft_pretraining/data/demo.py"}
    assert watched.changes >= 2
    assert watched.changes % 2 == 0


def test_late_imports_and_packages_belong_to_the_closure(walk, tmp_path):
    (tmp_path / "torchrun_main.py").write_text("def f():\n    from peft_pretraining.inner import part\n")
    inner = tmp_path / "peft_pretraining" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("import os\n")
    (inner / "part.py").write_text("from peft_pretraining.inner import missing\n\n")
    (inner / "other.py").write_text("x = 1\n")
    assert walk.import_closure(tmp_path) == {
        "torchrun_main.py": 2,
        "peft_pretraining/inner/__init__.py": 1,
        "peft_pretraining/inner/part.py": 2,
    }
