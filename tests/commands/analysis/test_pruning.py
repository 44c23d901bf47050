"""The pruning study: rows equal those of matrices built by hand, have the expected order, and interrupted studies resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_pretraining.__main__ import main
from peft_pretraining.checkpoint.step_folder import list_checkpoints, resolve
from peft_pretraining.commands.analysis import study
from peft_pretraining.commands.analysis.decompose import target_linears
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.data.loader import EvalSet
from peft_pretraining.data.source import open_source
from peft_pretraining.export.load import load_model
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.training.evaluate import evaluate
from sparse_lora import SLTrainConfig, reparameterize

CPU = torch.device("cpu")
R, SHARE = 6, 0.1
Trained = Callable[[str], Path]
Capsys = pytest.CaptureFixture[str]


def pruning(capsys: Capsys, checkpoint: Path, *flags: str) -> dict:
    argv = ["pruning", "--checkpoint", str(checkpoint), "--rank", str(R), "--sp_ratio", str(SHARE), "--device", "cpu"]
    assert main([*argv, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def by_name(figures: dict) -> dict[str, dict]:
    return {row["row"]: row for row in figures["rows"]}


@pytest.fixture(scope="session")
def whole_study(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Makes all six rows for the tiny full-rank run, with 6 updates for the trained ones; returns the content of --out."""
    out = tmp_path_factory.mktemp("study") / "study.json"
    flags = ["--rank", str(R), "--sp_ratio", str(SHARE), "--steps", "6", "--device", "cpu", "--out", str(out)]
    assert main(["pruning", "--checkpoint", str(trained("full")), *flags]) == 0
    return json.loads(out.read_text())


def test_the_study_has_the_rows_of_the_papers_table(whole_study: dict) -> None:
    rows = whole_study["rows"]
    names = ["full", "low_rank", "top_pruned", "random_pruned", "top_trained", "random_trained"]
    assert [row["row"] for row in rows] == names == list(study.ROWS)
    assert [row["updates"] for row in rows] == [0, 0, 0, 0, 6, 6]
    assert len({row["tokens"] for row in rows}) == 1
    assert not any(row["skipped_updates"] for row in rows)
    assert len({row["loss"] for row in rows}) == 6
    settings = whole_study["settings"]
    assert (settings["rank"], settings["sp_ratio"], settings["steps"], settings["lr"]) == (R, SHARE, 6, 0.01)


@pytest.mark.parametrize("name", ["full", "full_bf16", "full_packed", "galore"])
def test_the_first_row_equals_the_runs_evaluation(trained: Trained, capsys: Capsys, name: str) -> None:
    run = trained(name)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = next(row for row in reversed(rows) if "final_eval_loss" in row)
    found = by_name(pruning(capsys, run, "--steps", "0"))["full"]
    assert found["loss"] == pytest.approx(own["final_eval_loss"], rel=1e-6)
    assert found["tokens"] == own["final_eval_tokens"]
    assert found["bits_per_byte"] == pytest.approx(own["final_eval_bits_per_byte"], rel=1e-6)
    assert found["relative_error"] == 0


def weights_by_hand(run: Path) -> tuple[torch.nn.Module, dict[str, dict[str, Tensor]]]:
    """Returns the checkpoint's model, and each linear's weight in each row without training, calculated with plain torch."""
    model, _, record = load_model(run, CPU)
    drawn, _, _ = load_model(run, CPU)
    config = SLTrainConfig(rank=R, sparsity=SHARE, alpha=1.0, seed=record["arguments"]["seed"])
    reparameterize(drawn, config)  # SLTrain's own layers, for the random support of this seed
    rows: dict[str, dict[str, Tensor]] = {"full": {}, "low_rank": {}, "top_pruned": {}, "random_pruned": {}}
    for name, linear in target_linears(model).items():
        weight = linear.get_parameter("weight").detach().double()
        U, s, Vh = torch.linalg.svd(weight)
        low_rank = U[:, :R] @ torch.diag(s[:R]) @ Vh[:R]
        residual = (weight - low_rank).flatten()
        nnz = int(SHARE * weight.numel())
        positions = {"top": residual.abs().argsort(descending=True)[:nnz]}
        positions["random"] = drawn.get_submodule(name).support.flat_indices()
        assert len(positions["random"]) == nnz
        rows["full"][name], rows["low_rank"][name] = weight, low_rank
        for kind, where in positions.items():
            sparse = torch.zeros_like(residual)
            sparse[where] = residual[where]
            rows[f"{kind}_pruned"][name] = low_rank + sparse.view_as(weight)
    return model, rows


def test_pruned_rows_equal_those_of_dense_weights(trained: Trained, tiny_run: list[str], whole_study: dict) -> None:
    """Losses and errors equal those of ordinary linears whose weights are set to L0 or L0 + S."""
    model, rows = weights_by_hand(trained("full"))
    args = parse_args([*tiny_run, "--batch_size", "8"])
    _, tokenizer, _ = load_model(trained("full"), CPU)
    held_out = open_source(args.dataset, "validation")
    eval_set = EvalSet(held_out, tokenizer, max_length=64, packing=False, max_tokens=None, batch_size=8)
    linears = target_linears(model)
    norm = sum(float(weight.square().sum()) for weight in rows["full"].values()) ** 0.5
    for row, weights in rows.items():
        with torch.no_grad():
            for name, weight in weights.items():
                linears[name].get_parameter("weight").copy_(weight)
        found = by_name(whole_study)[row]
        assert found["loss"] == pytest.approx(evaluate(TokenLoss(model), eval_set).loss, rel=1e-5), row
        error = sum(float((rows["full"][name] - weight).square().sum()) for name, weight in weights.items()) ** 0.5
        assert found["relative_error"] == pytest.approx(error / norm, abs=1e-6), row


def test_the_errors_have_the_expected_order(whole_study: dict) -> None:
    """Keeping entries of the residual lowers the error, and keeping the largest lowers it most."""
    error = {name: row["relative_error"] for name, row in by_name(whole_study).items()}
    assert 0 == error["full"] < error["top_pruned"] < error["random_pruned"] < error["low_rank"] < 1
    # A random share of the residual's entries has about that share of its squared norm.
    assert (error["random_pruned"] / error["low_rank"]) ** 2 == pytest.approx(1 - SHARE, abs=0.03)
    # Pruned entries are the best values on their support, so training increases the error.
    assert error["top_trained"] > error["top_pruned"]
    assert error["random_trained"] > error["random_pruned"]


def test_the_same_command_gives_the_same_figures(trained: Trained, tmp_path: Path, capsys: Capsys, whole_study: dict) -> None:
    again = pruning(capsys, trained("full"), "--steps", "6")
    assert again == whole_study


def test_the_seed_determines_the_random_support(trained: Trained, capsys: Capsys, whole_study: dict) -> None:
    first, other = by_name(whole_study), by_name(pruning(capsys, trained("full"), "--steps", "0", "--seed", "7"))
    assert list(other) == ["full", "low_rank", "top_pruned", "random_pruned"]
    for name in ("full", "low_rank", "top_pruned"):
        assert other[name] == first[name]
    assert other["random_pruned"]["loss"] != first["random_pruned"]["loss"]


def test_training_changes_sparse_values_only(trained: Trained, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training lowers the loss on the first batches of the training data."""
    original, seen = study.train_sparse_parts, []

    def watched(module, args, plan, data, device):
        state = data.loader.state_dict()
        batches = iter(data.loader)
        first = [next(batches) for _ in range(3)]
        data.loader.take_back(state)
        before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
        losses = [evaluate(module, first).loss]
        skipped = original(module, args, plan, data, device)
        losses.append(evaluate(module, first).loss)
        after = module.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        seen.append((losses, changed, data.loader.state_dict() == state))
        return skipped

    monkeypatch.setattr(study, "train_sparse_parts", watched)
    pruning(capsys, trained("full"), "--steps", "20", "--lr", "0.003")
    assert len(seen) == 2
    for losses, changed, taken_back in seen:
        assert losses[1] < losses[0]
        assert len(changed) == 14
        assert all(name.endswith(".sparse_value") for name in changed)
        assert taken_back


def test_an_interrupted_study_resumes(
    trained: Trained, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, whole_study: dict
) -> None:
    out = tmp_path / "new" / "study.json"
    flags = ["--rank", str(R), "--sp_ratio", str(SHARE), "--steps", "6", "--device", "cpu", "--out", str(out)]
    original, calls = study.train_sparse_parts, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(study, "train_sparse_parts", interrupted)
    argv = ["pruning", "--checkpoint", str(trained("full")), *flags]
    assert main(argv) == 130
    assert [row["row"] for row in json.loads(out.read_text())["rows"]] == list(study.ROWS)[:5]
    capsys.readouterr()
    assert main(argv) == 0
    assert len(calls) == 3  # finished rows are not made again
    assert json.loads(out.read_text()) == whole_study
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "checkpoint W",
        f"best rank-{R} part L0",
        "L0 + largest 0.1 of the residual",
        "L0 + random 0.1 of the residual",
        "L0 + S trained, support of the largest",
        "L0 + S trained, random support",
    ]
    # The file of another study is not overwritten.
    before = out.read_bytes()
    assert main([*argv, "--seed", "9", "--lr", "1"]) == 2
    error = capsys.readouterr().err
    assert "lr was 0.01, is now 1.0; seed was 42, is now 9); name another file" in error
    assert out.read_bytes() == before


def test_the_study_can_use_other_data(trained: Trained, tmp_path: Path, capsys: Capsys, whole_study: dict) -> None:
    """--dataset replaces the run's training and held-out data, --eval_dataset only the held-out data."""
    lines = [json.dumps({"text": f"Cat {n} sleeps under tree {n * 3}. " * 3}) for n in range(40)]
    (tmp_path / "cats-train.jsonl").write_text("\n".join(lines[:30]) + "\n")
    (tmp_path / "cats-validation.jsonl").write_text("\n".join(lines[30:]) + "\n")
    other = by_name(pruning(capsys, trained("full"), "--steps", "2", "--dataset", str(tmp_path), "--batch_size", "4"))
    assert other["full"]["tokens"] != by_name(whole_study)["full"]["tokens"]
    held_out = by_name(
        pruning(capsys, trained("full"), "--steps", "0", "--eval_dataset", str(tmp_path / "cats-validation.jsonl"))
    )
    for name in ("full", "low_rank", "top_pruned", "random_pruned"):
        assert held_out[name]["loss"] == pytest.approx(other[name]["loss"], rel=1e-6)
    few = by_name(pruning(capsys, trained("full"), "--steps", "0", "--eval_tokens", "50"))
    assert 50 <= few["full"]["tokens"] < 50 + 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "32"], "--rank 32: leaves no residual of model.layers.0.self_attn.q_proj, whose shorter side is 32"),
        (["--rank", "0"], "--rank 0: must be at least 1"),
        (["--sp_ratio", "0"], "--sp_ratio 0.0: must lie strictly between 0 and 1"),
        (["--sp_ratio", "nan"], "--sp_ratio nan: must be a finite number"),
        (["--sp_ratio", "0.0001"], "--sp_ratio 0.0001: leaves no entry in a weight of 32 x 32"),
        (["--steps", "-1"], "--steps -1: must be 0 or more"),
        (["--lr", "0"], "--lr 0.0: must be above 0"),
        (["--batch_size", "3"], "--total_batch_size 8: not a multiple of --batch_size 3"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--eval_tokens", "0"], "--eval_tokens 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must not be negative"),
        (["--dataset", "/no/such/folder"], "/no/such/folder"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_invalid_arguments_of_pruning_are_refused(
    trained: Trained, tmp_path: Path, capsys: Capsys, flags: list[str], message: str
) -> None:
    run = trained("full")
    capsys.readouterr()
    out = tmp_path / "out.json"
    assert main(["pruning", "--checkpoint", str(run), "--rank", str(R), "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize("name", ["sltrain", "lowrank"])
def test_a_checkpoint_of_another_method_is_refused(trained: Trained, capsys: Capsys, name: str) -> None:
    assert main(["pruning", "--checkpoint", str(trained(name)), "--rank", str(R)]) == 2
    assert f"weights of --peft_model {name} are already factored" in capsys.readouterr().err


def test_unusable_checkpoints_and_output_files_are_refused(trained: Trained, tmp_path: Path, capsys: Capsys) -> None:
    (checkpoint,) = list_checkpoints(trained("full"))
    (tmp_path / "other.json").write_text('{"rows": [1]}')
    for checkpoint_flag, out, message in [
        (tmp_path / "nothing", tmp_path / "x.json", "is not a checkpoint and contains none"),
        (checkpoint, checkpoint / "study.json", f"is inside the checkpoint {checkpoint}"),
        (checkpoint, tmp_path, f"--out {tmp_path}: is a folder; name a file"),
        (checkpoint, tmp_path / "other.json", "does not hold the rows of a study"),
        (checkpoint, tmp_path / "other.json" / "x.json", f"--out {tmp_path / 'other.json'}: cannot be created"),
    ]:
        argv = ["pruning", "--checkpoint", str(checkpoint_flag), "--rank", str(R), "--out", str(out)]
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "other.json").read_text() == '{"rows": [1]}'
    assert resolve(checkpoint) == checkpoint


def test_biases_are_kept(trained: Trained) -> None:
    """L0 replaces only the weight."""
    model, _, _ = load_model(trained("full"), CPU)
    layer = model.get_submodule("model.layers.0.mlp")
    biased = torch.nn.Linear(32, 48)
    layer.up_proj = biased
    splits = study.split_model(model, R, SHARE, 0)
    assert torch.equal(layer.up_proj.bias, biased.bias)
    study.set_sparse_parts(splits, "top")
    split = splits["model.layers.0.mlp.up_proj"]
    wanted = split.squared_residual - float(split.values["top"].square().sum())
    left = (biased.weight - layer.up_proj.dense_weight()).detach().double()
    assert float(left.square().sum()) == pytest.approx(wanted, rel=1e-4)
    trained_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained_names == {f"{name}.sparse_value" for name in splits}
