"""Two programs never train into one folder at the same time."""

import signal
import subprocess
import sys
from pathlib import Path

from tiny_runs import flags_of

import torchrun_main
from peft_pretraining.run.folder_lock import LOCK_FILE

HOLDER = """
import sys, time
from pathlib import Path
from peft_pretraining.run.folder_lock import lock_folder
lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_a_folder_in_which_another_process_trains_is_refused_until_that_one_ends(tiny_run, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*flags_of("full", tiny_run), "--save_dir", str(folder)]
    assert torchrun_main.main(flags) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK_FILE}
    # A notebook's process goes on after a run, and does not keep the folder.
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=Path(torchrun_main.__file__).parent, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        capsys.readouterr()
        assert torchrun_main.main([*flags, "--num_training_steps", "12", "--allow_changes", "num_training_steps"]) == 2
        message = capsys.readouterr().err
        holder.send_signal(signal.SIGKILL)
    assert f"{folder}: process {holder.pid} on " in message
    assert "--save_dir" in message
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK_FILE}
    assert torchrun_main.main(flags) == 0


def test_never_resuming_takes_another_folder_only_if_this_one_holds_more_than_a_lock(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).touch()
    flags = [*flags_of("full", tiny_run), "--save_dir", str(tmp_path / "run"), "--resume", "never"]
    assert torchrun_main.main(flags) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
