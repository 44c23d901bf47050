"""A full disk, or a limit on file sizes, destroys no checkpoint and gives a message instead of a traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from peft_pretraining.checkpoint.step_folder import list_checkpoints, resolve, verify

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 12
LARGEST_FILE = 400_000  # bytes


@pytest.fixture
def flags(tmp_path, tiny_run) -> list[str]:
    """Flags of a run whose tensors are its largest file: 1.1 MB, the tokenizer 330 kB."""
    model = json.loads(Path(tiny_run[1]).read_text()) | {"hidden_size": 64, "intermediate_size": 96}
    (tmp_path / "model.json").write_text(json.dumps(model))
    return [
        *("--model_config", str(tmp_path / "model.json"), *tiny_run[2:]),
        *("--optimizer", "adamw", "--warmup_steps", "2", "--num_training_steps", str(UPDATES), "--batch_size", "4"),
        *("--max_length", "64", "--eval_every", "100", "--save_every", "3", "--workers", "0"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32"),
    ]


@pytest.fixture
def started(tmp_path, flags) -> Path:
    """Returns the folder of a run whose only checkpoint is that of update 3."""
    folder = tmp_path / "run"
    code, output = forked.run([*flags, "--save_dir", str(folder)], tmp_path / "log")
    assert code == 0, output
    for path in list_checkpoints(folder)[1:]:
        shutil.rmtree(path)
    return folder


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("saving", [[], ["--async_save"]], ids=["waiting", "in the background"])
def test_failed_saves_leave_the_earlier_checkpoint_and_training_can_be_resumed(tmp_path, flags, started, saving):
    """RLIMIT_FSIZE truncates the tensor file; all other files are small enough."""
    expected = losses(started)
    argv = [*flags, *saving, "--save_dir", str(started)]
    code, output = forked.run(argv, tmp_path / "log", largest_file=LARGEST_FILE)
    assert code == 1
    assert "step_00000006 could not be saved" in output
    assert "training continues" in output
    assert "5 consecutive attempts failed" in output or "the run's last state is not saved" in output
    assert "the newest checkpoint is step_00000003" in output
    assert "Traceback" not in output
    assert [path.name for path in started.glob("*step_*")] == ["step_00000003"]  # no partial checkpoint is left
    verify(started / "step_00000003")
    code, output = forked.run(argv, tmp_path / "log")
    assert code == 0, output
    assert losses(started) == expected


def test_a_run_whose_last_state_is_not_saved_fails_with_a_message(tmp_path, flags):
    argv = [*flags, "--save_every", "100", "--save_dir", str(tmp_path / "run")]
    code, output = forked.run(argv, tmp_path / "log", largest_file=LARGEST_FILE)
    assert code == 1
    assert "the run's last state is not saved" in output
    assert "there is no checkpoint" in output
    assert "finished" not in output


def test_all_processes_end_when_saving_fails_repeatedly(tmp_path, flags, started):
    argv = [*flags, "--batch_size", "2", "--save_dir", str(started)]
    code, output = forked.run(argv, tmp_path / "log", processes=2, largest_file=LARGEST_FILE)
    assert code == 1
    assert output.count("5 consecutive attempts failed") == 1  # only rank 0 prints it
    assert "Traceback" not in output
    assert resolve(started).name == "step_00000003"


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=64m none "$1" || exit 77
cp -r "$2" "$1/run"
size=$(du -sk "$1/run/step_00000003" | cut -f1)
head -c $(( (65536 - size - size / 2) * 1024 )) /dev/zero > "$1/fill" || exit 78
shift 2
"$@"
code=$?
ls -A "$DISK/run"
exit $code
"""


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_not_begun(tmp_path, flags, started):
    """There is room for one and a half checkpoints; the lack of space is detected before anything is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (unshare --user --mount)")
    program = [sys.executable, "torchrun_main.py", *flags, "--save_dir", str(disk / "run")]
    ended = subprocess.run(
        [*own_mounts, "bash", "-c", ON_A_SMALL_DISK, "disk", str(disk), str(started), *program],
        cwd=ROOT,
        env={**os.environ, "DISK": str(disk), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode == 77:
        pytest.skip(f"no tmpfs can be mounted here ({ended.stderr.strip()})")
    assert ended.returncode == 1, ended.stderr
    assert "no space: a checkpoint takes about" in ended.stderr
    assert "are free" in ended.stderr
    assert "Traceback" not in ended.stderr
    names = ended.stdout.split()
    assert [name for name in names if "step_" in name] == ["step_00000003"]
