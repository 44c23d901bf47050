"""`python -m peft_pretraining import`: published checkpoints resume as in the published program, or are refused with a reason."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_models
import pytest
import torch
from outcomes import tensors_of
from published_models import HF_MLP, PUBLISHED_MLP, Reference, reference, trained_a_while, write
from transformers.optimization import Adafactor

import torchrun_main
from peft_pretraining.__main__ import main
from peft_pretraining.commands.published.fill import matching_sparsity
from peft_pretraining.commands.published.moments import _plain
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed.world import World
from peft_pretraining.export.load import load_model
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.run.build import build_data

Captured = pytest.CaptureFixture[str]
RELORA = ("--relora", "100")
OWN_SETTINGS: dict[Any, dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.9},
    Adafactor: {"relative_step": False, "scale_parameter": False, "warmup_init": False},
}
METHOD_FLAGS = {"relora": RELORA, "relora_scaled": RELORA}


@pytest.fixture
def flags(tiny_run: list[str]) -> list[str]:
    """Returns the trainer's flags, without those of the model."""
    return [
        *tiny_run[2:],
        *("--batch_size", "8", "--max_length", "64", "--optimizer", "adamw", "--lr", "0.003", "--warmup_steps", "2"),
        *("--num_training_steps", "8", "--eval_every", "100", "--save_every", "100", "--wandb", "disabled"),
        *("--device", "cpu", "--workers", "0"),
    ]


def imported(capsys: Captured, published: Path, run: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["import", "--published", str(published), "--save_dir", str(run), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def resumed_rows(done: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs the printed command; returns the rows of its updates."""
    words = shlex.split(done["command"])
    argv = words[words.index("torchrun_main.py") + 1 :]
    assert torchrun_main.main(argv) == 0
    run = Path(done["checkpoint"]).parent
    return [row for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]


def reference_losses(model: Reference, optimizer: Any, done: dict[str, Any], rows: list[dict[str, Any]]) -> list[float]:
    """Returns the losses of the published program's arithmetic, on the same batches with the same learning rates."""
    words = shlex.split(done["command"])
    args = parse_args(words[words.index("torchrun_main.py") + 1 :])
    world = World()
    loader = build_data(args, make_plan(args, world, "float32"), world, torch.device("cpu")).loader
    losses = []
    for batch, row in zip(loader, rows, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        losses.append(model.step(optimizer, batch.input_ids, batch.labels))
    loader.close()
    return losses


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("sltrain", {}),
        ("sltrain", {"safe": True, "prefix": "module.wrapped_model."}),
        ("sltrain", {"shards": 3}),
        ("sltrain_scaled", {"prefix": "wrapped_model."}),
        ("relora", {"safe": True, "shards": 2}),
        ("relora_scaled", {}),
        ("lowrank", {}),
        ("full", {}),
    ],
)
def test_an_imported_model_has_the_published_ones_logits(
    tmp_path: Path, capsys: Captured, flags: list[str], method: str, form: dict[str, Any]
) -> None:
    model = reference(method)
    published = write(tmp_path / "published", model, **form)
    done = imported(capsys, published, tmp_path / "run", *flags, *METHOD_FLAGS.get(method, ()))
    ours, _, record = load_model(tmp_path / "run", torch.device("cpu"))
    ids = torch.randint(0, 320, (2, 24))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, model.logits(ids), rtol=1e-5, atol=1e-5)
    assert done["method"] == method.removesuffix("_scaled")
    assert (done["update_step"], done["tokens_seen"], Path(done["checkpoint"]).name) == (3, 12345, "step_00000003")
    assert record["continued_from"] == str(published)
    assert any("no optimizer.pt" in line for line in done["not_carried_over"])


@pytest.mark.parametrize("mlp", [PUBLISHED_MLP, HF_MLP])
@pytest.mark.parametrize("method", ["sltrain", "sltrain_scaled", "relora_scaled", "lowrank", "full"])
def test_moments_are_assigned_to_their_parameters(
    tmp_path: Path, capsys: Captured, flags: list[str], method: str, mlp: tuple[str, ...]
) -> None:
    """For both published LLaMA classes, whose parameters have different numbers."""
    model = reference(method, mlp)
    optimizer = trained_a_while(model)
    published = write(tmp_path / "published", model, optimizer, safe=True)
    imported(capsys, published, tmp_path / "run", *flags, *METHOD_FLAGS.get(method, ()))
    found = tensors_of(tmp_path / "run")
    assert sum(name.endswith("/exp_avg") for name in found) == len(model.parameters)
    for name, parameter in model.parameters.items():
        ours = name.replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B")
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(found[f"optimizer/{ours}/{key}"], optimizer.state[parameter][key])


@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [
        ("sltrain", torch.optim.AdamW, ["--weight_decay", "0.1", "--total_batch_size", "8"]),
        ("sltrain_scaled", torch.optim.Adam, ["--optimizer", "adam"]),
        ("sltrain", torch.optim.Adam, ["--optimizer", "adam_per_layer"]),
        ("relora", torch.optim.AdamW, [*RELORA, "--weight_decay", "0"]),
        ("full", torch.optim.SGD, ["--optimizer", "sgd", "--beta1", "0.9"]),
        ("sltrain", Adafactor, ["--optimizer", "adafactor"]),
        ("sltrain", "Adam8bit", ["--optimizer", "adam8bit", "--embedding_states", "8bit"]),
    ],
)
def test_training_continues_with_the_published_losses(
    tmp_path: Path, capsys: Captured, flags: list[str], method: str, kind: Any, more: list[str]
) -> None:
    """With moments the losses are equal; without them later losses differ."""
    if kind == "Adam8bit":
        kind = pytest.importorskip("bitsandbytes").optim.Adam8bit
    model = reference(method)
    settings = {"weight_decay": 0.1 if "0.1" in more else 0.0, **OWN_SETTINGS.get(kind, {})}
    optimizer = trained_a_while(model, kind, **settings)
    with_moments = write(tmp_path / "published", model, optimizer)
    without = write(tmp_path / "without", model)
    done = imported(capsys, with_moments, tmp_path / "run", *flags, *more)
    assert "optimizer: moments and step counts" in done["carried_over"]
    rows = resumed_rows(done)
    assert [row["update_step"] for row in rows] == [4, 5, 6, 7, 8]
    assert rows[0]["tokens_seen"] > 12345
    # Published: linear warm-up, then a cosine down to a tenth; the update after k finished ones has rate number k.
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * (k - 2) / (8 - 2))) for k in range(3, 8)]
    assert [row["lr"] for row in rows] == pytest.approx([0.003 * share for share in cosine])
    losses = [row["loss"] for row in rows]
    expected = reference_losses(model, optimizer, done, rows)
    assert losses == pytest.approx(expected, rel=2e-6)
    others = [row["loss"] for row in resumed_rows(imported(capsys, without, tmp_path / "other", *flags, *more))]
    assert others[0] == pytest.approx(losses[0], rel=2e-6)
    assert others[-1] != pytest.approx(losses[-1], rel=1e-4)


def test_bfloat16_is_kept_or_widened_with_a_note(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    model = reference("sltrain")
    model.parameters = {name: tensor.detach().bfloat16() for name, tensor in model.parameters.items()}
    published = write(tmp_path / "published", model)
    done = imported(capsys, published, tmp_path / "run", *flags)
    assert "--dtype=bfloat16" in done["argv"]
    wide = imported(capsys, published, tmp_path / "wide", *flags, "--dtype", "float32")
    assert any(line.startswith("dtype bfloat16: ") for line in wide["not_carried_over"])
    narrow, widened = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "wide")
    for name in (name for name in narrow if name.startswith("model/") and not name.endswith(".code")):
        assert narrow[name].dtype == torch.bfloat16
        assert torch.equal(narrow[name].float(), widened[name])


def test_weights_that_are_stored_in_int8_are_named_as_rounded(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    published = write(tmp_path / "published", reference("sltrain"))
    done = imported(capsys, published, tmp_path / "run", *flags, "--weight_dtype", "int8")
    assert any("rounded to --weight_dtype int8" in line for line in done["not_carried_over"])
    tensors = tensors_of(tmp_path / "run")
    assert tensors["model/model.embed_tokens.weight"].dtype == torch.int8
    assert [row["update_step"] for row in resumed_rows(done)] == [4, 5, 6, 7, 8]


def test_moments_of_another_optimizer_are_converted_or_named(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    model = reference("sltrain")
    optimizer = trained_a_while(model)
    published = write(tmp_path / "published", model, optimizer)
    imported(capsys, published, tmp_path / "quantised", *flags, "--optimizer", "adam8bit")
    found = tensors_of(tmp_path / "quantised")
    norm = model.parameters["model.norm.weight"]  # too small to be quantised
    assert torch.equal(found["optimizer/model.norm.weight/state1"].flatten(), optimizer.state[norm]["exp_avg"])
    done = imported(capsys, published, tmp_path / "other", *flags, "--optimizer", "sgd")
    assert (
        "moments: optimizer.pt is of adam, whose state --optimizer sgd cannot use; they start at zero" in done["not_carried_over"]
    )
    assert not any(name.startswith("optimizer/") for name in tensors_of(tmp_path / "other"))


@pytest.mark.parametrize("block", [256, 2048])
def test_8_bit_moments_are_read_in_old_and_new_blocks(block: int) -> None:
    numel = 5000
    codes = torch.randint(0, 256, (numel,), dtype=torch.uint8)
    book, scales = torch.linspace(-1, 1, 256), torch.rand(-(-numel // block))
    expected = torch.tensor([book[int(code)] * scales[place // block] for place, code in enumerate(codes)])
    assert torch.equal(_plain({"state1": codes, "qmap1": book, "absmax1": scales}, 1), expected)


def test_a_galore_checkpoint_continues_as_galore(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    """Its optimizer.pt contains objects of GaLore's own class, which are not loaded but named."""
    published = write(tmp_path / "published", reference("full"))
    torch.save({"optimizer": {"state": {0: {"projector": Projector()}}}}, published / "optimizer.pt")
    done = imported(capsys, published, tmp_path / "run", *flags, "--optimizer", "galore_adamw", "--rank", "4")
    assert done["method"] == "galore"
    named = "\n".join(done["not_carried_over"])
    assert "test_import.Projector), which is refused; they start at zero" in named
    assert "projections: recomputed from the gradients of the first update" in named
    assert [row["update_step"] for row in resumed_rows(done)] == [4, 5, 6, 7, 8]


class Projector:
    """Replaces galore_torch's class."""


class Evil:
    """An object that writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, capsys: Captured, flags: list[str], legacy: bool) -> None:
    published = write(tmp_path / "published", reference("sltrain"))
    file = published / "pytorch_model.bin"
    torch.save({"a": Evil(tmp_path / "ran")}, file, _use_new_zipfile_serialization=not legacy)
    assert main(["import", "--published", str(published), "--save_dir", str(tmp_path / "run"), *flags]) == 2
    message = capsys.readouterr().err
    assert "loading it would run code" in message
    assert "safetensors.torch.save_file as model.safetensors" in message
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()
    torch.load(file, weights_only=False)  # shows that loading it would run code
    assert (tmp_path / "ran").exists()


def test_import_prints_what_it_did_and_the_command_to_continue(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    model = reference("sltrain")
    published = write(tmp_path / "published", model, trained_a_while(model, betas=(0.9, 0.95)), state=False)
    (tmp_path / "more.json").write_text(json.dumps({"lr": 0.001, "grad_clipping": 1.0, "seed": 5}))
    more = ["--config", str(tmp_path / "more.json"), "--num_training_steps", "3", "--lr", "0.002", "--beta2", "0.99"]
    capsys.readouterr()
    assert main(["import", "--published", str(published), "--save_dir", str(tmp_path / "a run"), *flags, *more]) == 0
    said, noted = capsys.readouterr()
    for line in (
        "updates made: 3",  # from optimizer.pt
        "tokens seen: not recorded in training_state.json; counted from 0",
        "betas (0.9, 0.95): (0.9, 0.99) from now on",
        "lr 0.002 (published: 0.003)",
        "grad_clipping 1.0 (published: 0.0)",
        "no updates are left",
        "random states: initialised from --seed 5",
    ):
        assert line in said
    assert "total_batch_size" not in said.partition("continue with")[0]
    command = shlex.split(said.splitlines()[-1])
    assert command[0] == "torchrun"
    argv = command[command.index("torchrun_main.py") + 1 :]
    assert torchrun_main.main([*argv, "--num_training_steps", "4", "--allow_changes", "num_training_steps"]) == 0
    rows = (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["update_step"] == 4
    assert "error" not in noted


def test_an_import_without_counts_begins_at_update_0(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    done = imported(capsys, write(tmp_path / "published", reference("full"), state=False), tmp_path / "run", *flags)
    assert Path(done["checkpoint"]).name == "step_00000000"
    assert [row["update_step"] for row in resumed_rows(done)] == list(range(1, 9))


def test_a_tied_head_may_be_missing(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    model = reference("full")
    del model.parameters["lm_head.weight"]
    published = write(tmp_path / "published", model)
    settings("config.json", tie_word_embeddings=True)(published)
    done = imported(capsys, published, tmp_path / "run", *flags)
    ours, _, _ = load_model(tmp_path / "run", torch.device("cpu"))
    model.fixed["lm_head.weight"] = model.parameters["model.embed_tokens.weight"]
    ids = torch.randint(0, 320, (2, 24))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, model.logits(ids), rtol=1e-5, atol=1e-5)
    assert len(resumed_rows(done)) == 5


@pytest.mark.parametrize(("rows", "columns", "share"), [(116, 100, 0.01), (820, 100, 0.01), (640, 640, 0.03)])
def test_the_published_number_of_values_is_kept_despite_rounding(rows: int, columns: int, share: float) -> None:
    count = int(share * (rows * columns))
    tensors = {
        "q.lora_A": torch.empty(1, columns),
        "q.lora_B": torch.empty(rows, 1),
        "q.sparse_index": torch.empty(count),
    }
    found = matching_sparsity(share, tensors)
    assert found == pytest.approx(share, rel=1e-15)
    assert int(found * rows * columns) == count
    if rows != columns:  # the unchanged sparsity gives one less
        assert int(share * rows * columns) == count - 1


Q = "model.layers.0.self_attn.q_proj"


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        tensors = torch.load(folder / "pytorch_model.bin")
        change(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")

    return act


def positions(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return change_weights(lambda tensors: tensors.update({f"{Q}.sparse_index": change(tensors[f"{Q}.sparse_index"])}))


def settings(name: str = "splora_config.json", **values: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(found | values))

    return act


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


def with_entry(index: torch.Tensor, place: int, value: int) -> torch.Tensor:
    changed = index.clone()
    changed[place] = value
    return changed


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"
COUNT = int(0.1 * 32 * 32)
WRONG: list[tuple[Callable[[Path], object], list[str], str]] = [
    (lambda folder: (folder / "pytorch_model.bin").unlink(), [], "holds neither model.safetensors nor pytorch_model.bin"),
    (lambda folder: (folder / "config.json").unlink(), [], "has no config.json"),
    (lambda folder: (folder / "splora_config.json").unlink(), [], "but neither splora_config.json nor relora_config.json"),
    (truncate("pytorch_model.bin"), [], "damaged, or not a file of torch.save; copy it again"),
    (truncate("optimizer.pt"), [], "or move the file away to import the weights alone"),
    (text("model.safetensors", "x" * 100), [], "model.safetensors: cannot be read"),
    *((text(file, POINTER), [], f"{file}: is a git-lfs pointer") for file in ("model.safetensors", "pytorch_model.bin")),
    (text("splora_config.json", "{"), [], "splora_config.json: cannot be read"),
    (text("relora_config.json", "{}"), [], "has both splora_config.json and relora_config.json"),
    (text("config.json", "[]"), [], "must hold one JSON object"),
    (settings(sp_ratio=1.5), [], "sp_ratio 1.5: must lie strictly between 0 and 1"),
    (settings(r=0, lora_alpha="2"), [], "r 0: must be a whole number of at least 1; lora_alpha '2': must be a number above 0"),
    (settings(trainable_scaling=True), [], "the weights have no `scaling`"),
    (settings(sp_ratio=0.2), [], f"sparse_index has {COUNT} positions, sp_ratio in splora_config.json requires 204 of 32 x 32"),
    (settings(r=4), [], f"{Q}.lora_A has shape (8, 32), config.json and the rank require (4, 32)"),
    (settings("training_state.json", update_step=-1), [], "update_step -1: must be a whole number from 0 to 99999999"),
    (settings("training_state.json", tokens_seen=1.5), [], "tokens_seen 1.5: must be a whole number"),
    (settings("config.json", tie_word_embeddings=True), [], "ties lm_head to the embedding, but their weights differ"),
    (settings("config.json", hidden_size=30), [], "hidden_size = 30, num_attention_heads = 4"),
    (change_weights(lambda t: t.pop(f"{Q}.lora_B")), [], f"{Q}.lora_B: missing; exactly the linears of attention and MLP"),
    (change_weights(lambda t: t.update({"model.extra": torch.ones(1)})), [], "model.extra: unknown"),
    (change_weights(lambda t: t.update({f"module.{Q}.lora_A": torch.ones(1)})), [], f"holds {Q}.lora_A twice"),
    (change_weights(lambda t: t[f"{Q}.lora_A"][0, 0].fill_(torch.nan)), [], f"{Q}.lora_A holds non-finite numbers"),
    (change_weights(lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"].int()})), [], f"{Q}.lora_A is torch.int32, not"),
    (positions(lambda index: index.float()), [], "sparse_index is torch.float32 of shape"),
    (positions(lambda index: index.flip(0)), [], "positions must increase strictly"),
    (positions(lambda index: with_entry(index, 1, int(index[0]))), [], "twice at 0: positions must increase strictly"),
    (positions(lambda index: with_entry(index, -1, 1024)), [], "holds 1024; positions must be 0 .. 1023"),
    (positions(lambda index: with_entry(index, 0, -5).int()), [], "holds -5, a 32-bit overflow; positions must be 0 .. 1023"),
    (lambda folder: torch.save([1], folder / "pytorch_model.bin"), [], "must hold tensors by name"),
    (lambda folder: torch.save({"a": 1}, folder / "optimizer.pt"), [], "holds no state under `optimizer`"),
    (lambda folder: torch.save({"optimizer": {"state": 3}}, folder / "optimizer.pt"), [], "not the state of an optimizer"),
    (lambda folder: None, ["--rank", "4"], "--rank 4: "),
    (lambda folder: None, ["--sp_ratio", "0.2"], "--sp_ratio 0.2: "),
    (lambda folder: None, ["--peft_model", "full"], "and the weights require sltrain; leave the flag out"),
    (lambda folder: None, ["--support", "block"], "and the weights require uniform"),
    (lambda folder: None, ["--train_scaling"], "--train_scaling True: "),
    (lambda folder: None, ["--continue_from", "."], "--continue_from .: not allowed in an import"),
    (lambda folder: None, ["--max_length", "4096"], "--max_length 4096"),
    (lambda folder: None, ["--model_config", "configs/llama_9m.json"], "hidden_size is 128, "),
]  # fmt: skip


@pytest.fixture(scope="module")
def intact() -> tuple[Reference, Any]:
    model = reference("sltrain")
    return model, trained_a_while(model)


@pytest.mark.parametrize(("damage", "more", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_invalid_published_checkpoints_are_refused_and_leave_no_files(
    tmp_path: Path,
    capsys: Captured,
    flags: list[str],
    intact: tuple[Reference, Any],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    published = write(tmp_path / "published", *intact)
    damage(published)
    assert main(["import", "--published", str(published), "--save_dir", str(tmp_path / "run"), *flags, *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_support_that_is_not_uniform_is_refused(
    tmp_path: Path, capsys: Captured, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions are stored as one-byte gaps, with room for the few long gaps of a uniform support; 60 long gaps are too many."""
    monkeypatch.setattr(published_models, "CONFIG", published_models.CONFIG | {"hidden_size": 256})
    model = reference("sltrain")
    index = model.fixed[f"{Q}.sparse_index"]
    near = len(index) - 60
    index.copy_(torch.cat((torch.arange(near), near + 700 * torch.arange(60))))
    published = write(tmp_path / "published", model)
    assert main(["import", "--published", str(published), "--save_dir", str(tmp_path / "run"), *flags]) == 2
    assert "its positions are not uniformly distributed over the weight" in capsys.readouterr().err


def test_unusable_folders_are_refused_by_import(tmp_path: Path, capsys: Captured, flags: list[str]) -> None:
    published = write(tmp_path / "published" / "model_3", reference("sltrain"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").write_text("mine")
    assert main(["import", "--published", str(published), "--save_dir", str(tmp_path / "run"), *flags]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "run" / "kept").read_text() == "mine"
    assert main(["import", "--published", str(published.parent), "--save_dir", str(tmp_path / "new"), *flags]) == 2
    assert "name a checkpoint in it: model_3" in capsys.readouterr().err
    assert main(["import", "--published", str(published), *flags]) == 2
    assert "--save_dir is required" in capsys.readouterr().err
