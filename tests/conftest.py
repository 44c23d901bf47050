"""Fixtures shared by all tests: one thread, tiny runs, and the real C4 sample if it lies beside the checkout."""

import importlib.util
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import train, write_inputs

# Two test processes share two cores. Set before torch is imported, which reads it only once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
# torch.compile's cache ignores the instruction set: code compiled for a larger one fails under a smaller one.
if instructions := os.environ.get("ATEN_CPU_CAPABILITY"):
    compiled = Path(tempfile.gettempdir()) / f"torchinductor-{os.getuid()}-{instructions}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))

# Under nohup SIGHUP is ignored, also in the programs that tests start and stop by it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` if torch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


# Packages for 8-bit and 4-bit moments, which a machine may lack.
MISSING = [name for name in ("bitsandbytes", "torchao") if importlib.util.find_spec(name) is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Skips a test that failed because of a package for low-bit moments that is not installed, as the program's message says."""
    report = yield
    text = report.longreprtext + "".join(content for _, content in report.sections) if report.failed else ""
    for name in MISSING:
        if f"{name}, which cannot be imported" in text or f"No module named '{name}" in text:
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {name} is not installed")
    return report


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest):
    """The torch device: a CPU always, so that no test for a GPU is written without being run, and a GPU where there is one."""
    import torch

    return torch.device(request.param)


def _real_data(name: str) -> Path:
    """Returns a path in the real-data folder ($SLTRAIN_REAL_DATA, or ../shared/data beside the checkout), or skips the test."""
    folder = Path(os.environ.get("SLTRAIN_REAL_DATA", ROOT.parent / "shared" / "data"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"real data is not available: {name} (set SLTRAIN_REAL_DATA to a folder with c4_sample/ and t5_spiece.model)")
    return path


@pytest.fixture
def c4_sample() -> Path:
    """Folder with four C4 training shards and one validation shard in C4's own file format."""
    return _real_data("c4_sample")


@pytest.fixture
def t5_model() -> Path:
    """The T5 SentencePiece model, 32,000 pieces."""
    return _real_data("t5_spiece.model")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> list[str]:
    """Flags that name a tiny model, tokenizer and corpus; an update takes milliseconds."""
    return write_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a run by its name in tiny_runs.METHODS; each is trained once per session, on first use."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            runs[name] = train(name, tiny_run, tmp_path_factory.mktemp(name) / "run")
        return runs[name]

    return run


@pytest.fixture
def words_of_torchrun(tmp_path) -> Callable[..., list[str]]:
    """Runs a recipe whose Python is replaced by a script that prints its arguments; returns the arguments."""
    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_") and name != "NPROC"}
    environment["SLTRAIN_PYTHON"] = str(tmp_path / "python")

    def run(path: Path, *arguments: str, **variables: str) -> list[str]:
        command = ["bash", str(path), *arguments]
        return subprocess.check_output(command, cwd="/", env=environment | variables, text=True).splitlines()

    return run
