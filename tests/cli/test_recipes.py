"""Every recipe passes --dry_run without network; it has the published hyperparameters, or those that the tuned ones change."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import torchrun_main
from peft_pretraining.__main__ import build_parser
from peft_pretraining.commands.finetune.command import problems as finetune_problems
from peft_pretraining.commands.finetune.tasks import TASKS
from peft_pretraining.config.arguments import ROWS, Arguments
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.model_config import load_model_config
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "scripts" / "llm_pretrain").rglob("*[0-9]*.sh"))
TUNED = sorted((ROOT / "scripts" / "llm_pretrain" / "tuned").glob("*[0-9]*.sh"))


def recipe_id(path: Path) -> str:
    return str(path.relative_to(ROOT / "scripts" / "llm_pretrain").with_suffix(""))


# The command lines of the published repository's scripts and README.
COMMON = "--peft_model sltrain --weight_decay 0 --dtype bfloat16 --eval_every 1000 --total_batch_size 512 "
PUBLISHED = {
    "60m": (1, "--lr 0.003 --optimizer adamw --rank 128 --sp_ratio 0.03 --batch_size 256 --num_training_steps 11000 "
            "--warmup_steps 1100 --lora_alpha 32"),
    "130m": (1, "--lr 0.003 --optimizer adamw --rank 256 --sp_ratio 0.03 --batch_size 256 --num_training_steps 22000 "
             "--warmup_steps 2200 --lora_alpha 16"),
    "350m": (4, "--lr 0.003 --optimizer adamw --rank 256 --sp_ratio 0.03 --batch_size 128 --num_training_steps 65000 "
             "--warmup_steps 6500 --lora_alpha 16"),
    "1b": (8, "--lr 0.003 --optimizer adamw --rank 512 --sp_ratio 0.03 --batch_size 32 --num_training_steps 140000 "
           "--warmup_steps 10000 --lora_alpha 8 --save_every 3000"),
    "7b": (8, "--lr 0.003 --optimizer adam8bit --rank 1024 --sp_ratio 0.05 --batch_size 8 --num_training_steps 150000 "
           "--warmup_steps 15000 --grad_clipping 1.0 --save_every 500 --lora_alpha 8"),
}  # fmt: skip


# Flags of saving that the published programs did not have.
OF_SAVING = {"save_minutes", "keep_checkpoints", "keep_every"}


def recipe_flags(path: Path) -> list[str]:
    """Returns the arguments that a recipe passes to torchrun_main.py."""
    command = path.read_text(encoding="utf-8").split("torchrun_main.py", 1)[1]
    return [word for word in shlex.split(command.replace("\\\n", " ")) if word != "$@"]


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_command_line_is_accepted_with_its_meaning(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    processes, flags = PUBLISHED[size]
    args = parse_args(f"--model_config configs/llama_{size}.json {COMMON} {flags}".split())
    plan = make_plan(args, World(size=processes))
    assert plan.total_batch_size == 512
    assert plan.gradient_accumulation * args.batch_size * processes == 512
    assert plan.num_training_steps == args.num_training_steps


def assert_is_the_plan_of(path: Path, text: str) -> None:
    size = re.sub(r"^[a-z]+?(?=\d)", "", path.stem)
    assert f"llama_{size}" in text
    assert "parameters" in text


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_a_recipes_command_passes_dry_run_without_network(path, words_of_torchrun, monkeypatch, capsys):
    words = words_of_torchrun(path, "--dry_run")
    argv = words[words.index("torchrun_main.py") + 1 :]
    assert argv[-1] == "--dry_run"

    def no_network(*_):
        raise AssertionError("--dry_run asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(ROOT)
    assert torchrun_main.main(argv) == 0
    assert_is_the_plan_of(path, capsys.readouterr().out)


@pytest.mark.parametrize("name", ["sltrain350m"])
def test_a_recipe_passes_dry_run_from_any_folder_as_users_start_it(name):
    path = ROOT / "scripts" / "llm_pretrain" / f"{name}.sh"
    environment = {**os.environ, "SLTRAIN_PYTHON": sys.executable, "NPROC": "1", "HF_HUB_OFFLINE": "1"}
    command = ["bash", str(path), "--dry_run"]
    ended = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert_is_the_plan_of(path, ended.stdout)


@pytest.mark.parametrize("size", PUBLISHED)
def test_recipe_keeps_the_published_hyperparameters(size, monkeypatch):
    """Except at 7B: the published script and the paper differ in the learning rate, and the recipe follows the paper; larger
    micro-batches with layer checkpointing are the same training.
    """
    monkeypatch.chdir(ROOT)
    published = vars(parse_args(f"--model_config configs/llama_{size}.json {COMMON} {PUBLISHED[size][1]}".split()))
    ours = vars(parse_args(recipe_flags(ROOT / "scripts" / "llm_pretrain" / f"sltrain{size}.sh")))
    different = {name for name in published if published[name] != ours[name]} - {"given"} - OF_SAVING
    assert different == ({"lr", "batch_size", "activation_checkpointing"} if size == "7b" else set())


@pytest.mark.parametrize("path", sorted({*RECIPES} - {*TUNED}), ids=recipe_id)
def test_a_recipe_loses_at_most_30_minutes_and_does_not_fill_the_disk(path):
    """It saves early enough to leave a third of the time for the update, the evaluation and the save under way.

    The tuned recipes take these flags from the published ones.
    """
    args = parse_args(recipe_flags(path))
    assert args.save_minutes is not None
    assert args.save_minutes <= 20
    assert args.keep_checkpoints == 2
    assert args.keep_every is not None
    assert args.keep_every % args.save_every == 0


@pytest.mark.parametrize("size", PUBLISHED)
def test_full_rank_recipe_differs_from_sltrains_in_the_method_only(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "scripts" / "llm_pretrain"
    sltrain, full = (vars(parse_args(recipe_flags(folder / f"{kind}{size}.sh"))) for kind in ("sltrain", "full"))
    different = {name for name in full if full[name] != sltrain[name]} - {"given"}
    assert different <= {"peft_model", "rank", "sp_ratio", "lora_alpha", "grad_clipping"}


# The command lines of the scripts in GaLore's repository.
GALORE = "--galore_scale 0.25 --total_batch_size 512 --weight_decay 0 --dtype bfloat16 --eval_every 1000 "
PUBLISHED_GALORE = {
    "60m": "--lr 0.01 --rank 128 --update_proj_gap 200 --batch_size 256 --num_training_steps 10000 --warmup_steps 1000",
    "130m": "--lr 0.01 --rank 256 --update_proj_gap 200 --batch_size 256 --num_training_steps 20000 --warmup_steps 2000",
    "350m": "--lr 0.01 --rank 256 --update_proj_gap 200 --batch_size 128 --num_training_steps 60000 --warmup_steps 6000",
    "1b": "--lr 0.01 --rank 1024 --update_proj_gap 200 --batch_size 16 --num_training_steps 100000 --warmup_steps 10000",
    "7b": "--lr 0.005 --rank 1024 --update_proj_gap 500 --batch_size 8 --num_training_steps 150000 --warmup_steps 15000 "
    "--grad_clipping 1.0",
}


@pytest.mark.parametrize("size", PUBLISHED_GALORE)
def test_galore_recipe_keeps_the_published_hyperparameters(size, monkeypatch):
    """Except the length, which is that of the other recipes, 1B's rank and 7B's 8-bit moments, which the figures belong to."""
    monkeypatch.chdir(ROOT)
    folder = ROOT / "scripts" / "llm_pretrain"
    argv = f"--model_config configs/llama_{size}.json --optimizer galore_adamw {GALORE} {PUBLISHED_GALORE[size]}".split()
    published, ours = vars(parse_args(argv)), vars(parse_args(recipe_flags(folder / f"galore{size}.sh")))
    different = {name for name in published if published[name] != ours[name]} - {"given", "save_every"} - OF_SAVING
    assert different <= {"num_training_steps", "warmup_steps"} | {"1b": {"rank"}, "7b": {"optimizer"}}.get(size, set())
    twin = vars(parse_args(recipe_flags(folder / f"full{size}.sh")))
    assert all(ours[name] == twin[name] for name in ("num_training_steps", "warmup_steps", "total_batch_size"))


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_recipe_starts_torchrun_here_or_as_one_of_several_machines(path, words_of_torchrun):
    """With as many processes as the recipe's header says, or NPROC; the launcher passes signals on either way."""
    header = re.search(r"^# Hardware: (\d+) GPU", path.read_text(encoding="utf-8"), re.MULTILINE)
    alone = words_of_torchrun(path)
    one_of_several = words_of_torchrun(path, NPROC="3", PET_RDZV_ENDPOINT="machine0:15000")
    assert alone[:5] == ["-m", "peft_pretraining.distributed.launch", "--standalone", "--nproc_per_node", header[1]]
    assert one_of_several[:4] == ["-m", "peft_pretraining.distributed.launch", "--nproc_per_node", "3"]
    assert "torchrun_main.py" in alone
    assert "torchrun_main.py" in one_of_several


# The scripts and the README of ReLoRA's repository.
PUBLISHED_RELORA = {
    "60m": "--lr 0.001 --relora 1000 --cycle_length 1000 --num_training_steps 10000",
    "130m": "--lr 0.001 --relora 2000 --cycle_length 2000 --num_training_steps 20000",
    "350m": "--lr 0.001 --relora 5000 --cycle_length 5000 --num_training_steps 20000",
    "1b": "--lr 0.0004 --relora 5320 --cycle_length 5320 --num_training_steps 133000 --optimizer_magnitude_pruning 0.9",
}


@pytest.mark.parametrize("size", PUBLISHED_RELORA)
def test_relora_recipe_keeps_the_published_hyperparameters(size, monkeypatch):
    """Except the length, which is that of the other recipes, and 1B's interval, which must divide it."""
    monkeypatch.chdir(ROOT)
    folder = ROOT / "scripts" / "llm_pretrain"
    common = f"--model_config configs/llama_{size}.json --peft_model relora --scheduler cosine_restarts --batch_size 1"
    cycles = "--warmup_steps 500 --restart_warmup_steps 100 --min_lr_ratio 0.1"
    published = parse_args(f"{common} {cycles} {PUBLISHED_RELORA[size]}".split())
    ours = parse_args(recipe_flags(folder / f"relora{size}.sh"))
    free = {"num_training_steps"} | ({"relora", "cycle_length"} if size == "1b" else set())
    names = ["lr", "relora", "cycle_length", "num_training_steps", "warmup_steps", "restart_warmup_steps", "min_lr_ratio"]
    names += ["scheduler", "optimizer_magnitude_pruning"]
    assert {name for name in names if getattr(published, name) != getattr(ours, name)} <= free
    twin = parse_args(recipe_flags(folder / f"sltrain{size}.sh"))
    for name in ("rank", "num_training_steps", "total_batch_size", "batch_size", "max_length", "dtype", "weight_decay"):
        assert getattr(ours, name) == getattr(twin, name)
    assert make_plan(ours, World(size=1)).warnings == () or size == "1b"  # its checkpoints are large


@pytest.mark.parametrize("size", PUBLISHED_RELORA)
def test_low_rank_recipe_differs_from_sltrains_in_the_sparse_part_only(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "scripts" / "llm_pretrain"
    sltrain, lowrank = (vars(parse_args(recipe_flags(folder / f"{kind}{size}.sh"))) for kind in ("sltrain", "lowrank"))
    assert {name for name in lowrank if lowrank[name] != sltrain[name]} - {"given"} == {"peft_model", "sp_ratio"}


@pytest.mark.parametrize("size", PUBLISHED_RELORA)
def test_the_full_rank_warm_up_in_reloras_header_fits_it(size, monkeypatch):
    """Its command is valid, and it ends at the end of a cycle of the recipe."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "scripts" / "llm_pretrain" / f"relora{size}.sh"
    found = re.search(r"bash (scripts/llm_pretrain/full\w+\.sh) (.*),$", path.read_text(encoding="utf-8"), re.MULTILINE)
    warm = parse_args([*recipe_flags(ROOT / found[1]), *found[2].split()])
    ours = parse_args(recipe_flags(path))
    make_plan(warm, World())
    assert warm.peft_model == "full"
    assert warm.num_training_steps % ours.cycle_length == 0
    names = ("model_config", "max_length", "dtype", "seed", "total_batch_size", "packing", "dataset")
    assert all(getattr(warm, name) == getattr(ours, name) for name in names)


def tuned_and_published(path: Path, words_of_torchrun: Callable[..., list[str]]) -> tuple[Arguments, Arguments]:
    """The arguments of a tuned recipe and of the published one beside its folder."""
    words = [words_of_torchrun(recipe) for recipe in (path, path.parent.parent / path.name)]
    tuned, published = (parse_args(found[found.index("torchrun_main.py") + 1 :]) for found in words)
    return tuned, published


@pytest.mark.parametrize("path", TUNED, ids=recipe_id)
def test_a_tuned_recipe_changes_rates_start_alpha_and_clipping_only(path, words_of_torchrun, monkeypatch):
    monkeypatch.chdir(ROOT)
    tuned, published = map(vars, tuned_and_published(path, words_of_torchrun))
    different = {name for name in tuned if tuned[name] != published[name]} - {"given"}
    assert different <= {"lr", "matrix_lr", "sparse_lr", "start_scale", "lora_alpha", "grad_clipping"}
    assert {"lr", "matrix_lr"} <= different


@pytest.mark.parametrize("method", ["full", "sltrain"])
def test_tuned_rates_are_carried_over_by_the_square_root_of_the_hidden_size(method, words_of_torchrun, monkeypatch):
    """From size to size, the embedding's rate over that of matrices, and of sparse values; alpha / rank stays."""
    monkeypatch.chdir(ROOT)
    found = [tuned_and_published(path, words_of_torchrun)[0] for path in TUNED if path.stem.startswith(method)]
    assert len(found) == 4
    widths = [load_model_config(args.model_config).hidden_size for args in found]
    groups = ["matrix_lr", *(["sparse_lr"] if method == "sltrain" else [])]
    for group in groups:
        scaled = [args.lr / getattr(args, group) / width**0.5 for args, width in zip(found, widths, strict=True)]
        assert scaled == pytest.approx([scaled[0]] * 4, rel=0.01)  # rates have three digits
    assert len({args.lora_alpha / args.rank for args in found} if method == "sltrain" else {args.lr for args in found}) == 1


def test_only_methods_with_tuned_rates_get_them():
    rates = ROOT / "scripts" / "llm_pretrain" / "tuned" / "rates.sh"
    ended = subprocess.run(["bash", str(rates), "galore", "512"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "rates.sh: galore: no rates for this method; must be full or sltrain\n")


# Flags whose values are paths: of training by their rows, and of fine-tuning.
PATH_FLAGS = {name for name, row in ROWS.items() if row.unit in ("file", "folder")} | {"dataset", "eval_dataset", "tokenizer"}
FINETUNING_PATHS = {"model", "train_file", "validation_file", "out"}


def resolved(folder: Path, *words: str) -> tuple[list[str], str]:
    """What scripts/setup.sh makes of a command line that was typed in `folder`, and its notices."""
    script = f'source {ROOT}/scripts/setup.sh; eval "set -- $(from_start "$@")"; printf "%s\\n" "$@"'
    command = ["bash", "-c", script, "bash", *words]
    environment = {**os.environ, "SLTRAIN_PYTHON": sys.executable}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.splitlines(), ended.stderr


def test_relative_paths_start_where_the_script_was_started(tmp_path):
    """Existing inputs and new outputs; names of data sets, other values and what only the checkout has stay as they are."""
    for name in ("own.json", "corpus one", "shard-1.jsonl", "full", "c4"):
        (tmp_path / name).touch()
    here = str(tmp_path.resolve())
    cases = {
        ("--model_config", "own.json"): f"{here}/own.json",
        ("--dataset", "corpus one"): f"{here}/corpus one",
        ("--dataset", "shard-*.jsonl"): f"{here}/shard-*.jsonl",
        ("--dataset", "c4:0.7, corpus one:0.3"): f"c4:0.7, {here}/corpus one:0.3",
        ("--eval_dataset", "own.json, hub:allenai/c4"): f"{here}/own.json, hub:allenai/c4",
        ("--save_dir", "runs/new"): f"{here}/runs/new",
        ("--out", "../a new model"): f"{here}/../a new model",
        ("--eval_dataset", "/data"): "/data",
        ("--tokenizer", "t5-base"): "t5-base",
        ("--dataset", "c4"): "c4",
        ("--dataset", "hub:allenai/c4"): "hub:allenai/c4",
        ("--peft_model", "full"): "full",
        ("--tags", "own.json"): "own.json",
        ("--model_config", "configs/llama_9m.json"): "configs/llama_9m.json",
    }
    typed = [word for case in cases for word in case]
    words, notices = resolved(tmp_path, *typed, "--compile", "--config=own.json", "--name", "it's", "--dry_run")
    expected = [word for (flag, _), value in cases.items() for word in (flag, value)]
    assert words == [*expected, "--compile", f"--config={here}/own.json", "--name", "it's", "--dry_run"]
    assert notices.splitlines() == [
        f"notice: --model_config configs/llama_9m.json: taken from the checkout, {ROOT}; {here} has no such file or folder"
    ]
    assert resolved(ROOT, *typed, "--save_dir", "runs/a") == ([*typed, "--save_dir", "runs/a"], "")


def test_setup_knows_every_flag_that_takes_a_path(tmp_path):
    text = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8").split("resolved() {")[1].split("*)")[0]
    assert set(re.findall(r"--(\w+)", text)) == PATH_FLAGS | FINETUNING_PATHS


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_a_recipe_resolves_given_paths_and_keeps_its_own(path, words_of_torchrun):
    """words_of_torchrun starts it in /: a new run folder is there, the model's configuration in the checkout."""
    words = words_of_torchrun(path, "--save_dir", "a new run", "--name=it's")
    assert words[-3:] == ["--save_dir", "/a new run", "--name=it's"]
    assert re.fullmatch(r"configs/llama_\w+\.json", words[words.index("--model_config") + 1])


def test_a_stopped_quickstart_is_continued_in_its_folder(tmp_path):
    """With a stand-in for Python that is stopped by its first start, as by Ctrl-C, and finishes at the next one."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "python").write_text(
        "#!/usr/bin/env bash\n"
        '[ "$1" = torchrun_main.py ] || { echo "called $3"; exit 0; }\n'
        'run="${*: -1}"; again="$(ls "$run" 2>/dev/null)"; mkdir -p "$run"; touch "$run/metrics.jsonl"\n'
        'if [ -n "$again" ]; then rm -f "$run/stopped.json"; else touch "$run/stopped.json"; fi\n'
    )
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "SLTRAIN_PYTHON": str(tmp_path / "python")}
    command = ["bash", str(tmp_path / "scripts" / "quickstart.sh")]
    outputs = [subprocess.check_output(command, cwd=tmp_path, env=environment, text=True) for _ in range(3)]
    assert "== training into runs/quickstart\n" in outputs[0]
    assert "called report" not in outputs[0]
    assert "== continuing runs/quickstart, which was stopped" in outputs[1]
    assert "called report" in outputs[1]
    assert "== training into runs/quickstart-2\n" in outputs[2]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_script_for_glue_starts_a_valid_command(task, words_of_torchrun):
    words = words_of_torchrun(ROOT / "scripts" / "finetune" / "glue.sh", task, "--lr", "1e-5")
    assert words[:3] == ["-m", "peft_pretraining", "finetune"]
    args = build_parser().parse_args(words[2:])
    assert finetune_problems(args) == []
    assert (args.task, args.base, args.lr, str(args.out)) == (task, "frozen", 1e-5, f"runs/glue/{task}")


def test_the_dashboards_script_sends_named_runs_and_shows_the_page(words_of_torchrun):
    words = words_of_torchrun(ROOT / "scripts" / "dashboard.sh", "runs/a")
    assert words[:2] == ["-c", "import trackio"]
    assert words[2:7] == ["-m", "peft_pretraining", "wandb-upload", "--tracker", "trackio"]
    assert words[7] == "runs/a"
    assert 'trackio.show(project="SLTrain"' in "\n".join(words[8:])


def test_the_dashboards_script_trains_a_quickstart_with_the_flags_after_new(words_of_torchrun):
    words = words_of_torchrun(ROOT / "scripts" / "dashboard.sh", "--new", "--seed", "1")
    assert words[words.index("--tracker") :][:4] == ["--tracker", "trackio", "--seed", "1"]
    assert any(word.endswith("quickstart.yaml") for word in words)


def test_without_trackio_the_dashboards_script_says_how_to_install_it(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "dashboard.sh")]
    ended = subprocess.run(
        command, env={**os.environ, "SLTRAIN_PYTHON": str(python)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert f"{python} -m pip install trackio" in ended.stderr
