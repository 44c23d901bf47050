"""A sweep's file: lists make grids, every run is checked before the first starts, and runs are distinct."""

from pathlib import Path

import pytest
import yaml

from peft_pretraining.commands.sweep.settings import load_sweep, without_warm_ups
from peft_pretraining.config.arguments import ConfigError

ROOT = Path(__file__).resolve().parents[3]
BASE = {"model_config": str(ROOT / "configs/llama_demo.json"), "dataset": "demo", "batch_size": 4, "max_length": 64}

RELORA = {"peft_model": "relora", "relora": 4}
SHORT = {"num_training_steps": 50, "warmup_steps": 5}


def sweep_of(tmp_path, **changes):
    values = {"folder": str(tmp_path / "runs"), "seeds": [42], "base": BASE, "settings": [{"peft_model": "full"}]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return load_sweep(path)


def problems_of(tmp_path, **changes):
    with pytest.raises(ConfigError) as caught:
        sweep_of(tmp_path, **changes)
    return "\n".join(caught.value.problems)


def test_lists_make_a_grid_for_every_seed(tmp_path):
    sltrain = {"peft_model": "sltrain", "rank": [8, 16], "sp_ratio": [0.1, 0.2]}
    found = sweep_of(tmp_path, settings=[{"peft_model": "full", "lr": [0.1, 0.2]}, sltrain], seeds=[1, 2])
    assert len(found.runs) == 2 * (2 + 4)
    assert [run.args.seed for run in found.runs] == [1] * 6 + [
        2
    ] * 6  # all settings of one seed come first, so that they can be compared early
    pairs = {(run.args.rank, run.args.sp_ratio) for run in found.runs if run.args.peft_model == "sltrain"}
    assert pairs == {(8, 0.1), (8, 0.2), (16, 0.1), (16, 0.2)}
    assert all(run.args.batch_size == 4 and run.args.max_length == 64 for run in found.runs)


def test_folder_names_contain_the_setting_and_the_seed(tmp_path):
    found = sweep_of(tmp_path, settings=[{"peft_model": "sltrain", "lr": 0.002}], base={**BASE, "rank": [8, 16]})
    assert [run.name for run in found.runs] == ["sltrain-rank8-lr0.002-seed42", "sltrain-rank16-lr0.002-seed42"]
    assert found.runs[0].folder == tmp_path / "runs" / found.runs[0].name


def test_an_entry_takes_precedence_over_the_base(tmp_path):
    found = sweep_of(tmp_path, settings=[{"lr": 0.5}, {"lr": 0.25}], base={**BASE, "lr": 0.125, "compile": True})
    assert [run.args.lr for run in found.runs] == [0.5, 0.25]
    assert all(run.args.compile for run in found.runs)


def test_a_full_rank_run_comes_before_the_runs_that_start_from_it(tmp_path):
    """The full-rank run is made once for all settings that share it, with the base's flags, and is not compared with them."""
    entry = {**RELORA, "lr": [0.1, 0.2], "rank": 8, "num_training_steps": 12, "warm_up": {"lr": 0.5, "warmup_steps": 2}}
    found = sweep_of(tmp_path, settings=[entry], seeds=[1, 2], base={**BASE, "num_training_steps": 6, "warmup_steps": 1})
    assert [run.args.peft_model for run in found.runs] == ["full", "relora", "relora"] * 2
    warm, first, second = found.runs[:3]
    assert (warm.args.lr, warm.args.warmup_steps, warm.args.num_training_steps, warm.args.relora) == (0.5, 2, 6, None)
    assert [run.args.lr for run in (first, second)] == [0.1, 0.2]
    assert {run.args.num_training_steps for run in (first, second)} == {12}
    assert {run.args.warmed_up_model for run in (first, second)} == {str(warm.folder)}
    assert f"--warmed_up_model={warm.folder}" in first.argv
    assert found.runs[3].folder != warm.folder  # each seed has its own
    assert without_warm_ups(found.runs) == [first, second, *found.runs[4:]]


def test_full_rank_runs_differ_by_lists_of_the_base(tmp_path):
    entry = {**RELORA, "warm_up": {"lr": 0.5, "num_training_steps": 5000}}
    found = sweep_of(tmp_path, settings=[entry], base={**BASE, "max_length": [32, 64]})
    assert [(run.args.peft_model, run.args.max_length) for run in found.runs] == [
        *(("full", 32), ("relora", 32)),
        *(("full", 64), ("relora", 64)),
    ]
    assert len({run.name for run in found.runs}) == 4


def test_equal_full_rank_runs_are_made_once(tmp_path):
    """For any order of their flags, and if they differ only in flags without effect on full-rank training."""
    first = {"lr": 0.5, **SHORT}
    entries = [
        {**RELORA, "lr": lr, "warm_up": dict(order)} for lr, order in ((0.1, first.items()), (0.2, reversed(first.items())))
    ]
    found = sweep_of(tmp_path, settings=entries, base={**BASE, "rank": [8, 16]})
    assert [run.args.peft_model for run in found.runs] == ["full", *["relora"] * 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [1, 1]}, "seeds [1, 1]: must be a list of different whole numbers"),
        ({"seeds": 42}, "seeds 42"),
        ({"settings": []}, "settings: must be a list of mappings"),
        ({"settings": [[]]}, "settings: must be a list of mappings"),
        ({"settings": [[{"lr": 1.0}, 3]]}, "settings: must be a list of mappings"),
        (
            {"settings": [[{"lr": 1.0, "search": [{"keep": 1}]}, {"lr": 2.0, "search": [{"keep": 1}]}]]},
            "search: give it to one of the mappings that compete as one entry, not to 2",
        ),
        ({"folder": None}, "folder None: name the folder"),
        ({"nproc_per_node": 0}, "nproc_per_node 0"),
        ({"setings": [{}]}, "unknown key 'setings' (did you mean settings?)"),
        ({"settings": [{"lr": []}]}, "lr: is an empty list"),
        ({"settings": [{"lr": {"a": 1}}]}, "lr: must be a value or a list of values"),
        ({"settings": [{"seed": 3}]}, "seed: give the seeds as `seeds`"),
        ({"base": {**BASE, "save_dir": "x"}}, "save_dir: the sweep names its runs' folders"),
        ({"settings": [{"learning_rate": 1}]}, "learning_rate"),
        ({"settings": [{"lr": [-1.0, 0.1]}]}, "lr-1.0-seed42: --lr -1.0: must be above 0"),
        ({"settings": [{"max_length": 10**6}]}, "max_length1000000-seed42: --max_length 1000000"),
        ({"settings": [{"lr": 0.1}, {"lr": 0.1}]}, "lr0.1-seed42 appears twice"),
        ({"settings": [{**RELORA, "warm_up": 150}]}, "warm_up: must map flags of the full-rank run to one value each"),
        ({"settings": [{**RELORA, "warm_up": {"lr": [1, 2]}}]}, "warm_up: must map flags of the full-rank run"),
        ({"settings": [{**RELORA, "warm_up": {"lr": -1.0}}]}, "warm_up/lr-1.0-seed42: --lr -1.0: must be above 0"),
        ({"settings": [{**RELORA, "warm_up": {"seed": 1}}]}, "seed: give the seeds as `seeds`"),
        ({"settings": [{**RELORA, "warm_up": {"peft_model": "lowrank"}}]}, "peft_model lowrank: ReLoRA starts from"),
        ({"settings": [{**RELORA, "warm_up": {"lr": 1.0}, "warmed_up_model": "x"}]}, "warm_up and warmed_up_model"),
        ({"settings": [{"peft_model": "full", "warm_up": {"lr": 1.0}}]}, "only runs of peft_model: relora start"),
        ({"base": {**BASE, "warm_up": {"lr": 1.0}}}, "warm_up belongs to an entry of settings"),
        (
            {"settings": [{**RELORA, "warm_up": {"lr": 1.0}}]},
            "includes the 10,000 updates of its warm_up, so none are left",
        ),
        ({"settings": [{**RELORA, "max_length": 32, "warm_up": SHORT}]}, "max_length 32: its warm_up has 64"),
        ({"settings": [{**RELORA, "total_batch_size": 8, "warm_up": SHORT}]}, "total_batch_size 8: its warm_up has 4"),
        (
            {"settings": [{**RELORA, "model_config": str(ROOT / "configs/llama_9m.json"), "warm_up": SHORT}]},
            "that of its warm_up is",
        ),
        (
            {"settings": [{**RELORA, "dataset": "elsewhere", "warm_up": SHORT}]},
            "dataset elsewhere: its warm_up has demo",
        ),
        (
            {"base": {**BASE, "lr": [0.1, 0.2]}, "settings": [{**RELORA, "lr": 0.3, "warm_up": SHORT}]},
            "warm_up: lr: the base has a list, and this entry overrides it",
        ),
        (
            {
                "settings": [
                    {**RELORA, "lr": 1 + number, "warm_up": {**SHORT, "tags": name}} for number, name in enumerate(("a/b", "a_b"))
                ]
            },
            "num_training_steps50-tagsa_b-warmup_steps5-seed42 appears twice",
        ),
    ],
)
def test_invalid_sweeps_are_refused_by_name(tmp_path, changes, words):
    assert words in problems_of(tmp_path, **changes)


def test_all_problems_of_a_sweep_are_reported_at_once(tmp_path):
    message = problems_of(tmp_path, settings=[{"lr": -1.0}, {"rank": 0}])
    assert "--lr -1.0" in message
    assert "--rank 0" in message


@pytest.mark.parametrize("content", ["- 1", "a: [", "\x00"])
def test_a_file_that_is_not_a_sweep_is_refused(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_sweep(path)
    with pytest.raises(ConfigError, match="none"):
        load_sweep(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_sweeps_plan_every_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = load_sweep(path)
    assert len({run.name for run in found.runs}) == len(found.runs) > 1


def test_the_rank_delta_sweep_equals_the_published_ablation(monkeypatch):
    """Every pair of the paper's Tables 6 and 7, at the published setting."""
    from peft_pretraining.commands.report.published import RANK_AND_DELTA

    monkeypatch.chdir(ROOT)
    runs = load_sweep(ROOT / "scripts/sweeps/rank_delta_60m.yaml").runs
    assert {(run.args.rank, run.args.sp_ratio) for run in runs} == set(RANK_AND_DELTA)
    for run in runs:
        assert (run.args.lr, run.args.lora_alpha, run.plan.total_batch_size) == (0.003, 32.0, 512)
        assert (run.plan.num_training_steps, run.args.warmup_steps) == (11_000, 1_100)


def test_a_search_is_checked_before_the_first_run(tmp_path):
    """Rounds without `keep`, with lists, with flags that the sweep sets, and with values that cannot work."""
    for search, said in (
        ([{"num_training_steps": 2}], "each with `keep`"),
        ({"keep": 0}, "each with `keep`"),
        ([{"keep": 1, "lr": [1, 2]}], "search: lr: a round's runs have one value"),
        ([{"keep": 1, "seed": 3}], "seed: give the seeds as `seeds`"),
        ([{"keep": 1, "warmup_steps": 100}], "--warmup_steps 100"),
        ([{"keep": 2}, {"keep": 1, "lr_factors": 0.5}], "lr_factors 0.5: must be a list of factors"),
        ([{"keep": 2}, {"keep": 1, "lr_factors": [1, 0]}], "lr_factors [1, 0]: must be a list of factors"),
        ([{"keep": 2}, {"keep": 1, "lr_factors": [-10]}], "lr_factors [-10]"),
        ([{"keep": 1, "lr_factors": [0.5]}], "lr_factors: the first round has no best setting yet"),
    ):
        assert said in problems_of(tmp_path, base=BASE | SHORT, settings=[{"lr": [0.1, 0.2]}], search=search)


def test_a_round_tries_multiples_of_the_best_settings_learning_rates(tmp_path):
    """Of every group, also in the names of the runs; the same setting competes once; a rate that is not a number is refused."""
    entries = [
        {"lr": [0.4, 0.2], "sparse_lr": 0.003, "weight_decay": 0.1},
        {**RELORA, "lr": "1e-1", "relora": 2, "warm_up": {"lr": 0.5, "num_training_steps": 1}},
    ]
    search = [{"num_training_steps": 2, "keep": 2}, {"keep": 1, "lr_factors": [0.5, 0.25]}]
    found = sweep_of(tmp_path, base=BASE | SHORT | {"warmup_steps": 1}, settings=entries, search=search)
    candidates = found.candidates(1, [entry.settings for entry in found.entries])
    rates = [[(flags["lr"], flags.get("sparse_lr")) for flags in (each.flags for each in entry)] for entry in candidates]
    assert rates == [[(0.4, 0.003), (0.2, 0.003), (0.2, 0.0015), (0.1, 0.00075)], [("1e-1", None), (0.05, None), (0.025, None)]]
    assert all(setting.flags["weight_decay"] == 0.1 for setting in candidates[0])
    assert {setting.warm_up.flags["lr"] for setting in candidates[1]} == {0.5}
    names = [[runs[-1].name for runs in entry] for entry in found.search_round(1, candidates)]
    assert names[0][2] == "lr0.2-sparse_lr0.0015-weight_decay0.1-seed42"
    base = BASE | SHORT | {"warmup_steps": 1}
    same = sweep_of(tmp_path, base=base, settings=[{"lr": [0.4, 0.2]}], search=search)
    assert len(same.candidates(1, [entry.settings for entry in same.entries])[0]) == 3
    assert "lr half" in problems_of(tmp_path, base=base, settings=[{"lr": ["half", 0.2]}], search=search)
    assert "has no lr" in problems_of(tmp_path, base=base, settings=[{"rank": [2, 4]}], search=search)


def test_a_list_of_mappings_competes_as_one_entry(tmp_path):
    """A grid and a point outside it: as an entry of one mapping with the same combinations."""
    search = [{"num_training_steps": 2, "keep": 1}]
    found = sweep_of(
        tmp_path,
        base=BASE | SHORT | {"warmup_steps": 1},
        settings=[[{"lr": [0.1, 0.2]}, {"lr": 0.4, "search": search}], {"lr": 0.8}],
        seeds=[1, 2],
    )
    assert [[setting.flags["lr"] for setting in entry.settings] for entry in found.entries] == [[0.1, 0.2, 0.4], [0.8]]
    rounds = found.search_round(0, [entry.settings for entry in found.entries])
    assert [[runs[-1].name for runs in entry] for entry in rounds] == [["lr0.1-seed1", "lr0.2-seed1", "lr0.4-seed1"], []]
    assert [run.name for run in found.runs] == [f"lr{lr}-seed{seed}" for seed in (1, 2) for lr in (0.1, 0.2, 0.4, 0.8)]
