"""The finetune command, from the files to the merged model, on a task that a frozen encoder cannot solve."""

import gc
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import transformers.modeling_utils
from safetensors import SafetensorError
from small_task import HIDDEN, INNER, LAYERS, rows, write_json, write_model

from peft_pretraining.__main__ import main
from peft_pretraining.commands.finetune import trainer
from peft_pretraining.commands.finetune.adapter import ADAPTER_FILE, load_adapter
from peft_pretraining.commands.finetune.model import _load_model
from peft_pretraining.commands.finetune.tasks import TASKS
from peft_pretraining.distributed.world import World
from sparse_lora import adapter_parameters, merge

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Makes garbage collection fast: Trainer collects after each training, which takes a second with all modules loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "model")
    write_json(folder / "train.json", rows(800, seed=1))
    write_json(folder / "validation.json", rows(200, seed=2))
    write_json(folder / "few.json", rows(40, seed=3))
    return folder


def flags(here: Path, out: str, *more: str, data: str = "train") -> list[str]:
    """Returns the command of a run in the paper's setting, r = 8 and delta = .005, at a learning rate for an untrained model."""
    files = ["--train_file", str(here / f"{data}.json"), "--validation_file", str(here / "validation.json")]
    settings = ["--task", "sst2", "--rank", "8", "--sp_ratio", "0.005", "--lora_alpha", "32"]
    settings += ["--lr", "0.01", "--epochs", "4", "--batch_size", "50"]
    return ["finetune", "--model", str(here / "model"), "--out", str(here / out), *files, *settings, *more]


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(here: Path) -> Run:
    """Returns a function (seed, further flags) -> results.json, which trains each combination once."""
    done: dict[tuple[Any, ...], dict[str, Any]] = {}

    def once(seed: int, *more: str) -> dict[str, Any]:
        if (seed, *more) not in done:
            out = f"out{len(done)}"
            assert main(flags(here, out, "--seed", str(seed), *more)) == 0
            done[seed, *more] = json.loads((here / out / "results.json").read_text()) | {"folder": here / out}
        return done[seed, *more]

    return once


@pytest.mark.parametrize("seed", SEEDS)
def test_adapters_are_better_than_the_head_alone(run: Run, seed: int) -> None:
    """A classifier of the frozen encoder cannot see which word comes first, so its accuracy stays near one half."""
    adapted, head_only = run(seed)["last"]["accuracy"], run(seed, "--head_only")["last"]["accuracy"]
    print(f"seed {seed}: adapters {adapted:.3f}, head only {head_only:.3f}")
    assert adapted >= head_only + 0.2
    assert head_only < 0.75


LARGEST = ("--support", "largest", "--keep_adapter")


def test_a_support_of_the_largest_entries_is_better_than_the_head_alone(run: Run) -> None:
    assert run(1, *LARGEST)["last"]["accuracy"] >= run(1, "--head_only")["last"]["accuracy"] + 0.2


def test_trained_parameters_are_counted_exactly(run: Run) -> None:
    """r (in + out) + int(delta in out) for the six linears of each layer: four square ones, up and down."""
    square = 8 * 2 * HIDDEN + int(0.005 * HIDDEN * HIDDEN)
    other = 8 * (HIDDEN + INNER) + int(0.005 * HIDDEN * INNER)
    expected = LAYERS * (4 * square + 2 * other)
    head = HIDDEN * HIDDEN + HIDDEN + 2 * HIDDEN + 2
    found, baseline = run(1)["parameters"], run(1, "--head_only")["parameters"]
    assert (found["adapter"], found["head"], found["trained"]) == (expected, head, expected + head)
    assert baseline == {"total": found["total"] - expected, "trained": head, "adapter": 0, "head": head}


def test_results_json_describes_the_training(run: Run) -> None:
    result = run(1)
    assert [row["epoch"] for row in result["epochs"]] == [1, 2, 3, 4]
    assert result["updates"] == 4 * 16
    assert result["metric"] == "accuracy"
    assert result["best"]["accuracy"] == max(row["accuracy"] for row in result["epochs"])
    assert result["last"] == result["epochs"][-1]
    assert result["settings"]["sp_ratio"] == 0.005
    assert result["settings"]["seed"] == 1
    assert result["examples"] == {"train": 800, "validation": 200}


def score(folder: Path, here: Path, model: Any = None) -> tuple[float, torch.Tensor]:
    """Returns accuracy and logits on the validation examples, using transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval() if model is None else model.eval()
    table = [json.loads(line) for line in (here / "validation.json").read_text().splitlines()]
    inputs = AutoTokenizer.from_pretrained(folder)([row["sentence"] for row in table], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    return (logits.argmax(1) == torch.tensor([row["label"] for row in table])).double().mean().item(), logits


def test_the_merged_model_works_with_transformers_alone(run: Run, here: Path) -> None:
    """transformers alone reproduces the recorded accuracy; the saved adapter on the pretrained model gives the same logits."""
    from transformers import AutoModelForSequenceClassification

    result = run(1, *LARGEST)
    accuracy, logits = score(result["folder"], here)
    assert accuracy == result["last"]["accuracy"]
    assert not list(result["folder"].glob("*lora*"))
    model = AutoModelForSequenceClassification.from_pretrained(here / "model")
    config = load_adapter(model, result["folder"] / ADAPTER_FILE)
    assert (config.rank, config.sparsity, config.support, config.base) == (8, 0.005, "largest", "frozen")
    assert sum(adapter_parameters(model).values()) == result["parameters"]["adapter"]
    assert torch.allclose(score(result["folder"], here, model)[1], logits, atol=1e-4)
    merge(model)
    assert torch.allclose(score(result["folder"], here, model)[1], logits, atol=1e-4)


def test_an_adapter_for_another_model_is_refused(here: Path, tmp_path: Path, run: Run) -> None:
    from safetensors.torch import save_file
    from transformers import RobertaConfig, RobertaForSequenceClassification

    small = RobertaConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = RobertaForSequenceClassification(small)
    with pytest.raises(ValueError, match="belongs to another model"):
        load_adapter(model, run(1, *LARGEST)["folder"] / ADAPTER_FILE)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not an adapter file"):
        load_adapter(model, tmp_path / "x.safetensors")


def test_the_base_can_train_in_bfloat16(here: Path) -> None:
    assert main(flags(here, "base", "--base", "trained", "--dtype", "bfloat16", "--epochs", "1", data="few")) == 0
    result = json.loads((here / "base" / "results.json").read_text())
    assert result["parameters"]["trained"] == result["parameters"]["total"]


def test_gradients_are_clipped_by_the_norm_of_pretraining(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's own norm of a large embedding is inexact on a CPU. Here all steps are clipped to a norm of nearly nothing."""
    clipped: list[float] = []

    def measured(gradients: list[torch.Tensor], world: World) -> torch.Tensor:
        clipped.append(max(float(gradient.abs().max()) for gradient in gradients))
        return torch.full((len(gradients),), 1e9)

    monkeypatch.setattr(trainer, "gradient_norms", measured)
    steps: list[float] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *inputs: Any, **more: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        steps.append(max(float(gradient.abs().max()) for gradient in gradients))
        return step(optimizer, *inputs, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert main(flags(here, "clipped", "--epochs", "1", data="few")) == 0
    assert len(clipped) == len(steps) > 0
    assert all(after < 1e-8 * before for before, after in zip(clipped, steps, strict=True))


def test_a_decoder_is_fine_tuned_on_a_regression(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LLaMA on a regression task, with tsv files and a tokenizer without padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    write_model(here / "llama", LlamaForCausalLM(LlamaConfig(vocab_size=26, max_position_embeddings=32, **sizes)))
    special = here / "llama" / "tokenizer_config.json"
    special.write_text(json.dumps({k: v for k, v in json.loads(special.read_text()).items() if k != "pad_token"}))
    table = here / "pairs.tsv"
    table.write_text("sentence1\tsentence2\tlabel\n" + "".join(f"red w{i}\tblue\t{i / 4}\n" for i in range(12)))
    capsys.readouterr()
    command = ["finetune", "--model", str(here / "llama"), "--task", "stsb", "--out", str(here / "rated"), "--json"]
    files = ["--train_file", str(table), "--validation_file", str(table), "--epochs", "2", "--sp_ratio", "0.05"]
    assert main([*command, *files]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["last"]) == {"epoch", "loss", "pearson", "spearman"}
    # q, k, v, o; gate and up; down
    assert result["parameters"]["adapter"] == 4 * (8 * 32 + 12) + 3 * (8 * 40 + 19)
    assert result["parameters"]["head"] == 16


def test_a_pretrained_run_is_exported_and_fine_tuned(
    trained: Callable[[str], Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exported run with its tokenizer; texts longer than the limit are truncated."""
    assert main(["export", "--checkpoint", str(trained("sltrain")), "--out", str(here / "export")]) == 0
    settings = ["--model", str(here / "export"), "--sp_ratio", "0.05", "--epochs", "1", "--max_length", "8"]
    capsys.readouterr()
    assert main(flags(here, "of_export", *settings, data="few")) == 0
    assert "cut at 8 tokens" in capsys.readouterr().out
    assert score(here / "of_export", here)[1].shape == (200, 2)
    # What transformers 4 reads.
    config, tokenizer = (json.loads((here / "of_export" / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert (config["rope_theta"], config["torch_dtype"]) == (config["rope_parameters"]["rope_theta"], config["dtype"])
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    table = rows(40, seed=3)
    table[4]["sentence"] = ""
    write_json(here / "gap.json", table)
    said = refused(flags(here, "none", *settings, data="gap"), capsys)
    assert "train examples, row 5: its text has no tokens" in said
    run = trained("sltrain")
    assert main(["export", "--checkpoint", str(run), "--out", str(here / "factors"), "--keep_factors"]) == 0
    for folder in (run, run / "step_00000008", here / "factors"):
        said = refused(flags(here, "none", *settings, "--model", str(folder), data="few"), capsys)
        assert f"--model {folder}: is" in said
        assert "`export` writes without --keep_factors" in said


def test_new_layers_of_the_classifier_are_trained(here: Path) -> None:
    """A BERT saved without its pooler: the new, random pooler must train too."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    write_model(here / "bert", BertModel(BertConfig(vocab_size=26, **sizes), add_pooling_layer=False))
    settings = ["--model", str(here / "bert"), "--sp_ratio", "0.05", "--epochs", "1", "--head_only"]
    assert main(flags(here, "pooled", *settings, data="few")) == 0
    found = json.loads((here / "pooled" / "results.json").read_text())["parameters"]
    assert found["head"] == found["trained"] == 16 * 16 + 16 + 2 * 16 + 2


def test_an_interrupted_training_continues_from_its_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the last of three epochs of two updates and repeated, it is bit-identical to an uninterrupted run."""
    from safetensors.torch import load_file

    settings = ["--epochs", "3", "--batch_size", "20"]
    assert main(flags(here, "whole", *settings, data="few")) == 0
    kept = ["--checkpoints", str(here / "checkpoints")]
    update, updates = transformers.Trainer.training_step, []

    def counted(trainer: Any, *inputs: Any, **more: Any) -> Any:
        updates.append(trainer.state.global_step)
        if len(updates) == 6:
            raise KeyboardInterrupt
        return update(trainer, *inputs, **more)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    assert main(flags(here, "continued", *settings, *kept, data="few")) == 130
    assert not (here / "continued").exists()
    (here / "checkpoints" / "checkpoint-5").mkdir()  # as left by a stop during a save
    said = refused(flags(here, "none", *settings, *kept, "--seed", "7", data="few"), capsys)
    assert "holds checkpoints of another run (differing: seed)" in said
    assert main(flags(here, "continued", *settings, *kept, data="few")) == 0
    assert updates == [0, 1, 2, 3, 4, 5, 4, 5]
    whole, continued = ((here / name) for name in ("whole", "continued"))
    assert (whole / "results.json").read_bytes() == (continued / "results.json").read_bytes()
    weights, others = (load_file(folder / "model.safetensors") for folder in (whole, continued))
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    # Another model at the same path is not continued either.
    config = here / "model" / "config.json"
    before = config.read_text()
    config.write_text(before + " ")
    said = refused(flags(here, "again", *settings, *kept, data="few"), capsys)
    config.write_text(before)
    assert "holds checkpoints of another run (differing: model files)" in said


def test_training_from_files_uses_no_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: socket.socket, address: Any) -> None:
        pytest.fail(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(transformers.integrations.integration_utils, "WandbCallback", None)
    assert main(flags(here, "alone", "--epochs", "1", data="few")) == 0


def test_wandb_records_the_figures_if_requested(here: Path) -> None:
    assert main(flags(here, "recorded", "--epochs", "1", "--wandb", "offline", data="few")) == 0
    (record,) = (here / "recorded" / "wandb").glob("offline-run-*/*.wandb")
    assert b"validation_accuracy" in record.read_bytes()


def test_without_a_wandb_run_nothing_is_recorded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If wandb cannot start, there is a warning, and Trainer's own callback must not start a run instead."""
    import wandb

    attempts = []

    def failing(**settings: object) -> None:
        attempts.append(settings)
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", failing)
    assert main(flags(here, "unrecorded", "--epochs", "1", "--wandb", "offline", data="few")) == 0
    assert len(attempts) == 1
    assert (here / "unrecorded" / "results.json").exists()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must be refused and leave no files; returns its error message."""
    capsys.readouterr()
    out = Path(arguments[arguments.index("--out") + 1])
    before = list(out.iterdir()) if out.exists() else None
    assert main(arguments) == 2
    assert (list(out.iterdir()) if out.exists() else None) == before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--rank", "0", "--lr", "-1"], ["--rank 0: must be at least 1", "--lr -1.0: must be above 0"]),
        (["--sp_ratio", "2"], ["--sp_ratio 2.0"]),
        (["--rank", "100000"], ["--rank 100000: no linear of the model has a rank above"]),
        (["--model", "/no/such/folder"], ["--model /no/such/folder: no such folder"]),
        (["--lora_alpha", "nan"], ["--lora_alpha nan"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--max_length", "31"], ["--max_length 31: the model has positions for 30 tokens"]),
        (["--keep_adapter", "--head_only"], ["--keep_adapter"]),
        (["--sp_ratio", "0.0001"], ["leaves no entry"]),
        (["--device", "cuda:77"], ["--device cuda:77"]),
        (["--epochs", "1", "--warmup_steps", "100000"], ["--warmup_steps 100000: the run has", "use at most"]),
        (["--task", "rte"], ["no column sentence1, sentence2"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_invalid_arguments_of_finetune_are_refused(
    here: Path, more: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With flag, value and reason; several problems are reported at once."""
    said = refused(flags(here, "none", *more, data="few"), capsys)
    assert all(part in said for part in parts), said


def test_an_unknown_task_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags(here, "none", "--task", "sst3"))
    assert ended.value.code == 2
    assert "'sst3'" in capsys.readouterr().err


def test_missing_training_data_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", "--model", str(here / "model"), "--out", str(here / "none")]
    assert "give --task" in refused(command, capsys)
    assert "give both" in refused([*command, "--train_file", str(here / "few.json")], capsys)


def test_a_folder_that_is_not_empty_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "full").mkdir()
    (here / "full" / "file").write_text("mine")
    assert "exists and is not an empty folder" in refused(flags(here, "full"), capsys)


def test_a_folder_that_cannot_be_created_is_refused_before_training(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *args: pytest.fail("training began"))
    assert "cannot be created (Not a directory)" in refused(flags(here, "few.json/out", data="few"), capsys)
    (here / "empty").mkdir()
    monkeypatch.chdir(here / "empty")
    assert "is the current working directory" in refused(flags(here, "empty", data="few"), capsys)
    monkeypatch.chdir(here)
    monkeypatch.setattr(Path, "rmdir", lambda path: os.rmdir("/"))  # refused as for a mount point
    assert "cannot be created (Device or resource busy)" in refused(flags(here, "empty", data="few"), capsys)


def test_output_follows_a_link_and_is_readable_by_others(here: Path) -> None:
    (here / "target").mkdir()
    (here / "link").symlink_to(here / "target")
    assert main(flags(here, "link", "--epochs", "1", "--keep_adapter", data="few")) == 0
    for name in ("model.safetensors", ADAPTER_FILE):
        assert (here / "target" / name).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("more", [[], ["--keep_adapter"]], ids=["model", "adapter"])
def test_a_full_disk_leaves_no_files(
    here: Path, more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: object, **kwargs: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", no_room)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", no_room)
    said = refused(flags(here, "nothing", "--epochs", "1", *more, data="few"), capsys)
    assert "cannot be written (No space left on device)" in said
    assert [path.name for path in here.iterdir() if "nothing" in path.name] == []


def test_models_that_cannot_be_adapted_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder, no tokenizer, no linears (GPT-2 uses another class), or missing weights."""
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2Model

    def said(folder: Path) -> str:
        return refused([*flags(here, "none", data="few"), "--model", str(folder)], capsys)

    assert "no such folder" in said(here / "nowhere")
    (here / "bare").mkdir()
    assert "tokenizer cannot be loaded" in said(here / "bare")
    write_model(here / "gpt2", GPT2Model(GPT2Config(vocab_size=26, n_positions=32, n_embd=16, n_layer=1, n_head=2)))
    assert "match no linear of the model" in said(here / "gpt2")
    write_model(here / "partly")
    weights = here / "partly" / "model.safetensors"
    left = {key: tensor for key, tensor in load_file(weights).items() if "layer.1.output.dense" not in key}
    save_file(left, weights, metadata={"format": "pt"})
    assert "2 of its weights are missing" in said(here / "partly")
    (here / "partly" / "config.json").unlink()
    assert "cannot be loaded as a sequence classifier" in said(here / "partly")


def test_glue_without_a_network_is_refused_with_the_way_out(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_pretraining.commands.finetune.examples.hub_problem", lambda: "no route")
    command = ["finetune", "--model", str(here / "model"), "--out", str(here / "none"), "--task", "rte"]
    said = refused(command, capsys)
    assert "--task rte" in said
    assert "no route" in said
    assert "--train_file" in said


def test_ctrl_c_ends_fine_tuning_with_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Trainer, "training_step", interrupt)
    assert main(flags(here, "none", data="few")) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not (here / "none").exists()


def test_a_non_finite_loss_ends_fine_tuning(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *_: torch.tensor(float("nan")))
    assert "the loss is nan; lower --lr" in refused(flags(here, "none", data="few"), capsys)


def test_git_lfs_pointers_among_a_models_files_and_as_an_adapter_are_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model\.safetensors is a git-lfs pointer, not the file of 99 bytes"):
        _load_model(str(tmp_path), TASKS["sst2"], local=True)
    with pytest.raises(ValueError, match=r"model\.safetensors: is a git-lfs pointer"):
        load_adapter(torch.nn.Linear(2, 2), tmp_path / "model.safetensors")
