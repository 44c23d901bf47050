"""benchmarks/on_gpu.py: every section runs on a CPU, and one that hangs, crashes or lacks a package costs itself only.

Sections run in this process, because starting one for each would take longer than all of them; how the command starts and ends
processes is tested with programs that do nothing else.
"""

import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Run = Callable[..., tuple[int, dict]]


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Makes the benchmarks' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def on_gpu() -> ModuleType:
    import on_gpu

    return on_gpu


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("on_gpu")


@pytest.fixture
def run(on_gpu, out, tiny_run, monkeypatch) -> Run:
    """Returns run(section, *more), which runs a section in this process and returns exit code and file."""
    monkeypatch.chdir(Path.cwd())  # sections change the folder
    tokenizer, data = tiny_run[3], tiny_run[5]

    def section(name: str, *more: str, folder: Path = out) -> tuple[int, dict]:
        words = ["--out", str(folder), "--section", name, "--seconds", "3600", "--device", "cpu", "--tiny"]
        code = on_gpu.main([*words, "--dataset", data, "--tokenizer", tokenizer, *more])
        return code, json.loads((folder / f"{name}.json").read_text())

    return section


SECTIONS = ("env", "gate", "ceilings", "layers", "updates", "memory", "learn")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_measures_all_its_steps_on_a_cpu(run, name):
    """Only the Triton kernels, which need a GPU, and packages that are not installed may be left out."""
    code, content = run(name)
    assert (code, content["state"], content["running"]) == (0, "done", None)
    assert content["rows"]
    assert [row for row in content["rows"] if "error" in row] == []
    for row in content["rows"]:
        assert "skipped" not in row or "Triton kernels" in row["skipped"] or "cannot be imported" in row["skipped"], row
    assert content["versions"]["torch"] == torch.__version__


def test_the_tables_hold_every_section_and_say_that_they_are_a_test(run, out, capsys):
    import gpu_tables

    for name in SECTIONS:
        if not (out / f"{name}.json").exists():
            run(name)
    capsys.readouterr()
    assert gpu_tables.main([str(out)]) == 0
    text = capsys.readouterr().out
    titles = ["Predicted and measured", "Correctness", "Limits of the card", "Linears", "Updates", "Learning"]
    titles += ["7B"] if importlib.util.find_spec("bitsandbytes") else []
    assert [title for title in titles if f"## {title}\n" not in text] == []
    assert "The figures mean nothing" in text
    assert "| launches of nn.Linear, forward | 1 | 1 |" in text
    assert "| context | 0.50 GB | not measured |" in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len({table.count("\n") for table in tables}) > 1
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables), columns


def test_every_case_that_a_prediction_names_is_measured():
    """A prediction's case is spelled as the row's name; a misspelled one would be "not measured" for ever."""
    import gpu_tables
    from gpu.updates import cases

    names, asked = {case.name for case in cases()} | {"350m loss"}, set()

    class Asking(gpu_tables.Results):
        def __init__(self):
            self.contents = {}

        def update(self, name, *keys):
            asked.add(name)

    for prediction in gpu_tables.PREDICTIONS:
        assert prediction.measured(Asking()) is None
    assert asked
    assert asked <= names


def test_tables_of_a_section_that_was_killed_show_what_it_had_measured(tmp_path, capsys):
    import gpu_tables

    rows = [
        {"name": "copy", "seconds": 1e-3, "seconds_replayed": 5e-4, "bytes_per_second": 3e12},
        {"name": "product", "seconds": 1.0},
    ]
    content = {"section": "ceilings", "state": "killed at its deadline", "running": "product", "rows": rows}
    (tmp_path / "ceilings.json").write_text(json.dumps(content))
    assert gpu_tables.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| copy | 1000.0 | 500.0 | 3.00 |  |" in text
    assert "- ceilings, product: not finished (killed at its deadline)" in text
    assert gpu_tables.main([str(tmp_path / "missing")]) == 2
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda y: y * 1.02, lambda y: y * torch.nan], ids=["2 %", "nan"])
def test_a_wrong_result_ends_the_gate(run, tmp_path, monkeypatch, damage):
    from gpu import gate

    original = gate.dense_reference
    monkeypatch.setattr(gate, "dense_reference", lambda *arguments: damage(original(*arguments)))
    code, content = run("gate", folder=tmp_path)
    assert (code, content["state"]) == (3, "wrong numbers")
    assert "above 0.01" in content["rows"][-1]["error"]
    assert "pytest -m gpu" not in [row["name"] for row in content["rows"]]


def test_the_gate_runs_every_file_with_tests_for_a_gpu(request):
    """Among the tests of this session, those that are marked, also by the fixture `device`."""
    from gpu.gate import files_with_gpu_tests

    files = files_with_gpu_tests()
    marked = {item.path for item in request.session.items if item.get_closest_marker("gpu")}
    assert marked <= set(files)
    assert {"test_steps_on_devices.py", "test_fsdp_on_one_device.py"} <= {path.name for path in files}
    assert [path.name for path in files if "kernels" in path.name] == [path.name for path in files][-1:]


def test_tests_that_do_not_end_in_time_leave_the_outcomes_so_far():
    from gpu.gate import outcomes_so_far

    output = "a.py::test_one PASSED [ 1%]\na.py::test_two[x y] FAILED [ 2%]\nb.py::test_three SKIPPED (no) [ 3%]\nb.py::test_four"
    found = outcomes_so_far(output)
    assert [found[f"num_{kind}"] for kind in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert found["failures"] == [{"test": "a.py::test_two[x y]", "message": "", "text": ""}]


def test_a_missing_package_is_named_and_the_next_step_runs(tmp_path, monkeypatch):
    from gpu.env import imported
    from gpu.record import Record

    monkeypatch.setitem(sys.modules, "torchao", None)
    record = Record(tmp_path / "env.json", "env", 60.0, {})
    assert record.step("torchao", lambda: imported("torchao"))["skipped"] == "torchao is not installed"
    assert record.step("next", lambda: {"value": 1})["value"] == 1


def test_a_step_that_fails_keeps_what_it_had_measured_and_its_message(tmp_path):
    from gpu.record import Record

    def measure():
        yield {"seconds": 2.5}
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    record = Record(tmp_path / "updates.json", "updates", 60.0, {"device": "none"})
    row = record.step("first", measure)
    assert (row["seconds"], row["error"]) == (2.5, "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB")
    written = json.loads((tmp_path / "updates.json").read_text())
    assert written["rows"][0]["seconds"] == 2.5
    assert (written["device"], written["state"]) == ("none", "running")


def test_an_illegal_access_ends_the_section_because_every_later_step_would_fail(tmp_path):
    from gpu.record import Record

    def measure():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    record = Record(tmp_path / "updates.json", "updates", 60.0, {})
    with pytest.raises(RuntimeError):
        record.step("first", measure)
    assert "illegal memory" in json.loads((tmp_path / "updates.json").read_text())["rows"][0]["error"]


def test_no_step_begins_that_may_not_end_in_time(tmp_path, monkeypatch):
    from gpu import record as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    record = module.Record(tmp_path / "updates.json", "updates", 10.0, {})

    def takes(seconds):
        clock[0] += seconds
        return {}

    assert "skipped" not in record.step("first", lambda: takes(4))
    assert "skipped" not in record.step("second", lambda: takes(3))
    assert record.step("third", lambda: takes(1))["skipped"] == "no time left"


# --- The command's processes: programs that do one thing instead of sections ---

WRITES = """
import json, sys
with open(sys.argv[1], "w") as file:
    json.dump({"section": "any", "state": "done", "rows": [{"name": "first"}]}, file)
"""
CRASHES = "import os, signal\nprint('before the end', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)"
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10000)"])
pathlib.Path(sys.argv[1] + ".child").write_text(str(child.pid))
time.sleep(10000)
"""
FINDS_WRONG_NUMBERS = "import sys\nsys.exit(3)"


@pytest.fixture
def command(on_gpu, tmp_path, monkeypatch) -> Callable[..., int]:
    """Returns command(programs, minutes), which runs the command with these programs as its sections; returns the exit code."""

    def start(programs: dict[str, str], minutes: float = 10.0) -> int:
        def words(name, args, seconds):
            return [sys.executable, "-c", programs[name], str(args.out / f"{name}.json")]

        monkeypatch.setattr(on_gpu, "command", words)
        sections = ["--sections", *programs, "--minutes", str(minutes)]
        return on_gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--tiny", *sections])

    return start


def states(folder: Path) -> dict[str, str]:
    return {path.stem: json.loads(path.read_text())["state"] for path in (folder / "out").glob("*.json")}


def test_a_section_that_crashes_costs_itself_only(command, tmp_path, capsys):
    assert command({"env": WRITES, "ceilings": CRASHES, "layers": WRITES}) == 1
    assert states(tmp_path) == {"env": "done", "ceilings": "ended by signal 11", "layers": "done"}
    assert "before the end" in json.loads((tmp_path / "out" / "ceilings.json").read_text())["output"]
    assert "== ceilings: ended by signal 11" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "env.json").read_text())["command"][:2] == ["benchmarks/on_gpu.py", "--out"]
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def runs(pid: int) -> bool:
    """Tells whether a process exists and has not ended."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_section_that_hangs_is_killed_with_its_processes_and_keeps_its_rows(on_gpu, command, tmp_path, monkeypatch):
    """The deadline is when it has started a process of its own, however slow the machine is."""
    folder = tmp_path / "out"
    folder.mkdir()
    rows = {"section": "ceilings", "state": "running", "running": "second", "rows": [{"name": "first"}]}
    (folder / "ceilings.json").write_text(json.dumps(rows))
    noted = folder / "ceilings.json.child"
    original = on_gpu.subprocess.Popen.wait

    def wait(process, timeout=None):
        if timeout is None or timeout == 5:
            return original(process, timeout)
        while process.poll() is None and not (noted.exists() and noted.read_text()):
            time.sleep(0.01)
        return original(process, 0.01)

    monkeypatch.setattr(on_gpu.subprocess.Popen, "wait", wait)
    assert command({"ceilings": HANGS}) == 1
    child = int(noted.read_text())
    # The system removes a killed process in a moment; one that was not killed would sleep for hours.
    for _ in range(6000):
        if not runs(child):
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the process that the section had started still runs")
    content = json.loads((folder / "ceilings.json").read_text())
    assert content["state"] == "killed at its deadline"
    assert content["rows"] == [{"name": "first"}]
    assert content["running"] == "second"


def test_a_sections_process_understands_its_command_line(on_gpu, tmp_path):
    """For every section the words and their meaning; one is run as the command runs it."""
    args = on_gpu.arguments(["--out", str(tmp_path / "out"), "--device", "cpu", "--tiny", "--tokenizer", "t5.model"])
    for name in on_gpu.SECONDS:
        parsed = on_gpu.arguments(on_gpu.command(name, args, 12.5)[2:])
        assert (parsed.section, parsed.seconds, parsed.out, parsed.device, parsed.tiny) == (name, 12.5, args.out, "cpu", True)
        assert parsed.tokenizer == "t5.model"
    assert on_gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--tiny", "--sections", "ceilings"]) == 0
    content = json.loads((tmp_path / "out" / "ceilings.json").read_text())
    assert content["state"] == "done"
    assert content["allocator"] == "expandable_segments:True"


FAILS_A_STEP = WRITES.replace('"name": "first"', '"name": "first", "error": "exit code 2"') + 'print("error: no such tokenizer")'


def test_the_message_of_a_failed_step_is_kept(command, tmp_path):
    assert command({"learn": FAILS_A_STEP, "env": WRITES}) == 0
    contents = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("learn", "env")}
    assert contents["learn"]["output"] == "error: no such tokenizer\n"
    assert "output" not in contents["env"]


def test_nothing_follows_wrong_numbers(command, tmp_path, capsys):
    assert command({"gate": FINDS_WRONG_NUMBERS, "ceilings": WRITES}) == 1
    assert states(tmp_path) == {"gate": "wrong numbers"}
    assert "not run, because the numbers are wrong: ceilings" in capsys.readouterr().err


def test_the_sections_together_take_the_given_time_if_each_takes_its_share(on_gpu):
    names, left = list(SECTIONS), 540.0
    for number, name in enumerate(names):
        seconds = on_gpu.share(name, names[number:], left)
        assert 0 < seconds <= left
        left -= seconds
    assert left == pytest.approx(0.0, abs=1e-9)
    # Time that a section leaves goes to the others.
    assert on_gpu.share("learn", ["learn"], 500.0) == 500.0
    assert on_gpu.share("layers", names[3:], 500.0) > on_gpu.share("layers", names[3:], 400.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device cpu: the sizes are a GPU's and would take hours; add --tiny"),
        (["--device", "cpu", "--tiny", "--minutes", "0"], "--minutes 0: must be above 0"),
        (["--device", "cpu", "--tiny", "--minutes", "nan"], "--minutes nan: must be above 0"),
        (["--device", "cpu", "--tiny", "--out", __file__], "is not a folder that can be written; name another one"),
        (["--device", "cpu", "--tiny", "--out", f"{__file__}/out"], "is not a folder that can be written; name another one"),
    ],
)
def test_arguments_that_cannot_work_are_refused(on_gpu, tmp_path, capsys, words, message):
    assert on_gpu.main(["--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_without_a_gpu_the_command_says_how_to_try_it(on_gpu, tmp_path, capsys):
    assert on_gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "finds no GPU; to test the program without one: --device cpu --tiny" in capsys.readouterr().err
