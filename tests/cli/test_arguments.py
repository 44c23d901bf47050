"""Every invalid argument is refused with exit code 2 and one message that names the flag and its value."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import torchrun_main
from peft_pretraining.config.arguments import ROWS, ConfigError, arguments_of_record, as_dict
from peft_pretraining.config.command_line import build_parser, parse_args, parse_tokens
from peft_pretraining.distributed.world import World
from peft_pretraining.plan import plan as plan_module
from peft_pretraining.plan.checks import check, notices
from peft_pretraining.plan.plan import format_plan, learning_rates, make_plan
from peft_pretraining.plan.schedule import is_finished

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "llama_60m.json")
BASE = ["--model_config", CONFIG, "--batch_size", "8"]

# (extra arguments, what the message must contain)
BAD = [
    (["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
    (["--batch_size", "abc"], ["--batch_size", "abc"]),
    (["--batch_size", "-4"], ["--batch_size -4"]),
    (["--model_config", "nowhere.json"], ["--model_config nowhere.json", "no such file"]),
    (["--lr", "nan"], ["--lr nan", "finite"]),
    (["--lr", "-0.1"], ["--lr -0.1", "above 0"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--rank", "0"], ["--rank 0", "at least 1"]),
    (["--rank", "12.5"], ["--rank", "12.5"]),
    (["--sp_ratio", "0", "--peft_model", "sltrain"], ["--sp_ratio 0", "lowrank"]),
    (["--sp_ratio", "1.0", "--peft_model", "sltrain"], ["--sp_ratio 1.0", "between 0 and 1"]),
    (["--sp_ratio", "0.000001", "--peft_model", "sltrain"], ["--sp_ratio 1e-06", "no entry"]),
    (["--sp_ratio", "nan", "--peft_model", "sltrain"], ["--sp_ratio nan", "finite"]),
    (["--sp_ratio", "0.4", "--peft_model", "sltrain", "--support", "block"], ["--sp_ratio 0.4", "0.3333 and 0.5"]),
    (["--sp_ratio", "0.001", "--peft_model", "sltrain", "--support", "block"], ["1000 blocks", "at least 0.002"]),
    (["--support", "random", "--peft_model", "sltrain"], ["--support random", "uniform, block"]),
    (["--linear_path", "dense", "--peft_model", "sltrain"], ["--linear_path dense", "factored"]),
    (["--lora_alpha", "0", "--peft_model", "sltrain"], ["--lora_alpha 0", "above 0"]),
    (["--peft_model", "lora"], ["--peft_model lora", "sltrain"]),
    (["--peft_model", "relora"], ["--peft_model relora", "--relora 1000"]),
    (["--optimizer", "adamx"], ["--optimizer adamx", "adamw"]),
    (["--optimizer", "galore_lion"], ["--optimizer galore_lion"]),
    (
        ["--optimizer", "GaLore_AdamW", "--peft_model", "sltrain"],
        ["--optimizer GaLore_AdamW with --peft_model sltrain", "leave --peft_model out", "--optimizer adamw"],
    ),
    (
        ["--peft_model", "galore", "--parallel", "fsdp"],
        ["--parallel fsdp", "galore", "whole gradient", "--parallel ddp"],
    ),
    (["--peft_model", "galore", "--update_proj_gap", "0"], ["--update_proj_gap 0", "at least 1"]),
    (["--peft_model", "galore", "--galore_scale", "0"], ["--galore_scale 0", "above 0"]),
    (["--peft_model", "galore", "--galore_scale", "nan"], ["--galore_scale nan", "finite"]),
    (["--peft_model", "galore", "--proj_type", "random"], ["--proj_type random", "reverse_std"]),
    (["--scheduler", "step"], ["--scheduler step", "cosine"]),
    (["--scheduler", "cosine_restarts", "--restart_warmup_steps", "10"], ["cosine_restarts", "--cycle_length"]),
    (["--cycle_length", "3000"], ["--cycle_length 3000", "--num_training_steps 10000"]),
    (["--adjust_step", "5"], ["--adjust_step 5", "cosine_restarts"]),
    (["--parallel", "zero"], ["--parallel zero", "fsdp"]),
    (["--parallel", "fsdp", "--optimizer", "adafactor"], ["--parallel fsdp", "adafactor", "adam8bit"]),
    (["--compute_dtype", "bf16"], ["--compute_dtype bfloat16", "--parallel fsdp"]),
    (
        ["--compute_dtype", "bf16", "--parallel", "fsdp"],
        ["--compute_dtype bfloat16", "this run has one", "--dtype bfloat16"],
    ),
    (["--reduce_dtype", "int8"], ["--reduce_dtype int8", "float32"]),
    (["--min_lr_ratio", "2"], ["--min_lr_ratio 2", "between 0 and 1"]),
    (["--warmup_steps", "-1"], ["--warmup_steps -1", "negative"]),
    (["--warmup_steps", "20000"], ["--warmup_steps 20000", "--num_training_steps 10000"]),
    (["--num_training_steps", "0"], ["--num_training_steps 0"]),
    (["--max_train_tokens", "lots"], ["--max_train_tokens", "lots", "1.1B"]),
    (["--max_train_tokens", "0"], ["--max_train_tokens 0"]),
    (["--max_length", "1"], ["--max_length 1"]),
    (["--max_length", "5000"], ["--max_length 5000", "1024"]),
    (["--total_batch_size", "100"], ["--total_batch_size 100", "--batch_size 5"]),
    (
        ["--total_batch_size", "64", "--gradient_accumulation", "3"],
        ["--total_batch_size 64", "--gradient_accumulation 3"],
    ),
    (["--gradient_accumulation", "0"], ["--gradient_accumulation 0"]),
    (["--grad_clipping", "-1"], ["--grad_clipping -1"]),
    (["--beta1", "1.5"], ["--beta1 1.5"]),
    (["--dtype", "float16"], ["--dtype float16", "bfloat16"]),
    (["--device", "tpu"], ["--device tpu", "cuda"]),
    (["--workers", "-2"], ["--workers -2"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--data_lanes", "0"], ["--data_lanes 0"]),
    (["--eval_every", "0"], ["--eval_every 0"]),
    (["--continue_from", "no/such/folder"], ["--continue_from no/such/folder", "no such folder"]),
    (["--packing", "maybe"], ["--packing", "maybe"]),
    (["--learning_rate", "1"], ["--learning_rate"]),
    (["--num_trainig_steps", "5"], ["--num_trainig_steps", "did you mean --num_training_steps"]),
    (["--config", "missing.yaml"], ["--config missing.yaml"]),
    (["--activation_checkpointing", "sometimes"], ["--activation_checkpointing sometimes"]),
    (["--wandb", "loud"], ["--wandb loud"]),
    (["--single_gpu", "--parallel", "ddp"], ["--single_gpu", "--parallel"]),
    (["stray"], ["stray"]),
    (["--dataset", " "], ["--dataset is empty", "not set"]),
    (["--eval_dataset", ""], ["--eval_dataset is empty", "not set"]),
    (["--tokenizer", ""], ["--tokenizer is empty", "not set"]),
    (["--save_dir", ""], ["--save_dir is empty", "not set"]),
    (["--device", "cuda:\u00b2"], ["--device cuda:\u00b2", "cuda:N"]),
    (["--peft_model", "sltrain", "--support", "block", "--sp_ratio", "1e-310"], ["--sp_ratio 1e-310", "1/k"]),
    (["--seed", "9" * 400], ["--seed 999", "2^63"]),
    (["--max_train_tokens", "1e999"], ["--max_train_tokens", "1e999"]),
    (["--max_train_tokens", "1e999999999"], ["--max_train_tokens", "1e999999999"]),
    (["--per_layer", "--grad_clipping", "1.0"], ["--grad_clipping 1.0", "--per_layer", "--grad_norm_growth"]),
    (["--grad_norm_growth", "0.5"], ["--grad_norm_growth 0.5", "at least 1"]),
    (["--optimizer", "sgd", "--stochastic_rounding"], ["--stochastic_rounding", "--optimizer sgd", "adamw"]),
    (["--optimizer", "adamw", "--condition_gradients"], ["--condition_gradients", "--optimizer adamw", "muon", "stable_spam"]),
    (["--optimizer", "muon", "--condition_gradients", "--parallel", "fsdp"], ["--parallel fsdp", "--optimizer muon", "adam8bit"]),
    (["--embedding_states", "16bit"], ["--embedding_states 16bit", "32bit"]),
    (["--optimizer", "muon8bit", "--embedding_states", "4bit"], ["--embedding_states 4bit", "muon8bit", "adamw4bit"]),
    (["--optimizer", "galore_adamw8bit_per_layer", "--stochastic_rounding", "--parallel", "fsdp"], ["--parallel fsdp"]),
    (["--optimizer", "galore_adafactor", "--stochastic_rounding"], ["--stochastic_rounding", "adafactor", "adamw"]),
    (["--optimizer", "sgdx_per_layer"], ["sgdx"]),
    (["--allow_changes", "lr,rank"], ["--allow_changes rank", "would not fit", "num_training_steps"]),
    (["--allow_changes", "learning_rate"], ["--allow_changes learning_rate", "is no argument"]),
    (["--allow_changes", "workers"], ["--allow_changes workers", "may always change"]),
    (["--async_save", "maybe"], ["--async_save", "maybe"]),
]


@pytest.mark.parametrize(("extra", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_bad_argument_is_refused_by_name_and_value(extra, words):
    with pytest.raises(ConfigError) as refused:
        make_plan(parse_args(BASE + extra), World())
    for word in words:
        assert word in str(refused.value)


def test_an_invalid_argument_gives_exit_code_2_and_one_line():
    ended = subprocess.run(
        [sys.executable, "torchrun_main.py", *BASE, *BAD[0][0]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.startswith("torchrun_main.py: error: --")


def test_every_argument_that_defines_a_run_is_compared():
    """Only per_layer may change freely although it defines the run: its updates are bit-identical to whole ones."""
    assert {name for name, row in ROWS.items() if row.defines_run and row.on_resume == "freely"} == {"per_layer"}


@pytest.mark.parametrize("missing", ["--model_config", "--batch_size"])
def test_required_flags_are_named(missing):
    argv = [word for pair in zip(BASE[::2], BASE[1::2], strict=True) if pair[0] != missing for word in pair]
    with pytest.raises(ConfigError, match=f"{missing} is required"):
        check(parse_args(argv), World())


# (command line, words of each problem): missing, malformed, out of range, unknown, and problems between flags
SEVERAL = [
    (
        "--batch_size 7 --total_batch_size 100 --rank -3 --lr nan",
        ["--model_config is required", "--rank -3", "--lr nan", "--total_batch_size 100: not a multiple of --batch_size 7"],
    ),
    (f"--model_config {CONFIG} --rank abc --lr fast", ["--batch_size is required", "--rank abc", "--lr fast"]),
    (f"{' '.join(BASE)} --lr -1 --rank 0 --device tpu", ["--lr -1", "--rank 0", "--device tpu"]),
    (f"{' '.join(BASE)} --seed --packing maybe stray", ["--seed: needs a value", "--packing maybe", "unknown argument stray"]),
    (
        f"{' '.join(BASE)} --learning_rate 1 --warmup_steps 20000 --max_length 5000",
        ["did you mean --lr", "--warmup_steps 20000", "--max_length 5000"],
    ),
    ("--model_config nowhere.json --batch_size x --config no.yaml", ["nowhere.json", "--batch_size x", "--config no.yaml"]),
    ("", ["--model_config is required", "--batch_size is required"]),
    (f"{' '.join(BASE)} -hello --rank 0 -x 3", ["unknown argument -hello", "--rank 0", "unknown argument -x 3"]),
    (
        f"{' '.join(BASE)} --dataset ./no --eval_dataset /no/such --tokenizer /no/such/tok.json --rank 0",
        ["--dataset ./no:", "--eval_dataset /no/such:", "--tokenizer /no/such/tok.json:", "--rank 0"],
    ),
]


@pytest.mark.parametrize(("line", "problems"), SEVERAL, ids=lambda value: value[-40:] if isinstance(value, str) else None)
def test_all_problems_are_reported_at_once(line, problems):
    with pytest.raises(ConfigError) as refused:
        check(parse_args(line.split()), World())
    assert len(refused.value.problems) == len(problems), refused.value.problems
    for words in problems:
        assert sum(words in problem for problem in refused.value.problems) == 1


@pytest.mark.parametrize(
    "line",
    [
        "--peft_model relora --relora often",
        "--peft_model relora --relora 0",
        "--total_batch_size 64 --batch_size many",
        "--warmup_steps 9000 --num_training_steps lots",
        "--max_train_tokens 20k --warmup_steps 5000 --batch_size many",
        "--peft_model sltrain --support block --sp_ratio 0",
    ],
)
def test_a_refused_value_is_reported_once(line):
    """A refused flag has its default value, whose relation to other flags must not be reported as a problem."""
    with pytest.raises(ConfigError) as refused:
        check(parse_args([*BASE, *line.split()]), World())
    assert len(refused.value.problems) == 1, refused.value.problems


def test_help_and_errors_import_no_slow_package():
    """No slow package is imported for --help, for an invalid argument or for a refused plan."""
    code = (
        "import sys, torchrun_main\n"
        "for argv in (['--help'], ['--lr', 'x'], sys.argv[1:]):\n"
        "    try:\n        torchrun_main.main(argv)\n    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'bitsandbytes', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    argv = [*BASE, "--total_batch_size", "100"]
    ended = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_dry_run_loads_no_more_than_the_device_needs():
    """torch is needed to find the device; the model, the optimizers and the training loop are not imported."""
    code = (
        "import sys, torchrun_main\n"
        "code = torchrun_main.main([*sys.argv[1:], '--dry_run'])\n"
        "folders = ('model', 'optim', 'training', 'export', 'record', 'run', 'commands')\n"
        "heavy = [name for name in sys.modules if name in ('transformers', 'datasets', 'sparse_lora')\n"
        "         or name.startswith(tuple(f'peft_pretraining.{folder}' for folder in folders))]\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    ended = subprocess.run([sys.executable, "-c", code, *BASE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("model")


@pytest.mark.parametrize("more", [["--dry_run"], []])
def test_a_start_makes_the_plan_once(monkeypatch, tiny_run, tmp_path, more):
    """Arguments are checked before torch is loaded, the plan is made once the device is known, and neither happens twice."""
    made = []
    account = plan_module.account
    monkeypatch.setattr(plan_module, "account", lambda setting: made.append(setting) or account(setting))
    argv = [*tiny_run, "--batch_size", "1", "--max_length", "32", "--num_training_steps", "1", "--warmup_steps", "0"]
    argv += ["--device", "cpu", "--wandb", "disabled", "--workers", "0", "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main([*argv, *more]) == 0
    assert len(made) == 1


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("--lr 0.1 --warmup_steps 1100", "peak lr 0.1 after 1,100 warm-up updates, cosine decay to 0.01"),
        ("--lr 0.1 --warmup_steps 0 --scheduler linear", "peak lr 0.1 from the first update, linear decay to 0"),
        ("--lr 0.1 --cycle_length 5000", "cosine decay to 0.01, restarted every 5,000 updates"),
        (
            "--lr 0.1 --scheduler cosine_restarts --cycle_length 5000 --restart_warmup_steps 50",
            "cosine decay to 0.01, 50 warm-up updates again every 5,000",
        ),
    ],
)
def test_the_plan_names_peak_and_end_of_the_learning_rate(flags, shown):
    args = parse_args([*BASE, *flags.split()])
    assert shown in format_plan(make_plan(args, World()), args, "words", None)


def test_a_config_file_sets_flags_and_the_command_line_takes_precedence(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model_config": CONFIG, "batch_size": 4, "lr": 0.5, "packing": True, "grad_clipping": 0}))
    args = parse_args(["--config", str(path), "--lr", "0.25"])
    assert (args.batch_size, args.lr, args.packing, args.grad_clipping) == (4, 0.25, True, None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"batch_sizes": 4}', ["batch_sizes", "did you mean batch_size"]),
        ('{"lr": [1]}', ["lr", "single value"]),
        ('{"config": "other.yaml"}', ["cannot name another one"]),
        ("[1]", ["names and values"]),
        ("{", ["not valid JSON"]),
    ],
)
def test_config_file_problems_name_the_file(tmp_path, content, words):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        check(parse_args(["--config", str(path), *BASE]), World())
    for word in [str(path), *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("150M", 150 * 10**6), ("1.1B", 11 * 10**8), ("2k", 2000), ("20000", 20000), ("8.2B", 82 * 10**8), ("2.01M", 2010000)],
)
def test_token_counts_are_read(text, tokens):
    assert parse_tokens(text) == tokens


def test_flags_without_effect_give_a_notice():
    given = ["--lora_dropout", "0.1", "--use_hf_model", "--update_proj_gap", "200", "--rank", "4", "--beta1", "0.5"]
    lines = "\n".join(notices(parse_args(BASE + given)))
    for flag in ("--lora_dropout", "--use_hf_model", "--update_proj_gap", "--rank", "--beta1"):
        assert flag in lines
    assert notices(parse_args(BASE)) == []


@pytest.mark.parametrize("name", ["adam8bit_per_layer", "AdamW_per_layer", "sgd_per_layer"])
def test_published_per_layer_names_mean_per_layer_without_clipping(name):
    """With them --grad_clipping has no effect, as published, with a notice; with --per_layer it is refused."""
    args = parse_args([*BASE, "--optimizer", name, "--grad_clipping", "1.0"])
    assert (args.optimizer, args.per_layer, args.grad_clipping) == (name.lower().removesuffix("_per_layer"), True, None)
    assert any("--grad_clipping has no effect" in line for line in notices(args))
    with pytest.raises(ConfigError, match="--grad_norm_growth"):
        check(parse_args([*BASE, "--optimizer", name, "--per_layer", "--grad_clipping", "1.0"]), World())


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("galore_adamw", ("adamw", False)),
        ("GaLore_Adafactor", ("adafactor", False)),
        ("galore_adamw8bit", ("adam8bit", False)),
        ("galore_AdamW8bit_per_layer", ("adam8bit", True)),
    ],
)
def test_published_galore_names_mean_galore_with_an_optimizer(name, meaning):
    for method in ([], ["--peft_model", "GaLore"]):
        args = parse_args([*BASE, "--optimizer", name, "--grad_clipping", "1.0", *method])
        assert args.peft_model == "galore"
        assert (args.optimizer, args.per_layer) == meaning
        assert (args.update_proj_gap, args.galore_scale, args.proj_type) == (200, 0.25, "std")
        assert args.grad_clipping == (None if args.per_layer else 1.0)


def test_flags_of_other_methods_give_a_notice_with_galore():
    given = [
        "--peft_model",
        "galore",
        "--rank",
        "8",
        "--update_proj_gap",
        "50",
        "--proj_type",
        "left",
        "--sp_ratio",
        "0.1",
    ]
    lines = notices(parse_args([*BASE, *given, "--galore_scale", "1", "--lora_alpha", "8", "--train_scaling"]))
    assert sorted(line.split()[0] for line in lines) == ["--lora_alpha", "--sp_ratio", "--train_scaling"]


def test_a_record_without_galores_flags_is_read():
    """Earlier versions recorded None for them."""
    args = arguments_of_record(as_dict(parse_args(BASE)) | {"update_proj_gap": None, "proj_type": None})
    assert (args.update_proj_gap, args.proj_type) == (200, "std")
    with pytest.raises(ValueError, match="update_proj_gap"):
        arguments_of_record({"update_proj_gap": "often"})


def test_name_and_tags_give_a_notice_without_wandb():
    lines = notices(parse_args([*BASE, "--wandb", "disabled", "--name", "x", "--tags", "a"]))
    assert [line.split()[0] for line in lines] == ["--name", "--tags"]


def test_flags_of_wandb_give_a_notice_with_another_tracker():
    given = ["--tracker", "trackio", "--name", "x"]
    assert notices(parse_args([*BASE, *given, "--wandb", "online"])) == ["--wandb has no effect with --tracker trackio"]
    assert notices(parse_args([*BASE, *given, "--wandb", "disabled"])) == []


def test_a_flag_with_optional_value_is_read_from_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    for text, kind in (("true", "layer"), ("false", None), ("selective", "selective")):
        path.write_text(f"activation_checkpointing: {text}\n")
        assert parse_args([*BASE, "--config", str(path)]).activation_checkpointing == kind


def test_evaluation_on_c4_is_limited_for_any_training_data():
    plan = make_plan(parse_args([*BASE, "--dataset", "demo", "--eval_dataset", "c4"]), World())
    assert plan.eval_tokens == 10_000_000
    assert make_plan(parse_args([*BASE, "--dataset", "c4", "--eval_dataset", "demo"]), World()).eval_tokens is None


def test_every_argument_has_help_and_reaches_run_json():
    parser = build_parser()
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == set(as_dict(parse_args(BASE)))
    assert all(action.help for action in parser._actions)


def test_batch_arithmetic_over_processes():
    plan = make_plan(parse_args([*BASE, "--total_batch_size", "512"]), World(size=4))
    assert (plan.gradient_accumulation, plan.total_batch_size) == (16, 512)
    plan = make_plan(parse_args([*BASE, "--gradient_accumulation", "3"]), World(size=2))
    assert plan.total_batch_size == 48


def test_lanes_must_be_a_multiple_of_the_processes():
    with pytest.raises(ConfigError, match=r"--data_lanes 64: must be a multiple of the 3 processes.*--data_lanes 66"):
        make_plan(parse_args([*BASE, "--dataset", "c4"]), World(size=3))


def test_the_default_folder_depends_on_the_run_but_not_on_the_number_of_processes():
    argv = [*BASE, "--total_batch_size", "64"]
    folder = make_plan(parse_args(argv), World()).save_dir
    assert folder == make_plan(parse_args(argv), World(size=4)).save_dir
    assert folder == make_plan(parse_args([*argv, "--log_every", "10"]), World()).save_dir
    assert folder != make_plan(parse_args([*argv, "--lr", "0.5"]), World()).save_dir


def test_max_train_tokens_ends_the_schedule_with_the_update_that_reaches_it():
    """The end depends on the number of tokens, not of updates, because padding varies."""
    args = parse_args([*BASE, "--max_train_tokens", "20k", "--max_length", "256", "--warmup_steps", "0"])
    plan = make_plan(args, World())
    assert plan.num_training_steps == 10  # ceil(20000 / (8 * 256))
    assert not is_finished(plan, 100, 19_999)
    assert is_finished(plan, 8, 20_000)
    rates = [learning_rates(args, plan).at(0, tokens) for tokens in range(0, 20_000, 500)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("flags", "default_dtype", "processes", "warned"),
    [
        ("--optimizer adamw --stochastic_rounding", "float32", 1, "--stochastic_rounding has no effect with float32"),
        ("--optimizer adamw --stochastic_rounding", "bfloat16", 1, None),
        ("--optimizer adamw --weight_dtype int8", "float32", 1, None),
        ("--parallel fsdp --compute_dtype bfloat16", "bfloat16", 2, "add --dtype float32 to keep them"),
        ("--parallel fsdp --compute_dtype bfloat16", "float32", 2, None),
        ("--reduce_dtype float32", "bfloat16", 1, "--reduce_dtype float32 has no effect in one process"),
        ("--reduce_dtype float32", "bfloat16", 2, None),
    ],
)
def test_a_flag_that_the_devices_default_dtype_leaves_without_effect_gives_a_warning(flags, default_dtype, processes, warned):
    plan = make_plan(parse_args([*BASE, *flags.split()]), World(size=processes), default_dtype)
    assert len([line for line in plan.warnings if warned is None or warned in line]) == (warned is not None), plan.warnings


@pytest.mark.parametrize(
    ("flags", "not_proposed"),
    [
        ("--per_layer --accumulate moments --total_batch_size 64 --grad_clipping 1.0", "--grad_norm_growth"),
        ("--optimizer adamw_per_layer --accumulate moments --total_batch_size 64 --grad_clipping 1.0", "--grad_norm_growth"),
        ("--peft_model relora --relora 50 --scheduler linear --num_training_steps 2000", "--restart_warmup_steps 100"),
    ],
)
def test_no_way_out_is_proposed_that_is_itself_refused(flags, not_proposed):
    args = [*BASE, *flags.split()]
    try:
        lines = [*notices(parse_args(args)), *make_plan(parse_args(args), World()).warnings]
    except ConfigError as error:
        lines = error.problems
    assert lines
    assert not_proposed not in "\n".join(lines)


def test_all_problems_of_an_optimizer_are_named_at_once():
    flags = "--peft_model sltrain --optimizer spectron8bit --embedding_states 4bit --train_scaling"
    with pytest.raises(ConfigError) as refused:
        make_plan(parse_args([*BASE, *flags.split()]), World())
    assert ["--train_scaling" in line for line in refused.value.problems] == [True, False]
    assert "--embedding_states 4bit" in refused.value.problems[1]


def test_a_scale_that_stalls_training_gives_a_warning():
    argv = [*BASE, "--peft_model", "sltrain", "--rank", "16", "--lora_alpha", "32", "--lr", "0.003"]
    assert any("stall" in line for line in make_plan(parse_args(argv), World()).warnings)
    assert not make_plan(parse_args([*argv, "--lora_alpha", "4"]), World()).warnings
