"""A sweep skips finished runs, resumes unfinished ones, continues after failures, and stops on request."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from peft_pretraining.__main__ import main as command
from peft_pretraining.commands.sweep import parallel, runner

ROOT = Path(__file__).resolve().parents[3]
STUB = Path(__file__).resolve().parent / "stub_program.py"
BASE = {"model_config": str(ROOT / "configs/llama_demo.json"), "dataset": "demo", "batch_size": 4, "max_length": 64}
BASE |= {"num_training_steps": 4, "warmup_steps": 1}


@pytest.fixture
def stub(monkeypatch):
    """Replaces the program by a stub that takes milliseconds, and draws no figures."""
    monkeypatch.setattr(runner, "PROGRAM", STUB)
    monkeypatch.setattr("peft_pretraining.commands.report.figures.draw_all", lambda groups, out: {})


def write_sweep(tmp_path, settings, seeds=(42,), base=BASE):
    path = tmp_path / "sweep.yaml"
    values = {"folder": str(tmp_path / "runs"), "seeds": list(seeds), "base": base, "settings": settings}
    path.write_text(yaml.safe_dump(values))
    return path


def starts(tmp_path, inner="."):
    path = tmp_path / "runs" / inner / "starts.txt"
    return path.read_text().split() if path.exists() else []


def test_every_run_is_made_once_and_reported(tmp_path, stub, capfd):
    path = write_sweep(tmp_path, [{"lr": [0.1, 0.2]}], seeds=[1, 2])
    assert command(["sweep", str(path)]) == 0
    names = ["lr0.1-seed1", "lr0.2-seed1", "lr0.1-seed2", "lr0.2-seed2"]
    assert starts(tmp_path) == names
    report = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())
    assert [group["perplexity"]["n"] for group in report["groups"]] == [2, 2]
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    assert command(["sweep", str(path)]) == 0
    assert starts(tmp_path) == names  # nothing was started again
    assert capfd.readouterr().out.count("skipped") == 4


def write_search(tmp_path, settings, rounds, seeds=(42,)):
    path = write_sweep(tmp_path, settings, seeds)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"search": rounds}))
    return path


def test_the_best_of_each_round_go_on(tmp_path, stub, capfd):
    """The stub's perplexity is 20 + lr: of four rates two go on from the short runs, one from the long ones, with all seeds."""
    rounds = [{"num_training_steps": 2, "keep": 2}, {"keep": 1}]
    entries = [{"lr": [0.4, 0.1, 0.3, 0.2]}, {"lr": 0.5, "scheduler": "linear"}]
    path = write_search(tmp_path, entries, rounds, seeds=[1, 2])
    assert command(["sweep", str(path), "--dry_run"]) == 0
    assert "search, round 1 of 2: 4 runs: 4 not started" in capfd.readouterr().out
    assert command(["sweep", str(path)]) == 0
    assert starts(tmp_path, "search-1") == ["lr0.4-seed1", "lr0.1-seed1", "lr0.3-seed1", "lr0.2-seed1"]
    finals = ["lr0.1-seed1", "lr0.2-seed1", "lr0.5-schedulerlinear-seed1", "lr0.1-seed2", "lr0.5-schedulerlinear-seed2"]
    assert starts(tmp_path) == finals
    report = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())
    assert [group["perplexity"]["n"] for group in report["groups"]] == [2, 2]
    table = (tmp_path / "runs" / "report" / "search.md").read_text()
    assert "| lr0.2-seed1 | 20.20 | yes |" in table
    assert "| lr0.4-seed1 | 20.40 |  |" in table
    assert "| full | adam | 6 | 16 | 4.0 |" in table  # four of two updates, two of four
    assert command(["sweep", str(path)]) == 0
    assert starts(tmp_path) == finals  # nothing was started again


def test_a_setting_with_lower_rates_that_wins_a_round_goes_on(tmp_path, stub):
    """The stub's perplexity is 20 + lr, so half of the best rate wins; of the second best none is tried."""
    rounds = [{"num_training_steps": 2, "keep": 2}, {"keep": 1, "lr_factors": [0.5]}]
    assert command(["sweep", str(write_search(tmp_path, [{"lr": [0.4, 0.2, 0.6]}], rounds, seeds=[1, 2]))]) == 0
    assert starts(tmp_path, "search-1") == ["lr0.4-seed1", "lr0.2-seed1", "lr0.6-seed1"]
    assert starts(tmp_path) == ["lr0.2-seed1", "lr0.4-seed1", "lr0.1-seed1", "lr0.1-seed2"]
    assert "| full | adam | 6 | 18 | 4.5 |" in (tmp_path / "runs" / "report" / "search.md").read_text()


def test_a_round_that_keeps_all_is_run_if_a_later_one_needs_the_best(tmp_path, stub):
    rounds = [{"num_training_steps": 2, "keep": 2}, {"keep": 1, "lr_factors": [0.5]}]
    entries = [{"lr": [0.4, 0.3]}, {"lr": 0.8, "scheduler": "linear"}]
    assert command(["sweep", str(write_search(tmp_path, entries, rounds))]) == 0
    assert starts(tmp_path, "search-1") == ["lr0.4-seed42", "lr0.3-seed42"]
    assert "lr0.15-seed42" in starts(tmp_path)
    assert "lr0.2-seed42" not in starts(tmp_path)
    assert "lr0.4-schedulerlinear-seed42" in starts(tmp_path)


def test_all_rounds_start_from_the_same_full_rank_run(tmp_path, stub):
    """A round's flags do not change the full-rank run, so it is made once, not once per round."""
    entry = {"peft_model": "relora", "relora": 2, "lr": [0.1, 0.2, 0.3], "warm_up": {"lr": 0.5, "num_training_steps": 1}}
    rounds = [{"num_training_steps": 2, "keep": 2}, {"num_training_steps": 3, "keep": 1}]
    assert command(["sweep", str(write_search(tmp_path, [entry], rounds, seeds=[1, 2]))]) == 0
    made = [(path.parent.relative_to(tmp_path / "runs"), path.read_text().split()) for path in tmp_path.rglob("starts.txt")]
    assert {str(folder): len(runs) for folder, runs in made} == {"search-1": 3, "search-2": 2, "warm_up": 2, ".": 2}
    assert starts(tmp_path, "warm_up") == ["lr0.5-num_training_steps1-seed1", "lr0.5-num_training_steps1-seed2"]
    # Three of two updates and two of three, less the one that each has from the full-rank run, which is made once.
    assert "| relora | adam | 5 | 8 |" in (tmp_path / "runs" / "report" / "search.md").read_text()


def test_a_warm_up_whose_checkpoints_are_gone_is_named(tmp_path, stub, capfd):
    """Its record says that it is finished, so it would be skipped, and the runs that start from it would fail one by one."""
    entry = {"peft_model": "relora", "relora": 2, "lr": [0.1, 0.2], "warm_up": {"lr": 0.5, "num_training_steps": 1}}
    path = write_sweep(tmp_path, [entry])
    assert command(["sweep", str(path)]) == 0
    (warm_up,) = (path.parent for path in (tmp_path / "runs" / "warm_up").rglob("run.json"))
    shutil.rmtree(next(warm_up.glob("step_*")))
    finished = sorted((tmp_path / "runs").glob("relora-*lr0.1*"))
    for folder in finished:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    capfd.readouterr()
    assert command(["sweep", str(path)]) == 1
    out = capfd.readouterr().out
    assert f"{warm_up}, whose checkpoints are gone; remove that folder" in out
    shutil.rmtree(warm_up)
    assert command(["sweep", str(path)]) == 0


def test_a_round_with_a_failed_run_is_made_to_its_end_and_chooses_nothing(tmp_path, stub, capfd):
    path = write_search(tmp_path, [{"weight_decay": [1, 0, 0.5]}], [{"num_training_steps": 2, "keep": 1}])
    assert command(["sweep", str(path)]) == 1
    assert len(starts(tmp_path, "search-1")) == 3
    assert starts(tmp_path) == []
    assert "1 of 3 runs failed; the next round needs them" in capfd.readouterr().out


def test_a_diverged_run_is_the_last_of_its_round(tmp_path, stub):
    path = write_search(tmp_path, [{"weight_decay": [4, 0]}], [{"num_training_steps": 2, "keep": 1}])
    assert command(["sweep", str(path)]) == 0
    assert starts(tmp_path) == ["weight_decay0-seed42"]


def test_a_run_is_known_again_by_the_order_that_its_data_has(tmp_path, stub, capfd):
    """The stub's records name no order, as those of earlier versions: their data had the order by lanes."""
    plain = write_sweep(tmp_path, [{"weight_decay": 0}])
    assert command(["sweep", str(plain)]) == 0
    for order, said in (("lanes", "finished, perplexity"), ("global", "was made with data_order lanes (now global)")):
        text = yaml.safe_load(plain.read_text())
        text["base"]["data_order"] = order
        (tmp_path / f"{order}.yaml").write_text(yaml.safe_dump(text))
        command(["sweep", str(tmp_path / f"{order}.yaml"), "--dry_run"])
        assert said in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "runs/other"}, "was made with dataset demo (now runs/other)"),
        ({"tokenizer": "t5-base"}, "was made with tokenizer None (now t5-base)"),
        ({"model_config": str(ROOT / "configs/llama_9m.json")}, "a model whose hidden_size is 256 (now 128)"),
    ],
)
def test_a_run_on_other_data_or_of_another_model_is_not_the_sweeps_own(tmp_path, stub, capfd, changes, said):
    path = write_sweep(tmp_path, [{"weight_decay": 0}])
    assert command(["sweep", str(path)]) == 0
    link = tmp_path / "demo.json"
    link.symlink_to(BASE["model_config"])
    write_sweep(tmp_path, [{"weight_decay": 0}], base=BASE | {"model_config": str(link)})
    assert command(["sweep", str(path), "--dry_run"]) == 0
    assert "finished, perplexity" in capfd.readouterr().out  # the same model at another path
    write_sweep(tmp_path, [{"weight_decay": 0}], base=BASE | changes)
    assert command(["sweep", str(path)]) == 1
    assert said in capfd.readouterr().out


def test_a_failure_after_a_stop_is_no_stop(tmp_path, stub, capfd):
    """The marker of the stop is still there if the program fails before it removes it."""
    path = write_sweep(tmp_path, [{"weight_decay": [1, 0]}])
    marker = tmp_path / "runs" / "weight_decay1-seed42" / "stopped.json"
    marker.parent.mkdir(parents=True)
    marker.write_text('{"update_step": 1}')
    assert command(["sweep", str(path)]) == 1
    assert "failed: weight_decay1-seed42: exit code 1: stub: error: asked to fail" in capfd.readouterr().out
    assert starts(tmp_path) == ["weight_decay1-seed42", "weight_decay0-seed42"]


def test_no_two_runs_are_recorded_under_one_id_or_name(tmp_path, stub, capfd, monkeypatch):
    """wandb reads both from the environment, which the runs of a sweep share."""
    seen = []
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_NAME", "my-run")
    monkeypatch.setattr(runner.Stopping, "run", lambda *_: seen.append({"WANDB_RUN_ID", "WANDB_NAME"} & set(os.environ)) or 1)
    assert command(["sweep", str(write_sweep(tmp_path, [{"weight_decay": 0}], seeds=(1, 2)))]) == 1
    assert seen == [set(), set()]
    assert "WANDB_RUN_ID=mine has no effect: it names one run, and a sweep has several" in capfd.readouterr().err


def test_a_failed_run_does_not_end_the_sweep(tmp_path, stub, capfd):
    path = write_sweep(tmp_path, [{"weight_decay": [0, 1, 0.5]}])
    assert command(["sweep", str(path)]) == 1
    assert len(starts(tmp_path)) == 3
    printed = capfd.readouterr().out
    assert "failed: weight_decay1-seed42: exit code 1: stub: error: asked to fail" in printed
    assert "1 of 3 runs failed" in printed
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    assert command(["sweep", str(path)]) == 1  # only the failed run is started again
    assert starts(tmp_path)[3:] == ["weight_decay1-seed42"]


def test_a_killed_run_is_resumed_by_the_next_sweep(tmp_path, stub, capfd):
    path = write_sweep(tmp_path, [{"weight_decay": [3, 0]}])
    assert command(["sweep", str(path)]) == 1
    assert "killed by SIGKILL" in capfd.readouterr().out
    assert command(["sweep", str(path), "--dry_run"]) == 0
    assert "unfinished after update 2 of 4: continues from its newest checkpoint" in capfd.readouterr().out
    assert command(["sweep", str(path)]) == 0
    assert starts(tmp_path) == ["weight_decay3-seed42", "weight_decay0-seed42", "weight_decay3-seed42"]


def test_no_run_starts_from_an_unfinished_one(tmp_path, stub, capfd):
    """A run that starts from an unfinished warm-up could not be distinguished from the others."""
    entry = {"peft_model": "relora", "relora": 2, "lr": 0.1, "warm_up": {"weight_decay": 3, "num_training_steps": 2}}
    path = write_sweep(tmp_path, [entry, {"peft_model": "full"}])
    assert command(["sweep", str(path)]) == 1
    printed = capfd.readouterr().out
    warm = "num_training_steps2-weight_decay3-seed42"
    assert f"it starts from warm_up/{warm}, which did not finish" in printed
    assert "2 of 3 runs failed" in printed
    assert starts(tmp_path) == ["full-seed42"]
    assert command(["sweep", str(path)]) == 0  # the stub finishes it at the second start
    relora = "relora-lr0.1-relora2-warm_up-num_training_steps2-weight_decay3-seed42"
    assert starts(tmp_path) == ["full-seed42", relora]
    assert starts(tmp_path, "warm_up") == [warm] * 2
    report = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())
    assert sorted(group["method"] for group in report["groups"]) == ["full", "relora"]


def test_no_run_starts_from_non_finite_weights(tmp_path, stub, capfd):
    entry = {"peft_model": "relora", "relora": 2, "warm_up": {"weight_decay": 4, "num_training_steps": 2}}
    path = write_sweep(tmp_path, [entry])
    for _ in range(2):
        assert command(["sweep", str(path)]) == 1
        assert "which has no finite perplexity" in capfd.readouterr().out
    assert starts(tmp_path) == []
    assert len(starts(tmp_path, "warm_up")) == 1


def test_a_full_rank_run_is_made_only_if_needed(tmp_path, stub, capfd):
    """A full-rank run is not needed once all runs that start from it are finished, for any spelling of the sweep's folder."""
    path = write_sweep(tmp_path, [{"peft_model": "relora", "relora": 2, "warm_up": {"num_training_steps": 2}}])
    assert command(["sweep", str(path)]) == 0
    made = starts(tmp_path)
    shutil.rmtree(tmp_path / "runs" / "warm_up")
    capfd.readouterr()
    for folder in (tmp_path / "runs", tmp_path / "runs" / ".." / "runs"):
        values = yaml.safe_load(path.read_text()) | {"folder": str(folder)}
        path.write_text(yaml.safe_dump(values))
        assert command(["sweep", str(path)]) == 0
        assert capfd.readouterr().out.count("skipped") == 2
    assert starts(tmp_path) == made
    assert starts(tmp_path, "warm_up") == []


def test_a_run_with_a_non_finite_perplexity_counts_as_finished(tmp_path, stub, capfd):
    """For example with a much too high learning rate: it is not started again, and the report has a note."""
    path = write_sweep(tmp_path, [{"weight_decay": [0, 4]}])
    assert command(["sweep", str(path)]) == 0
    printed = capfd.readouterr().out
    assert "weight_decay4-seed42: finished with a non-finite perplexity" in printed
    assert "1 evaluations gave no finite perplexity" in printed
    assert command(["sweep", str(path)]) == 0
    assert starts(tmp_path) == ["weight_decay0-seed42", "weight_decay4-seed42"]


def test_a_folder_made_with_other_arguments_is_not_changed(tmp_path, stub, capfd):
    """The folder's name has only lr 0.1, but the base changed; resuming would mix two settings."""
    settings = [{"lr": 0.1}]
    assert command(["sweep", str(write_sweep(tmp_path, settings))]) == 0
    path = write_sweep(tmp_path, settings, base={**BASE, "num_training_steps": 6, "total_batch_size": 8})
    assert command(["sweep", str(path)]) == 1
    printed = capfd.readouterr().out
    assert "num_training_steps 4 (now 6)" in printed
    assert "total_batch_size 4 (now 8)" in printed
    assert starts(tmp_path) == ["lr0.1-seed42"]


def test_runs_that_started_from_another_folder_are_not_changed(tmp_path, stub, capfd):
    """If the file names the full-rank run, its folder is part of the setting."""
    settings = [{"peft_model": "relora", "relora": 2}]
    for name, expected in (("one", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        path = write_sweep(tmp_path, settings, base={**BASE, "warmed_up_model": str(tmp_path / name)})
        assert command(["sweep", str(path)]) == expected
    assert f"was made with warmed_up_model {tmp_path / 'one'} (now {tmp_path / 'other'})" in capfd.readouterr().out
    assert len(starts(tmp_path)) == 1


def test_a_dry_run_of_a_sweep_starts_nothing(tmp_path, stub, capfd):
    path = write_sweep(tmp_path, [{"lr": [0.1, 0.2]}])
    assert command(["sweep", str(path), "--dry_run"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("2 runs: 2 not started")
    assert "--lr=0.2" in printed
    assert not (tmp_path / "runs").exists()


def test_a_sweep_with_an_invalid_run_starts_nothing(tmp_path, stub, capfd):
    assert command(["sweep", str(write_sweep(tmp_path, [{"lr": [0.1, -1]}]))]) == 2
    assert "--lr -1.0: must be above 0" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_runs_at_a_time_overlap_and_a_failed_one_does_not_end_the_others(tmp_path, stub, capfd):
    """Each of the first two runs waits until both have begun."""
    path = write_sweep(tmp_path, [{"weight_decay": 5, "lr": [0.1, 0.2]}, {"weight_decay": [1, 0]}], seeds=[1])
    assert command(["sweep", str(path), "--parallel_runs", "0"]) == 2
    assert "--parallel_runs 0: must be at least 1" in capfd.readouterr().err
    assert command(["sweep", str(path), "--parallel_runs", "2"]) == 1
    printed = capfd.readouterr().out
    names = ["lr0.1-weight_decay5-seed1", "lr0.2-weight_decay5-seed1", "weight_decay1-seed1", "weight_decay0-seed1"]
    assert sorted(starts(tmp_path)) == sorted(names)
    assert "1 of 4 runs failed" in printed
    # The last two end in either order, and a run that is not the last tells the time left.
    assert re.search(r"\[4/4\] weight_decay0-seed1: finished, perplexity 20\.00(; about 1 min left)?\n", printed)
    assert re.search(r"weight_decay5-seed1: finished, perplexity 20\.\d+; about 1 min left", printed)
    report = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())
    assert len(report["groups"]) == 3


def test_runs_at_a_time_wait_for_the_run_that_they_start_from(tmp_path, stub, capfd):
    """The first entry's warm-up is killed, so its run is not started; the second entry's follows its own."""
    warm_ups = [{"weight_decay": 3, "num_training_steps": 2}, {"num_training_steps": 2}]
    path = write_sweep(tmp_path, [{"peft_model": "relora", "relora": 2, "warm_up": warm_up} for warm_up in warm_ups])
    assert command(["sweep", str(path), "--parallel_runs", "4"]) == 1
    printed = capfd.readouterr().out
    assert printed.count("which did not finish") == 2  # when it happens and at the end
    (made,) = starts(tmp_path)
    assert made == "relora-relora2-warm_up-num_training_steps2-seed42"
    begun = printed.index(f"{made}: not started; output in")
    assert printed.index("warm_up/num_training_steps2-seed42: finished") < begun
    assert len(starts(tmp_path, "warm_up")) == 2


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_a_run_whose_log_cannot_be_written_fails_and_the_others_are_made(tmp_path, stub, capfd, at_a_time):
    path = write_sweep(tmp_path, [{"lr": [0.1, 0.2, 0.3]}])
    (tmp_path / "runs" / "lr0.1-seed42.log").mkdir(parents=True)
    assert command(["sweep", str(path), "--parallel_runs", str(at_a_time)]) == 1
    assert "failed: lr0.1-seed42: could not be started: [Errno 21] Is a directory" in capfd.readouterr().out
    assert sorted(starts(tmp_path)) == ["lr0.2-seed42", "lr0.3-seed42"]


def test_rounds_of_a_search_run_several_at_a_time(tmp_path, stub, capfd):
    path = write_search(tmp_path, [{"lr": [0.3, 0.1, 0.2]}], [{"num_training_steps": 2, "keep": 2}, {"keep": 1}])
    assert command(["sweep", str(path), "--parallel_runs", "3"]) == 0
    assert sorted(starts(tmp_path, "search-1")) == ["lr0.1-seed42", "lr0.2-seed42", "lr0.3-seed42"]
    assert sorted(starts(tmp_path)) == ["lr0.1-seed42", "lr0.2-seed42"]


def test_every_run_has_its_gpus_or_its_share_of_the_cores(tmp_path, monkeypatch):
    planned = [SimpleNamespace(args=SimpleNamespace(device="auto"))] * 4
    on_cpu = [SimpleNamespace(args=SimpleNamespace(device="cpu"))]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert parallel.run_environments(1, 1, planned) == ([{}], None)
    assert parallel.run_environments(3, 2, planned) == ([{"OMP_NUM_THREADS": "2"}] * 3, None)
    assert parallel.run_environments(20, 1, planned) == ([{"OMP_NUM_THREADS": "1"}] * 20, None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)

    def gpus(*arguments):
        environments, notice = parallel.run_environments(*arguments)
        return [environment["CUDA_VISIBLE_DEVICES"] for environment in environments], notice is not None

    assert gpus(3, 1, planned) == (["0", "1", "2"], False)
    assert gpus(2, 2, planned) == (["0,1", "2,3"], False)
    assert gpus(5, 1, planned) == (["0", "1", "2", "3", "0"], True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert gpus(2, 2, planned) == (["7,5", "3,1"], False)
    assert parallel.run_environments(2, 1, on_cpu) == ([{"OMP_NUM_THREADS": "6"}] * 2, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert parallel.run_environments(2, 1, on_cpu) == ([{}] * 2, None)


def test_the_time_left_follows_from_the_work_left():
    left = parallel.TimeLeft(num_runs=2)
    assert left.text([5.0], {}) == ""  # nothing is known yet
    left.add(work=100.0, seconds=3600.0)
    # 200 s for each of three runs that wait, 100 s of another: 700 s for two at a time.
    assert left.text([50 / 9] * 3, {"a": (50 / 9, 100.0)}) == "; about 6 min left"
    assert left.text([], {"a": (300.0, 0.0)}) == "; about 3 h 0 min left"
    assert left.text([], {}) == ""


SWEEP = (
    "import sys; from pathlib import Path; from peft_pretraining.commands.sweep import runner; "
    "runner.PROGRAM = Path(sys.argv[1]); "
    "from peft_pretraining.__main__ import main; sys.exit(main(['sweep', *sys.argv[2:]]))"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_stops_the_run_and_the_sweep(tmp_path, number):
    """The current run gets the same signal, no other is started, and the message has the command to resume."""
    path = write_sweep(tmp_path, [{"weight_decay": [2, 0]}])
    sweep = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(STUB), str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    record = tmp_path / "runs" / "weight_decay2-seed42" / "metrics.jsonl"
    while not record.exists() and sweep.poll() is None:
        time.sleep(0.05)
    sweep.send_signal(number)
    printed, _ = sweep.communicate()
    assert sweep.returncode == 130
    assert "0 of 2 runs are finished" in printed
    assert "The same command continues" in printed
    assert starts(tmp_path) == ["weight_decay2-seed42"]


def test_a_signal_stops_all_runs_at_a_time_and_the_sweep_continues_later(tmp_path, stub):
    path = write_sweep(tmp_path, [{"weight_decay": 2, "lr": [0.1, 0.2, 0.3]}])
    sweep = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(STUB), str(path), "--parallel_runs", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    records = [tmp_path / "runs" / f"lr{lr}-weight_decay2-seed42" / "metrics.jsonl" for lr in (0.1, 0.2)]
    while not all(record.exists() for record in records) and sweep.poll() is None:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    printed, _ = sweep.communicate()
    assert sweep.returncode == 130
    assert "0 of 3 runs are finished" in printed
    assert printed.rstrip().endswith("The same command continues.")
    assert len(starts(tmp_path)) == 2
    for record in records:
        assert list(record.parent.glob("step_*"))
    values = yaml.safe_load(path.read_text()) | {"settings": [{"weight_decay": 2, "lr": [0.1, 0.2]}]}
    path.write_text(yaml.safe_dump(values))
    assert command(["sweep", str(path), "--parallel_runs", "2"]) == 0  # the stub finishes what it resumes
    assert len(starts(tmp_path)) == 4


def test_a_sweep_leaves_an_ignored_hangup_ignored():
    """nohup: it would otherwise end every run that the terminal's end reaches."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runner.Stopping().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_sweep_goes_on_without_a_terminal(tmp_path, stub, monkeypatch):
    """The second run is made and the report is written, though nothing can be printed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert command(["sweep", str(write_sweep(tmp_path, [{"lr": [0.1, 0.2]}]))]) == 0
    assert starts(tmp_path) == ["lr0.1-seed42", "lr0.2-seed42"]
    assert (tmp_path / "runs" / "report" / "report.html").is_file()


def test_the_sweep_script_works_from_any_folder(tmp_path):
    path = write_sweep(tmp_path, [{"lr": [0.1, 0.2]}])
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "sweep.sh"), path.name, "--dry_run"],
        cwd=tmp_path,
        env={**os.environ, "SLTRAIN_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 runs: 2 not started" in ended.stdout


def losses(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], rows[-1].get("final_eval_loss")


def test_a_sweep_runs_and_resumes_the_real_program(tmp_path, tiny_run, capfd):
    """Two tiny runs of torchrun_main.py, one of which fails; without its last checkpoint, a run resumes from the previous one."""
    base = {flag.removeprefix("--"): value for flag, value in zip(tiny_run[::2], tiny_run[1::2], strict=True)}
    base |= {"batch_size": 4, "max_length": 64, "num_training_steps": 4, "warmup_steps": 1, "save_every": 2, "rank": 8}
    base |= {"wandb": "disabled", "device": "cpu", "workers": 0, "eval_every": 4, "sp_ratio": 0.1, "lora_alpha": 2}
    missing = tmp_path / "no-data"
    missing.mkdir()
    path = write_sweep(tmp_path, [{"peft_model": "sltrain"}, {"peft_model": "full", "eval_dataset": str(missing)}], base=base)
    assert command(["sweep", str(path)]) == 1
    printed = capfd.readouterr().out
    assert "failed: full" in printed
    assert "no-data" in printed
    run = tmp_path / "runs" / "sltrain-seed42"
    first = losses(run / "metrics.jsonl")
    assert len(first[0]) == 4
    shutil.rmtree(run / "step_00000004")
    kept = (run / "metrics.jsonl").read_text().splitlines()[:3]  # updates 1 to 3, as if killed in the fourth
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    path = write_sweep(tmp_path, [{"peft_model": "sltrain"}], base=base)
    assert command(["sweep", str(path)]) == 0
    assert losses(run / "metrics.jsonl") == first


def test_a_sweep_starts_the_real_program_from_a_full_rank_run(tmp_path, tiny_run, capfd):
    base = {flag.removeprefix("--"): value for flag, value in zip(tiny_run[::2], tiny_run[1::2], strict=True)}
    base |= {"batch_size": 4, "max_length": 64, "num_training_steps": 2, "warmup_steps": 1, "rank": 8, "lora_alpha": 2}
    base |= {"wandb": "disabled", "device": "cpu", "workers": 0, "eval_every": 2}
    entry = {"peft_model": "relora", "relora": 2, "num_training_steps": 4, "warm_up": {"lr": 0.01}}
    path = write_sweep(tmp_path, [entry], base=base)
    assert command(["sweep", str(path)]) == 0
    assert "2/2" in capfd.readouterr().out
    (relora,) = (tmp_path / "runs").glob("relora-*-seed42")
    (warm,) = (tmp_path / "runs").glob("warm_up/lr0.01-seed42")
    both = losses(relora / "metrics.jsonl")[0]
    assert len(both) == 4
    assert both[:2] == losses(warm / "metrics.jsonl")[0]
    assert command(["sweep", str(path)]) == 0
    assert capfd.readouterr().out.count("skipped") == 2
