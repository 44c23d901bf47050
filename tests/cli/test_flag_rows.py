"""A resumed run treats a changed flag as the flag's row says, for every flag."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from resealing import reseal
from tiny_model import TINY_MODEL
from tiny_runs import flags_of

import torchrun_main
from peft_pretraining.checkpoint.step_folder import list_checkpoints
from peft_pretraining.config.arguments import ROWS, ConfigError, DataArguments
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.flag import suggested_flag
from peft_pretraining.data.source import open_source
from peft_pretraining.distributed.world import World
from peft_pretraining.methods import has_effect
from peft_pretraining.plan.checks import check
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.run.build import build_data
from peft_pretraining.run.folder import RunFolder, check_same_data, open_run_folder
from peft_pretraining.run.resume import finished_state, restore_data

ROOT = Path(__file__).resolve().parents[2]

# A different value for every flag, as words of the command line. {folder} contains other.json, other-corpus and other.yaml.
CHANGES = {
    "model_config": "{folder}/other.json",
    "dtype": "bfloat16",
    "tf32": "true",
    "weight_dtype": "int8",
    "activation_checkpointing": "layer",
    "compile": "true",
    "use_hf_model": "true",
    "peft_model": "lowrank",
    "rank": "4",
    "sp_ratio": "0.2",
    "lora_alpha": "4",
    "train_scaling": "true",
    "support": "block",
    "linear_path": "factored",
    "linear_cache": "weights",
    "kernels": "torch",
    "lora_dropout": "0.1",
    "update_proj_gap": "100",
    "galore_scale": "0.5",
    "proj_type": "left",
    "start_scale": "0.5",
    "init": "svd",
    "restart_every": "4",
    "rebalance": "true --restart_every 4 --allow_changes restart_every",
    "relora": "2",
    "warmed_up_model": "{folder}",
    "reset_optimizer_on_relora": "false",
    "optimizer_random_pruning": "0.5",
    "optimizer_magnitude_pruning": "0.5",
    "dataset": "{folder}/other-corpus",
    "eval_dataset": "{folder}/other-corpus",
    "text_field": "content",
    "tokenizer": "{folder}/other.model",
    "max_length": "32",
    "packing": "true",
    "document_mask": "true",
    "data_lanes": "8",
    "data_order": "global",
    "workers": "1",
    "on_bad_record": "fail",
    "batch_size": "4 --gradient_accumulation 2",
    "gradient_accumulation": "2 --batch_size 4",
    "total_batch_size": "16",
    "num_training_steps": "32",
    "max_train_tokens": "20k",
    "optimizer": "adam8bit",
    "lr": "0.02",
    "embedding_lr": "0.02",
    "head_lr": "0.02",
    "matrix_lr": "0.02",
    "sparse_lr": "0.02",
    "norm_lr": "0.02",
    "weight_decay": "0.1",
    "decay_embedding": "false",
    "decay_norms": "false",
    "beta1": "0.5",
    "muon_momentum": "0.9",
    "condition_gradients": "true --optimizer muon",
    "reset_moments_every": "4",
    "beta2": "0.95",
    "eps": "1e-6",
    "grad_clipping": "1",
    "grad_norm_growth": "1.01",
    "per_layer": "true",
    "head_gradient": "slices",
    "accumulate": "moments --per_layer",
    "embedding_states": "8bit",
    "stochastic_rounding": "true",
    "scheduler": "linear",
    "min_lr_ratio": "0.2",
    "warmup_steps": "3",
    "cycle_length": "4",
    "restart_warmup_steps": "2",
    "adjust_step": "1 --scheduler cosine_restarts --cycle_length 4 --restart_warmup_steps 1 --allow_changes "
    "scheduler,cycle_length,restart_warmup_steps",
    "save_dir": "{folder}/elsewhere --continue_from {run}",
    "save_every": "4",
    "save_minutes": "20",
    "keep_checkpoints": "1",
    "keep_every": "4",
    "async_save": "true",
    "continue_from": "{run}",
    "resume": "never",
    "on_nonfinite": "stop",
    "allow_changes": "lr",
    "eval_every": "4",
    "eval_tokens": "1000",
    "eval_at_start": "true",
    "log_every": "2",
    "trace": "2",
    "peak_tflops": "100",
    "name": "other",
    "tags": "other",
    "wandb": "offline",
    "tracker": "trackio",
    "seed": "43",
    "device": "auto",
    "memory": "80GB",
    "single_gpu": "true",
    "parallel": "fsdp",
    "reduce_dtype": "bfloat16",
    "compute_dtype": "bfloat16 --parallel fsdp --batch_size 4",
    "reshard_after_forward": "false",
    "timeout_s": "60",
    "force": "true",
    "dry_run": "true",
    "config": "{folder}/other.yaml",
}


# These may always change, so the data has to open at the checkpoint's position with them.
DATA_FLAGS = {field.name for field in dataclasses.fields(DataArguments) if ROWS[field.name].on_resume == "freely"}


def test_this_file_changes_every_flag():
    assert CHANGES.keys() == ROWS.keys()


@dataclass
class Case:
    """A run's folder, its command line, and the folder with other inputs."""

    run: Path
    flags: list[str]
    others: Path

    def resume(self, name: str, allowed: bool) -> RunFolder:
        """Makes the checks of a resumed run, which precede building, with another value of the flag `name`."""
        words = CHANGES[name].format(folder=self.others, run=self.run).split()
        if allowed:
            *words, names = words if "--allow_changes" in words else (*words, "--allow_changes", "")
            words.append(f"{names},{name}")
        world = World(size=2) if name == "compute_dtype" else World()
        args = parse_args([*self.flags, "--save_dir", str(self.run), f"--{name}", *words])
        plan = make_plan(args, world)
        folder = open_run_folder(args, plan, World())
        if folder.checkpoint is not None and finished_state(folder.path, folder.checkpoint, args, plan) is None:
            held_out = open_source(args.eval_dataset or args.dataset, "validation", text_field=args.text_field)
            source = open_source(args.dataset, "train", text_field=args.text_field)
            check_same_data(folder.checkpoint, args, source, held_out)
            if name in DATA_FLAGS:
                data = build_data(args, plan, world, torch.device("cpu"))
                restore_data(folder.checkpoint, data.loader)
        return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory, tiny_run) -> Path:
    folder = tmp_path_factory.mktemp("others")
    (folder / "other.json").write_text(json.dumps(TINY_MODEL | {"num_hidden_layers": 1 + TINY_MODEL["num_hidden_layers"]}))
    (folder / "other.yaml").write_text("log_every: 2\n")
    (folder / "other-corpus").mkdir()
    for split in ("train", "validation"):
        (folder / "other-corpus" / f"words-{split}.jsonl").write_text('{"text": "Another text."}\n' * 9)
    return folder


@pytest.fixture(params=["finished", "unfinished"])
def case(request, trained, tiny_run, others, tmp_path) -> Case:
    """A copy of a tiny run for which the flag has an effect: finished, or changed to have twice as many updates."""
    flag = request.getfixturevalue("name")
    run = next(name for name in ("sltrain", "galore", "relora") if has_effect(flag, name))
    shutil.copytree(trained(run), tmp_path / "run")
    flags = flags_of(run, tiny_run)
    if request.param == "unfinished":
        (path,) = list_checkpoints(tmp_path / "run")
        record = json.loads((path / "run.json").read_text())
        for part in ("arguments", "plan"):
            record[part]["num_training_steps"] = 16
        (path / "run.json").write_text(json.dumps(record))
        reseal(path)
        flags += ["--num_training_steps", "16"]
    return Case(tmp_path / "run", flags, others)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_flag_does_what_its_row_says(case, name):
    """never: refused by name; if_allowed: refused with the way out, and accepted with it; freely: accepted."""
    kind = ROWS[name].on_resume
    if kind == "freely":
        assert case.resume(name, allowed=False)
        return
    word = "num_hidden_layers" if name == "model_config" else f"--{name} "
    with pytest.raises(ConfigError) as refused:
        case.resume(name, allowed=False)
    assert word in str(refused.value)
    assert (f"--allow_changes {name}" in str(refused.value)) == (kind == "if_allowed")
    if kind == "never":
        with pytest.raises(ConfigError, match=f"--allow_changes {name}: cannot change"):
            case.resume(name, allowed=True)
    elif name in ("eval_dataset", "eval_tokens") and "16" not in case.flags:
        with pytest.raises(ConfigError, match=r"is finished .*`python -m peft_pretraining evaluate"):
            case.resume(name, allowed=True)
    else:
        assert case.resume(name, allowed=True).checkpoint is not None


def test_a_finished_run_with_another_evaluation_set_names_the_command_that_evaluates(trained, tiny_run, others, capsys):
    """In the whole program both messages name the command that evaluates, and none says "finished"."""
    flags = [*flags_of("sltrain", tiny_run), "--save_dir", str(trained("sltrain"))]
    other = ["--eval_dataset", str(others / "other-corpus")]
    capsys.readouterr()
    for more in ([], ["--allow_changes", "eval_dataset"]):
        assert torchrun_main.main([*flags, *other, *more]) == 2
        said = capsys.readouterr()
        assert "evaluate --checkpoint" in said.err
        assert str(others / "other-corpus") in said.err
        assert "finished 8 updates" not in said.out
    assert torchrun_main.main(flags) == 0
    assert "finished 8 updates" in capsys.readouterr().out


def test_a_resumed_run_changes_its_evaluation_set_only_if_allowed(tmp_path, trained, tiny_run, others, capsys):
    shutil.copytree(trained("sltrain"), tmp_path / "run")
    flags = [*flags_of("sltrain", tiny_run), "--save_dir", str(tmp_path / "run"), "--num_training_steps", "9"]
    flags += ["--eval_dataset", str(others / "other-corpus"), "--allow_changes"]
    assert torchrun_main.main([*flags, "num_training_steps"]) == 2
    assert "--allow_changes eval_dataset" in capsys.readouterr().err
    assert torchrun_main.main([*flags, "num_training_steps,eval_dataset"]) == 0


def test_the_documentation_names_every_flag_that_is_compared():
    section = (ROOT / "docs" / "resume.md").read_text().split("## What is compared")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    compared = {name for name, row in ROWS.items() if row.on_resume != "freely"}
    assert {name for name in ROWS if any(f"`--{name}`" in row for row in rows)} == compared - {"dataset"}
    assert any("`--allow_changes dataset`" in row for row in rows)


def test_the_flags_that_name_the_default_folder_are_fixed():
    """The flags in the folder's hash are fixed: another set would give existing runs another folder, and train them again."""
    assert {name for name, row in ROWS.items() if row.defines_run and not row.added_later} == {
        *("model_config", "dtype", "peft_model", "rank", "sp_ratio", "lora_alpha", "train_scaling", "support"),
        *("update_proj_gap", "galore_scale", "proj_type", "init", "restart_every", "rebalance"),
        *("relora", "warmed_up_model", "reset_optimizer_on_relora"),
        *("optimizer_random_pruning", "optimizer_magnitude_pruning"),
        *("dataset", "text_field", "tokenizer", "max_length", "packing", "document_mask", "data_lanes", "seed"),
        *("num_training_steps", "max_train_tokens", "total_batch_size"),
        *("optimizer", "lr", "weight_decay", "beta1", "grad_clipping", "scheduler", "min_lr_ratio"),
        *("grad_norm_growth", "per_layer", "embedding_states", "stochastic_rounding", "reduce_dtype", "compute_dtype"),
        *("warmup_steps", "cycle_length", "restart_warmup_steps", "adjust_step"),
    }


def test_flags_that_were_added_later_name_a_folder_of_their_own_only_where_they_are_set(tiny_run):
    def folder(*flags: str) -> Path:
        return make_plan(parse_args([*flags_of("sltrain", tiny_run), *flags]), World()).save_dir

    plain = folder()
    assert plain.name.startswith("tiny-sltrain-")
    for name, row in ROWS.items():
        if row.added_later:
            default = str(getattr(parse_args(flags_of("sltrain", tiny_run)), name))
            assert default == "None" or folder(f"--{name}", default) == plain, name
            assert folder(f"--{name}", *CHANGES[name].split()) != plain, name


def test_a_field_without_a_row_fails_at_import():
    path = ROOT / "peft_pretraining" / "config" / "arguments.py"
    source = path.read_text().replace('    """system"""\n', '    """system"""\n\n    new_flag: int = 0\n')
    with pytest.raises(TypeError, match=r"SystemArguments\.new_flag: a flag needs a row"):
        exec(compile(source, str(path), "exec"), {"__name__": __name__, "__file__": str(path)})


def test_a_row_with_an_unknown_value_of_on_resume_is_refused():
    from peft_pretraining.config.flag import flag

    with pytest.raises(ValueError, match="on_resume 'sometimes'"):
        flag(0, "help", {"on_resume": "sometimes", "defines_run": False})
    with pytest.raises(TypeError, match="on_resume"):
        flag(0, "help", {"defines_run": False})


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--learning_rate", "lr"),
        ("--learning-rate", "lr"),
        ("--lora_r", "rank"),
        ("--sparsity", "sp_ratio"),
        ("--per_device_train_batch_size", "batch_size"),
        ("--gradient_accumulation_steps", "gradient_accumulation"),
        ("--seq_len", "max_length"),
        ("--block_size", "max_length"),
        ("--max_steps", "num_training_steps"),
        ("--warmup_ratio", "warmup_steps"),
        ("--output_dir", "save_dir"),
        ("--max_grad_norm", "grad_clipping"),
        ("--lerning_rate", "lr"),
        ("--zzz", None),
    ],
)
def test_flag_names_of_other_programs_are_suggested(word, meant):
    assert suggested_flag(word, ROWS) == meant
    with pytest.raises(ConfigError) as refused:
        check(parse_args([word, "1"]), World())
    assert (f"did you mean --{meant}?" in str(refused.value)) == (meant is not None)


def test_no_synonym_stands_for_two_flags():
    synonyms = [synonym for row in ROWS.values() for synonym in row.synonyms]
    assert len(synonyms) == len(set(synonyms))
    assert not ROWS.keys() & set(synonyms)
