"""Runs that differ only in their seed are one setting; runs that cannot be compared are separated or noted."""

import itertools
import json

import pytest
from run_records import change_document, evaluation, rows_of, write_rows, write_run

from peft_pretraining.commands.report.groups import _own_part, against_baseline, group_runs
from peft_pretraining.commands.report.read import read_run
from peft_pretraining.commands.report.tables import (
    command_of,
    methods_table,
    problems,
    published_memory_table,
    rank_delta_table,
    run_names,
)
from peft_pretraining.record.intervals import t_quantile


def groups_of(*folders):
    return group_runs([read_run(folder) for folder in folders])


@pytest.fixture
def three(tmp_path):
    """Full-rank runs, and SLTrain runs with ten percent more perplexity, with three seeds each."""
    full = [write_run(tmp_path / f"f{seed}", method="full", seed=seed, perplexity=30.0 + seed) for seed in (1, 2, 3)]
    own = [write_run(tmp_path / f"s{seed}", seed=seed, perplexity=1.1 * (30.0 + seed)) for seed in (1, 2, 3)]
    return full + own


def test_seeds_are_grouped_with_mean_and_interval(three):
    full, own = groups_of(*three)
    assert (full.label, own.label) == ("full-rank", "SLTrain")
    assert (full.perplexity.n, full.perplexity.mean) == (3, 32.0)
    assert full.perplexity.half == pytest.approx(t_quantile(2) / 3**0.5)  # of 31, 32, 33: standard deviation 1


def test_the_gap_to_full_rank_is_paired_by_seed(three):
    """Ten percent in each pair gives ten percent without scatter, although the perplexities scatter."""
    groups = groups_of(*three)
    rival, gap = against_baseline(groups[1], groups)
    assert rival is groups[0]
    assert (gap.mean, gap.low, gap.high, gap.n) == pytest.approx((1.1, 1.1, 1.1, 3))
    assert against_baseline(groups[0], groups) is None


def test_the_gap_is_to_the_best_full_rank_setting(tmp_path):
    better = write_run(tmp_path / "a", method="full", lr=0.001, perplexity=30.0)
    worse = write_run(tmp_path / "b", method="full", lr=0.01, perplexity=60.0)
    groups = groups_of(worse, better, write_run(tmp_path / "c", perplexity=33.0))
    assert against_baseline(groups[2], groups)[1].mean == pytest.approx(1.1)


def test_without_full_rank_the_first_setting_is_the_baseline(tmp_path):
    plain = [write_run(tmp_path / f"p{seed}", seed=seed, perplexity=30.0 + seed) for seed in (1, 2)]
    other = [write_run(tmp_path / f"o{seed}", "--lr", "0.01", seed=seed, perplexity=0.9 * (30.0 + seed)) for seed in (1, 2)]
    longer = write_run(tmp_path / "l", "--num_training_steps", "20", perplexity=20.0)
    groups = groups_of(*plain, *other, longer)
    baseline, gap = against_baseline(groups[1], groups)
    assert baseline is groups[0]
    assert (gap.mean, gap.n) == pytest.approx((0.9, 2))
    assert against_baseline(groups[0], groups) is against_baseline(groups[2], groups) is None


@pytest.mark.parametrize(
    "flags",
    [("--lr", "0.01"), ("--rank", "64"), ("--sp_ratio", "0.05"), ("--packing",), ("--num_training_steps", "20"),
     ("--total_batch_size", "16"), ("--max_length", "128"), ("--optimizer", "adamw"), ("--support", "block")],
)  # fmt: skip
def test_runs_with_other_arguments_are_another_setting(tmp_path, flags):
    groups = groups_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", *flags, seed=1))
    assert len(groups) == 2
    assert groups[0].label != groups[1].label


def test_arguments_without_effect_make_no_difference(tmp_path):
    """Full-rank training has no rank; folder, logging and micro-batches do not change results."""
    first = write_run(tmp_path / "a", method="full")
    flags = ("--rank", "64", "--sp_ratio", "0.1", "--log_every", "5", "--name", "x", "--batch_size", "4")
    second = write_run(tmp_path / "b", *flags, "--total_batch_size", "8", method="full", seed=1)
    assert len(groups_of(first, second)) == 1


def test_separate_full_rank_starts_are_the_same_setting(tmp_path):
    """Each seed of ReLoRA starts from its own full-rank run; starting from one at all is a difference of settings."""
    first, second, without = (
        write_run(tmp_path / name, "--relora", "5", *more, method="relora", seed=seed)
        for name, more, seed in (
            ("a", ("--warmed_up_model", str(tmp_path)), 0),
            ("b", ("--warmed_up_model", str(tmp_path.parent)), 1),
            ("c", (), 2),
        )
    )
    groups = groups_of(first, second, without)
    assert [len(group.runs) for group in groups] == [2, 1]
    assert "warmed_up_model" in groups[0].label


def test_memory_is_that_of_the_run_not_of_its_warm_up(tmp_path):
    """Not that of the full-rank run whose record it continues."""
    folder = write_run(tmp_path / "a")
    rows = rows_of(folder)
    memory = {f"memory_{name}_{side}": 1 for name in ("parameters", "support", "optimizer") for side in ("measured", "predicted")}
    own = [number for number, row in enumerate(rows) if "loss" in row]
    rows[own[0]] |= dict.fromkeys(memory, 100) | {"max_memory": 10**12, "throughput_tokens": 1.0}
    rows[own[-1]] |= dict.fromkeys(memory, 7)
    write_rows(folder, rows)
    change_document(folder, lambda document: document.update(warm_up={"updates": rows[own[0]]["update_step"]}))
    run = read_run(folder)
    assert (run.figures["peak_memory_bytes"], run.figures["tokens_per_second"]) == (2**30 + 10, 500.0)
    assert (run.measured("parameters"), run.predicted("optimizer"), run.figures["states_bytes"]) == (7, 7, 21)


def test_other_data_is_another_setting(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    change_document(second, lambda document: document["dataset"].update(fingerprint="e" * 32))
    groups = groups_of(first, second)
    assert len(groups) == 2
    assert any("differ in model, data, batch or length" in line for line in problems(groups))


def test_other_held_out_files_are_another_task(tmp_path):
    """Their number of evaluated tokens can be the same."""
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    for folder, fingerprint in zip(folders, ("a" * 32, "b" * 32), strict=True):
        change_document(folder, lambda document, tag=fingerprint: document["dataset"].update(held_out_fingerprint=tag))
    groups = groups_of(*folders)
    assert [group.label for group in groups] == ["SLTrain, held-out data aaaaaa", "SLTrain, held-out data bbbbbb"]
    assert any("differ in model, data, batch or length" in line for line in problems(groups))


def test_another_order_of_the_data_is_another_setting(tmp_path):
    """Records of earlier versions name no order: they are by lanes."""
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in range(4)]
    for folder, order in zip(folders[1:], ("lanes", "global", "global"), strict=True):
        change_document(folder, lambda document, order=order: document["dataset"].update(order=order))
    groups = groups_of(*folders)
    assert sorted((group.settings["data_order"], len(group.runs)) for group in groups) == [("global", 2), ("lanes", 2)]


def test_another_evaluation_set_is_another_task(tmp_path):
    """Perplexities on different texts are neither averaged nor compared."""
    full = write_run(tmp_path / "full", method="full", seed=1)
    own, other = write_run(tmp_path / "own", seed=1), write_run(tmp_path / "other", seed=2)
    change_document(other, lambda document: document["arguments"].update(eval_dataset="other-texts"))
    groups = groups_of(full, own, other)
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    assert [against_baseline(group, groups) is None for group in groups] == [True, False, True]


def test_a_seed_counts_once(tmp_path):
    """Counting the same run twice would narrow the interval."""
    (group,) = groups_of(*(write_run(tmp_path / name, perplexity=value) for name, value in (("a", 30.0), ("b", 34.0))))
    assert (group.perplexity.mean, group.perplexity.n) == (30.0, 1)
    assert "b repeats the settings and seed (42) of" in group.notes[0]


def test_unfinished_runs_are_listed_but_not_averaged(tmp_path):
    (group,) = groups_of(write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2, reached=3))
    assert (len(group.runs), group.perplexity.n) == (2, 1)
    (alone,) = groups_of(tmp_path / "b")
    assert alone.perplexity is None


def test_evaluations_on_different_numbers_of_tokens_are_noted(tmp_path):
    first, second = write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2)
    rows = rows_of(second)
    write_rows(second, [*rows[:-1], evaluation(10, 30.0) | {"final_eval_tokens": 500}])
    (group,) = groups_of(first, second)
    assert "different numbers of tokens (20,000, 500)" in group.notes[0]


def test_published_figures_are_shown_for_the_same_configuration(tmp_path):
    other = write_run(tmp_path / "c", model="llama_9m")
    groups = groups_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", "--rank", "160"), other)
    published = [group.published and group.published.perplexity for group in groups]
    assert published == [34.15, 33.20, None]  # Table 2, Table 6 or 7, not published
    column = methods_table(groups).headings.index("published perplexity (tokens)")
    assert [row[column] for row in methods_table(groups).rows] == ["34.15 (1.1B)", "33.20 (1.1B)", "—"]


@pytest.mark.parametrize(
    ("flags", "method", "model", "perplexity"),
    [
        ((), "lowrank", "llama_60m", 78.18),
        (("--rank", "64"), "lowrank", "llama_60m", None),
        (("--rank", "64"), "full", "llama_60m", 34.06),  # has no rank
        (("--rank", "64"), "sltrain", "llama_60m", None),
        (("--sp_ratio", "0.1"), "sltrain", "llama_60m", None),
        (("--sp_ratio", "0.1"), "galore", "llama_60m", 34.88),  # has no delta
        (("--rank", "256"), "sltrain", "llama_130m", 26.04),
        ((), "sltrain", "llama_130m", None),
    ],
)
def test_published_figures_are_not_shown_for_another_rank_or_delta(tmp_path, flags, method, model, perplexity):
    """A published figure at the paper's rank is not shown for another rank."""
    (group,) = groups_of(write_run(tmp_path / "a", *flags, method=method, model=model))
    assert (group.published and group.published.perplexity) == perplexity


def test_the_table_names_the_baseline(three):
    table = methods_table(groups_of(*three))
    column = next(number for number, heading in enumerate(table.headings) if "baseline" in heading)
    assert [row[column] for row in table.rows] == ["baseline", "+10.0 [+10.0, +10.0] (n = 3)"]


def test_default_values_are_not_part_of_a_label(tmp_path):
    groups = groups_of(*(write_run(tmp_path / init, "--init", init) for init in ("default", "svd")))
    assert [group.label for group in groups] == ["SLTrain", "SLTrain, init = svd"]


def test_a_switch_that_is_usually_on_is_in_a_label_where_it_is_off(tmp_path):
    groups = groups_of(*(write_run(tmp_path / value, "--decay_norms", value) for value in ("true", "false")))
    assert [group.label for group in groups] == ["SLTrain", "SLTrain, decay_norms = false"]


def test_measured_memory_is_the_mean_over_seeds(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    for folder, value in zip(folders, (10, 30), strict=True):
        rows = rows_of(folder)
        rows[1] |= {"memory_parameters_measured": value, "max_memory": 2**31 + value}
        write_rows(folder, rows)
    (group,) = groups_of(*folders)
    assert (group.measured("parameters"), group.measured("peak")) == (20, 2**31 + 20)


def test_runs_of_the_same_name_are_shown_with_their_folder(tmp_path):
    runs = [read_run(write_run(tmp_path / name)) for name in ("one/a", "two/a", "two/b")]
    assert list(run_names(runs).values()) == ["one/a", "two/a", "b"]


def test_published_peaks_are_shown_for_the_models_that_were_run(tmp_path):
    groups = groups_of(write_run(tmp_path / "a", model="llama_350m"), write_run(tmp_path / "b"))
    table = published_memory_table(groups)
    assert table.headings == ("published setting", "llama_350m: peak, GB")
    assert table.rows[0] == ("full-rank, Adam", "4.5")
    assert published_memory_table(groups_of(tmp_path / "b")) is None


def test_columns_without_any_value_are_left_out(tmp_path):
    table = methods_table(groups_of(write_run(tmp_path / "a", model="llama_9m")))
    assert not any("published" in heading for heading in table.headings)
    assert all(len(row) == len(table.headings) for row in table.rows)


def test_rank_and_delta_make_a_table(tmp_path):
    """Rows are ranks, columns deltas, with published values; combinations without runs are a dash."""
    pairs = [("96", "0.03"), ("128", "0.03"), ("128", "0.05")]
    folders = [
        write_run(tmp_path / str(number), "--rank", rank, "--sp_ratio", delta, perplexity=40.0 + number)
        for number, (rank, delta) in enumerate(pairs)
    ]
    table = rank_delta_table(groups_of(*folders))
    assert table.headings == ("rank", "δ = 0.03: perplexity", "δ = 0.05: perplexity")
    assert table.rows == (
        ("r = 96", "40.00 (n = 1); published 34.80", "—"),
        ("r = 128", "41.00 (n = 1); published 34.15", "42.00 (n = 1); published 33.41"),
    )
    assert rank_delta_table(groups_of(folders[0])) is None
    other = write_run(tmp_path / "muon", "--rank", "96", "--sp_ratio", "0.05", "--optimizer", "muon", perplexity=30.0)
    assert rank_delta_table(groups_of(*folders, other)) is None


@pytest.mark.parametrize(
    "flags",
    [
        "--packing --activation_checkpointing --dtype bf16",
        "--weight_dtype int8 --optimizer adamw --stochastic_rounding false",
        "--weight_dtype int8 --optimizer adamw",
    ],
)
def test_the_printed_command_makes_the_same_run(tmp_path, flags):
    """Parsed again, it gives the recorded arguments, except the folder; also where a default depends on another flag."""
    from peft_pretraining.config.arguments import as_dict
    from peft_pretraining.config.command_line import parse_args

    run = read_run(write_run(tmp_path / "a", *flags.split()))
    words = command_of(run).split()
    assert words[:2] == ["python", "torchrun_main.py"]
    again = as_dict(parse_args(words[2:]))
    recorded = run.document["arguments"]
    differing = {name for name in again if again[name] != recorded[name]}
    assert differing == {"save_dir"}


@pytest.mark.parametrize(
    ("world", "start"),
    [
        ({"processes": 1, "local_processes": 1}, "python"),
        ({"processes": 4, "local_processes": 4}, "torchrun --standalone --nproc_per_node 4"),
        ({"processes": 4}, "torchrun --standalone --nproc_per_node 4"),  # of an earlier version
        (
            {"processes": 16, "local_processes": 8},
            "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400",
        ),
    ],
)
def test_the_printed_command_starts_as_many_processes(tmp_path, world, start):
    folder = write_run(tmp_path / "a")
    change_document(folder, lambda document: document.update(world=world))
    assert command_of(read_run(folder)).startswith(f"{start} torchrun_main.py --")


def test_relora_settings_differ_by_the_arguments_of_their_full_rank_start(tmp_path):
    """Folders of the full-rank runs differ by seed, so their arguments are compared instead."""
    groups = {}
    for lr, updates, seed in itertools.product((0.001, 0.002), (50, 100), (1, 2)):
        folder = write_run(
            tmp_path / f"{lr}-{updates}-{seed}",
            "--relora",
            "5",
            "--warmed_up_model",
            str(tmp_path),
            method="relora",
            seed=seed,
        )
        warm_up = {"updates": updates, "arguments": {"peft_model": "full", "lr": lr, "rank": seed, "seed": seed}}
        change_document(folder, lambda document, found=warm_up: document.update(warm_up=found))
        groups.setdefault((lr, updates), []).append(folder)
    found = groups_of(*(folder for folders in groups.values() for folder in folders))
    assert [[run.folder for run in group.runs] for group in found] == list(groups.values())
    assert found[1].label == "ReLoRA, warm-up lr = 0.001, warm-up updates = 100"


def test_all_groups_have_different_labels(tmp_path):
    number = itertools.count()
    folders = [
        write_run(tmp_path / str(next(number)), "--rank", rank, "--weight_decay", decay, method=method)
        for rank in ("64", "128") for decay in ("0", "0.1") for method in ("lowrank", "sltrain")
    ]  # fmt: skip
    labels = [group.label for group in groups_of(*folders)]
    assert len(set(labels)) == len(folders)
    assert "SLTrain, r = 64, weight_decay = 0.1" in labels


def test_labels_of_a_sweeps_runs_are_short(tmp_path):
    """Of runs that no setting tells apart, only the part of the folder's name that differs; of a path, its last part."""
    names = [f"sltrain-num_training_steps10-warmup_steps1-lr0.003-data{letter}-seed42" for letter in "ab"]
    folders = [write_run(tmp_path / name) for name in names]
    for folder, letter in zip(folders, "ab", strict=True):
        document = json.loads((folder / "run.json").read_text())
        document["dataset"]["fingerprint"] = "f" * 6 + letter * 26
        document["arguments"]["tokenizer"] = f"/a/long/path/{letter}.model"
        (folder / "run.json").write_text(json.dumps(document))
    labels = [group.label for group in groups_of(*folders)]
    assert all("sltrain-num" not in label and "/a/long" not in label and len(label) < 60 for label in labels)
    assert len(set(labels)) == 2


@pytest.mark.parametrize(("names", "own"), [(["a-lr1-seed1", "a-lr2-seed1"], ["lr1", "lr2"]), (["a", "a-b"], ["a", "b"])])
def test_the_own_part_of_a_name(names, own):
    assert [_own_part(name, names) for name in names] == own
