"""`python -m peft_pretraining spectra` on checkpoints of every method: figures, files, invalid arguments."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peft_pretraining.__main__ import main
from peft_pretraining.checkpoint.step_folder import list_checkpoints, resolve
from peft_pretraining.commands.analysis.figures import drawn_names, kind_and_layer
from peft_pretraining.export.load import load_model

KINDS = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
]
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]
Trained = Callable[[str], Path]


def spectra(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main(["spectra", *flags, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])  # the fixture may have printed lines before


@pytest.mark.parametrize("name", ["full", "full_bf16", "galore", "lowrank", "sltrain", "sltrain_scaled", "sltrain_block"])
def test_spectra_of_every_method_equal_those_of_the_dense_weights(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """W's singular values equal those of the loaded model's dense weights."""
    flags = ["--checkpoint", str(trained(name)), "--out", str(tmp_path)]
    figures = spectra(capsys, *flags, "--only", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
    assert [linear["name"] for linear in figures["linears"]] == [NAMES[0], NAMES[-1]]
    model, _, _ = load_model(trained(name), torch.device("cpu"))
    for linear in figures["linears"]:
        module = model.get_submodule(linear["name"])
        weight = module.dense_weight() if hasattr(module, "dense_weight") else module.weight
        expected = torch.linalg.svdvals(weight.detach().double())
        found = linear["singular_values"]
        assert found["weight"] == pytest.approx(expected.tolist(), abs=1e-5 * float(expected[0]))
        if "residual" in linear:
            assert linear["contributions"] == {}
        else:
            total = [sum(values) for values in zip(*linear["contributions"].values(), strict=True)]
            assert total == pytest.approx(found["weight"], rel=1e-9, abs=1e-12)
    dense = name.startswith("full") or name == "galore"
    assert all(("residual" in linear) == dense for linear in figures["linears"])
    assert all(("sparse" in linear["contributions"]) == name.startswith("sltrain") for linear in figures["linears"])
    assert sorted(figures["files"]) == sorted(str(path) for path in tmp_path.iterdir())


def test_spectra_writes_a_table_and_pictures(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One picture per kind of linear; the table has all linears and the values of the JSON output."""
    figures = spectra(capsys, "--checkpoint", str(trained("sltrain")), "--out", str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    assert [linear["name"] for linear in figures["linears"]] == NAMES
    assert {path.name for path in folder.iterdir()} == {"spectra.csv", *(f"spectra-{kind}.png" for kind in KINDS)}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    with (folder / "spectra.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # As in the figures, whose first singular value has the index 1.
    assert rows[0]["index"] == "1"
    assert all(int(row["index"]) == 1 for row, last in zip(rows[1:], rows, strict=False) if row["name"] != last["name"])
    assert len(rows) == sum(len(linear["singular_values"]["weight"]) for linear in figures["linears"])
    for linear in figures["linears"]:
        own = [row for row in rows if row["name"] == linear["name"]]
        for part in ("weight", "low_rank", "sparse"):
            values = [float(row[part]) for row in own if row[part]]
            assert values == pytest.approx(linear["singular_values"][part], rel=1e-6)
        for part in ("low_rank", "sparse"):
            values = [float(row[f"{part}_contribution"]) for row in own]
            assert values == pytest.approx(linear["contributions"][part], rel=1e-6)


def test_figures_are_written_beside_the_checkpoint_which_stays_intact(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("sltrain")
    (checkpoint,) = list_checkpoints(run)
    first = spectra(capsys, "--checkpoint", str(run), "--only", "q_proj")
    second = spectra(capsys, "--checkpoint", str(checkpoint), "--only", "q_proj")
    assert first == second
    assert {Path(file).parent for file in first["files"]} == {run / "spectra-step_00000008"}
    assert resolve(run) == checkpoint
    assert list_checkpoints(run) == [checkpoint]


def test_only_selects_linears(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", str(trained("full")), "--out", str(tmp_path)]
    figures = spectra(capsys, *flags, "--only", "layers.1.mlp.u", "0.self_attn.q", "--rank", "3", "--sp_ratio", "0.2")
    expected = [n for n in NAMES if "layers.1.mlp.u" in n or "0.self_attn.q" in n]
    assert [linear["name"] for linear in figures["linears"]] == expected
    residuals = [linear["residual"] for linear in figures["linears"]]
    assert {(found["rank"], found["share"]) for found in residuals} == {(3, 0.2)}
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("name", "words"), [("full", ["||W-W_r||", "top 3.00%"]), ("sltrain", ["S of first r"]), ("lowrank", [])]
)
def test_spectra_prints_a_table(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str]
) -> None:
    assert main(["spectra", "--checkpoint", str(trained(name)), "--out", str(tmp_path), "--only", "q_proj"]) == 0
    lines = capsys.readouterr().out.splitlines()
    while not lines[0].startswith("linear"):  # the fixture may have printed lines before
        lines.pop(0)
    assert all(word in lines[0] for word in ["largest s", "stable rank", *words])
    assert [line.split()[0] for line in lines[1:3]] == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert str(tmp_path / "spectra.csv") in lines


def test_flags_for_dense_weights_give_a_notice_for_others(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(trained("sltrain")), "--out", str(tmp_path), "--only", "q_proj"]
    assert main(["spectra", *flags, "--rank", "400", "--sp_ratio", "0.5"]) == 0
    error = capsys.readouterr().err
    for flag in ("--rank", "--sp_ratio"):
        assert f"notice: {flag} has no effect on a checkpoint of sltrain" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "32"], "--rank 32: leaves no residual of model.layers.0.self_attn.q_proj, whose shorter side is 32"),
        (["--rank", "0"], "--rank 0: must be at least 1"),
        (["--sp_ratio", "0"], "--sp_ratio 0.0: must lie strictly between 0 and 1"),
        (["--sp_ratio", "1"], "--sp_ratio 1.0: must lie strictly between 0 and 1"),
        (["--only", "lm_head"], "--only lm_head: matches none of the model's 14 linears"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_invalid_arguments_of_spectra_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    run = trained("full")
    capsys.readouterr()
    assert main(["spectra", "--checkpoint", str(run), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_unusable_folders_are_refused_by_spectra(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectra", "--checkpoint", str(tmp_path / "nothing")]) == 2
    assert "is not a checkpoint and contains none" in capsys.readouterr().err
    (checkpoint,) = list_checkpoints(trained("full"))
    for inside in (checkpoint, checkpoint / "figures"):
        assert main(["spectra", "--checkpoint", str(trained("full")), "--out", str(inside)]) == 2
        assert f"--out {inside}: is inside the checkpoint {checkpoint}" in capsys.readouterr().err
    assert resolve(checkpoint) == checkpoint


def test_a_folder_that_cannot_be_created_is_refused_before_measuring(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = trained("full"), tmp_path / "file"
    file.touch()
    capsys.readouterr()
    assert main(["spectra", "--checkpoint", str(run), "--out", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # no linear has been measured
    assert f"--out {file}: cannot be created (File exists); name another folder" in line


@pytest.mark.parametrize("name", ["full", "sltrain"])
def test_pictures_show_the_figures(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Singular values, contributions and residual magnitudes are drawn as measured, one row per layer."""
    from matplotlib import pyplot

    kept: list = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    flags = ["--checkpoint", str(trained(name)), "--out", str(tmp_path), "--only", "q_proj"]
    linears = spectra(capsys, *flags)["linears"]
    monkeypatch.undo()
    (figure,) = kept
    panels = {axes.get_title(): axes for axes in figure.axes}
    lines = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in figure.axes]
    for layer, linear in enumerate(linears):
        own = panels[f"layer {layer}, 32 x 32"]
        shown = {str(line.get_label()): list(line.get_ydata()) for line in own.get_lines()}
        found = linear["singular_values"]
        assert shown["W"] == found["weight"]
        assert own.get_yscale() == "log"
        if name == "sltrain":
            assert (shown["low-rank part"], shown["S"]) == (found["low_rank"], found["sparse"])
            assert any(linear["contributions"]["sparse"] in axes for axes in lines)
        else:
            assert any(linear["residual"]["below"] in axes for axes in lines)
    pyplot.close(figure)


def test_four_of_many_layers_are_drawn() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(24)]
    assert [kind_and_layer(name) for name in sorted(drawn_names(names))] == [
        *(("mlp.up_proj", 0), ("mlp.up_proj", 15), ("mlp.up_proj", 23), ("mlp.up_proj", 8)),
    ]
    assert drawn_names(names[:3]) == set(names[:3])
    assert drawn_names(["alone"]) == {"alone"}
    assert kind_and_layer("alone") == ("alone", 0)
