"""Runs that were stopped, not evaluated, damaged or made by earlier versions are read, with notes on what they lack."""

import json
from pathlib import Path

import pytest
from run_records import UPDATES, change_document, evaluation, rows_of, write_rows, write_run

from peft_pretraining.commands.report.groups import group_runs
from peft_pretraining.commands.report.read import find_runs, load_run, read_run


def notes_of(folder):
    return " / ".join(read_run(folder).notes)


def test_a_finished_run_has_no_notes(tmp_path):
    run = read_run(write_run(tmp_path / "run", perplexity=31.5))
    assert run.notes == ()
    assert (run.status, run.final_perplexity, run.model, run.method, run.seed) == (
        "finished", 31.5, "llama_60m", "sltrain", 42,
    )  # fmt: skip


def test_paper_memory_equals_the_published_estimate(tmp_path):
    """For SLTrain at 60M the paper prints .26 G."""
    assert read_run(write_run(tmp_path / "run")).paper_memory == pytest.approx(0.26, abs=1e-9)


def test_paper_memory_counts_one_moment_of_muons_matrices(tmp_path):
    """Full-rank at 60M: 58.1M parameters of two bytes (.12 G), two moments of 32.8M and one of 25.3M (.18 G)."""
    run = read_run(write_run(tmp_path / "run", "--optimizer", "muon", method="full"))
    assert run.paper_memory == pytest.approx(0.12 + 0.18, abs=1e-9)


def test_unfinished_and_stopped_runs_have_a_note_and_no_final_perplexity(tmp_path):
    folder = write_run(tmp_path / "run", reached=4)
    write_rows(folder, [*rows_of(folder), evaluation(4, 80.0)])
    assert read_run(folder).final_perplexity is None
    assert "unfinished after update 4 of 10" in notes_of(folder)
    (folder / "stopped.json").write_text(json.dumps({"signal": "SIGTERM", "update_step": 4}))
    assert "stopped at update 4 of 10" in notes_of(folder)


def test_a_run_without_final_evaluation_has_a_note(tmp_path):
    folder = write_run(tmp_path / "run", perplexity=None)
    assert "no perplexity after its last update; the last evaluation was at update 0" in notes_of(folder)
    write_rows(folder, [row for row in rows_of(folder) if "loss" in row])
    run = read_run(folder)
    assert run.final_perplexity is None
    assert "never evaluated" in notes_of(folder)


def test_a_run_without_updates_has_a_note(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    assert "no update is logged yet" in notes_of(folder)


def test_a_record_of_an_earlier_version_is_reported_with_a_note(tmp_path):
    """The first versions recorded neither newer arguments nor the predicted peak nor measured memory."""
    folder = write_run(tmp_path / "run")

    def age(document):
        for name in ("document_mask", "linear_path", "per_layer", "galore_scale"):
            del document["arguments"][name]
        document["arguments"]["update_proj_gap"] = None
        for name in ("scratch", "runtime", "total", "peak"):
            del document["plan"]["bytes"][name]

    change_document(folder, age)
    write_rows(folder, [{k: v for k, v in row.items() if not k.startswith("memory_")} for row in rows_of(folder)])
    run = read_run(folder)
    assert "recorded by an earlier version: memory by class was not measured, nor the peak predicted" in notes_of(folder)
    assert run.arguments["per_layer"] is False
    assert run.predicted("parameters") == run.plan["bytes"]["parameters"]
    assert run.predicted("peak") is None
    assert run.measured("parameters") is None


def test_non_finite_losses_are_counted(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = rows_of(folder)
    rows[3] |= {"loss": None}
    rows[5] |= {"skipped_updates": 1}
    write_rows(folder, [*rows, evaluation(UPDATES, None)])
    assert "1 evaluations gave no finite perplexity" in notes_of(folder)
    assert "1 logged updates had a non-finite loss" in notes_of(folder)
    assert "1 updates were skipped" in notes_of(folder)


@pytest.mark.parametrize("value", [9, None])
def test_arguments_of_a_later_version_are_named(tmp_path, value):
    folder = write_run(tmp_path / "run")
    change_document(folder, lambda document: document["arguments"].update(warp_factor=value))
    assert "arguments that this version does not know: warp_factor" in notes_of(folder)
    assert len(group_runs([read_run(folder)])) == 1


def test_the_length_of_a_run_includes_updates_that_were_not_logged(tmp_path):
    """With --log_every 4: ten updates, the last logged one is the eighth; the evaluation at the end has the tokens."""
    folder = write_run(tmp_path / "run")
    rows = [row for row in rows_of(folder) if "loss" not in row or row["update_step"] % 4 == 0]
    rows[-1] |= {"tokens_seen": 10_000}
    write_rows(folder, rows)
    assert [read_run(folder).figures[name] for name in ("updates", "tokens")] == [10, 10_000]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"arguments": {}, "plan": null}'])
def test_a_damaged_run_json_is_refused_by_name(tmp_path, content):
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_run(folder)


@pytest.mark.parametrize(("name", "value"), [("update_step", "ten"), ("memory_support_measured", [1]), ("loss", {})])
def test_a_damaged_line_is_left_out_with_a_note(tmp_path, name, value, capsys):
    folder = write_run(tmp_path / "run")
    rows = rows_of(folder)
    write_rows(folder, [rows[0], {**rows[1], name: value}, *rows[2:]])
    run = read_run(folder)
    assert list(run.rows) == [rows[0], *rows[2:]]
    assert run.notes[0] == "metrics.jsonl: line 2 is damaged and left out"
    assert run.finished
    assert load_run(folder)[1] == list(run.rows)
    assert f"{folder}: metrics.jsonl: line 2 is damaged" in capsys.readouterr().err


def test_axes_count_tokens_and_training_time(tmp_path):
    """1,000 tokens per update at 500 tokens per second take 2 s; an evaluation has the position of its update."""
    run = read_run(write_run(tmp_path / "run"))
    assert run.axis("seconds") == ([2.0 * step for step in range(1, UPDATES + 1)], [0.0, 2.0 * UPDATES])
    assert run.axis("tokens")[1] == [0.0, 1_000.0 * UPDATES]
    assert run.axis("steps") == ([float(step) for step in range(1, UPDATES + 1)], [0.0, float(UPDATES)])


def test_an_evaluation_between_logged_updates_is_interpolated(tmp_path):
    """With --log_every 5 an evaluation after update 7 lies two fifths of the way from update 5 to 10."""
    folder = write_run(tmp_path / "run")
    rows = [row for row in rows_of(folder) if "loss" in row and row["update_step"] in (5, 10)]
    write_rows(folder, [*rows, evaluation(7, 50.0), evaluation(10, 40.0)])
    assert read_run(folder).axis("tokens")[1] == [7_000.0, 10_000.0]


def test_a_sweeps_report_among_its_runs_is_ignored(tmp_path):
    """The pattern runs/my-sweep/* includes the report's folder, which is not a run."""
    run, report = write_run(tmp_path / "a"), tmp_path / "report"
    report.mkdir()
    (report / "report.json").write_text("{}")
    assert find_runs([run, report]) == [run]
    with pytest.raises(ValueError, match=r"report: no run\.json"):
        find_runs([report])


def test_the_setting_without_options_comes_first_in_a_folder(tmp_path):
    """Without a full-rank run, others are compared with the first one."""
    names = ["s-lr0.1-seed1", "s-lr0.1-seed2", "s-lr0.1-initsvd-seed1", "s-lr0.1-rebalance-seed1"]
    runs = [write_run(tmp_path / name) for name in names]
    assert find_runs([tmp_path]) == runs


def test_a_folder_of_runs_means_its_runs(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "report").mkdir()
    assert find_runs([tmp_path]) == runs
    assert find_runs([tmp_path / "a", tmp_path]) == runs  # each once
    monkeypatch.chdir(tmp_path)
    assert [run.resolve() for run in find_runs([Path(".")])] == [run.resolve() for run in runs]
    (tmp_path / "a.log").touch()
    assert find_runs([tmp_path / "a", tmp_path / "a.log"]) == [tmp_path / "a"]  # as a* names them
    with pytest.raises(ValueError, match=r"a\.log"):
        find_runs([tmp_path / "a.log"])
    with pytest.raises(ValueError, match=r"report: no run\.json"):
        find_runs([tmp_path / "report"])
