"""`python -m peft_pretraining export` writes an equal model for other programs, or fails without leaving files."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pretraining.__main__ import main
from peft_pretraining.checkpoint.step_folder import resolve
from peft_pretraining.config.model_config import linear_shapes, load_model_config
from peft_pretraining.config.supports import SUPPORTS
from peft_pretraining.export import load_factored, shards, write
from peft_pretraining.export.load import load_model
from peft_pretraining.export.shards import ExportError, ShardWriter
from peft_pretraining.memory.counts import parameter_counts, support_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
Trained = Callable[[str], Path]
EVERY_METHOD = ["full", "galore", "lowrank", "relora", "sltrain", "sltrain_scaled", "sltrain_block", "sltrain_int8"]
PROMPT = "Fox 3 jumps over dog"
# Loads the export with transformers alone, in a separate process. `certain` is the text before the first token whose logit is
# within `margin` of the second best: from this token on, two correct computations may choose different tokens.
ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, margin = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits
    options = {"output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
best_two = torch.cat(generated.logits).float().topk(2).values
near_ties = ((best_two[:, 0] - best_two[:, 1]) <= float(margin)).tolist()
num_certain = near_ties.index(True) if True in near_ties else len(near_ties)
num_prompt = inputs["input_ids"].shape[1]
certain = tokenizer.decode(generated.sequences[0, : num_prompt + num_certain], skip_special_tokens=True)
ours = [name for name in sys.modules if name.split(".")[0] in ("peft_pretraining", "sparse_lora", "torchrun_main")]
print(json.dumps({"ids": inputs["input_ids"].tolist(), "logits": logits.float().tolist(), "certain": certain,
                  "num_certain": num_certain, "all_certain": num_certain == len(near_ties),
                  "dtype": str(logits.dtype), "ours": ours}))
"""


def export(checkpoint: Path, out: Path, *flags: str) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *flags])


def expected_logits(run: Path) -> tuple[list[int], torch.Tensor]:
    """Returns the prompt's ids as in training, and the logits of the checkpoint's model."""
    model, tokenizer, _ = load_model(run, torch.device("cpu"))
    ids = tokenizer.encode_batch([PROMPT])[0]
    with torch.inference_mode():
        return ids, model(torch.tensor([ids])).logits


@pytest.mark.parametrize(("name", "tolerance"), [("sltrain", 1e-5), ("sltrain_bf16", 2**-6)])
def test_transformers_alone_computes_the_same_logits_and_text_from_an_export(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, tolerance: float
) -> None:
    run = trained(name)
    assert export(run, tmp_path / "dense") == 0
    ids, logits = expected_logits(run)
    # Each of the two best logits may differ by the tolerance of assert_close.
    margin = 2 * tolerance * (1 + float(logits.abs().max()))
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path / "dense"), PROMPT, str(margin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["ids"], found["ours"]) == ([ids], [])
    assert found["dtype"] == str(logits.dtype)
    torch.testing.assert_close(torch.tensor(found["logits"]), logits.float(), rtol=tolerance, atol=tolerance)
    capsys.readouterr()
    flags = ["--prompt", PROMPT, "--max_new_tokens", "12", "--temperature", "0", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(run), *flags]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith(found["certain"])
    if found["all_certain"]:
        assert text == found["certain"]
    if logits.dtype == torch.float32:
        assert found["num_certain"] > 0


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_dense_export_of_every_method_has_the_models_logits(trained: Trained, tmp_path: Path, name: str) -> None:
    assert export(trained(name), tmp_path / "dense") == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    ids, logits = expected_logits(trained(name))
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.tensor([ids])).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lowrank", "sltrain", "sltrain_scaled", "sltrain_block", "sltrain_int8"])
def test_load_factored_loads_a_factored_export(trained: Trained, tmp_path: Path, name: str) -> None:
    assert export(trained(name), tmp_path / "factored", "--keep_factors") == 0
    model, tokenizer = load_factored(tmp_path / "factored")
    ids, logits = expected_logits(trained(name))
    assert tokenizer(PROMPT)["input_ids"] == ids
    with torch.inference_mode():
        # A model prepared for inference computes few rows by another path.
        torch.testing.assert_close(model(torch.tensor([ids])).logits, logits, rtol=1e-5, atol=1e-5)
        generated = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, len(ids) + 3)
    # transformers must not load it as a dense model with random weights.
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "factored")


def test_a_factored_1b_model_is_half_the_dense_one() -> None:
    """With the published rank and sparsity, in bfloat16, including stored positions."""
    model = load_model_config(ROOT / "configs/llama_1b.json")
    counts = parameter_counts(model, method="sltrain", rank=512, sparsity=0.03)
    dense = parameter_counts(model, method="full", rank=512, sparsity=0.03)
    shapes = linear_shapes(model)
    each = [support_bytes(SUPPORTS["uniform"].nonzeros(*shape, 0.03), math.prod(shape)) for shape in shapes]
    support = model.num_hidden_layers * sum(each)
    assert (2 * counts.total + support) / (2 * dense.total) <= 0.52


def test_an_exported_t5_tokenizer_adds_no_end_token(t5_model: Path, tmp_path: Path) -> None:
    from peft_pretraining.data.tokenizer import load_tokenizer

    ours = load_tokenizer(t5_model)
    ours.save(tmp_path / "saved")
    load_tokenizer(tmp_path / "saved").save_for_inference(tmp_path / "exported", 1024)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "The  quick brown fox\n12,345 naïve 你好"
    assert theirs(text)["input_ids"] == ours.encode_batch([text])[0]
    batch = theirs(["a", "a longer text"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)


def test_shards_contain_the_same_model_as_one_file(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(trained("sltrain"), tmp_path / "one") == 0
    waiting: list[int] = []
    original = ShardWriter.add

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        original(self, name, tensor)
        waiting.append(sum(each.nbytes for each in self._waiting.values()))

    monkeypatch.setattr(ShardWriter, "add", add)
    write.export(trained("sltrain"), tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / shards.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert max(waiting) <= max(20_000, 320 * 32 * 4)  # the embedding is larger than a shard
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in models[0].values())


def test_one_part_of_the_model_is_in_memory_at_a_time(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, original = [], write.meta_model
    monkeypatch.setattr(write, "meta_model", lambda *args: models.append(original(*args)) or models[0])
    parts: set[str] = set()

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        present = {key for key, value in models[0].state_dict().items() if not value.is_meta}
        parts.add(name.split(".")[2] if "layers" in name else name)
        assert present
        assert len({key.split(".")[2] if "layers" in key else key for key in present}) == 1

    monkeypatch.setattr(ShardWriter, "add", add)
    monkeypatch.setattr(ShardWriter, "close", lambda self: None)
    write.export(trained("sltrain"), tmp_path / "out")
    assert {"0", "1", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} == parts


def test_an_export_can_have_another_dtype(trained: Trained, tmp_path: Path) -> None:
    assert export(trained("sltrain"), tmp_path / "half", "--dtype", "bfloat16") == 0
    assert export(trained("sltrain_bf16"), tmp_path / "whole", "--dtype", "float32") == 0
    half, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("half", "whole"))
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    ids, logits = expected_logits(trained("sltrain"))
    with torch.inference_mode():
        torch.testing.assert_close(half(torch.tensor([ids])).logits.float(), logits, rtol=3e-2, atol=3e-2)


def test_the_model_card_describes_the_training(trained: Trained, tmp_path: Path) -> None:
    run = trained("sltrain")
    assert export(run, tmp_path / "my-model") == 0
    text = (tmp_path / "my-model" / "README.md").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['final_eval_perplexity']:,.2f} over {last['final_eval_tokens']:,} tokens" in text
    for part in ("SLTrain", "8 updates", 'from_pretrained("my-model")', "--sp_ratio 0.1", "library_name: transformers"):
        assert part in text
    assert str(run) not in text


def test_unusable_export_folders_and_flags_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert export(trained("sltrain"), tmp_path / "full") == 2
    assert "exists and is not an empty folder; name another folder" in capsys.readouterr().err
    assert export(trained("full"), tmp_path / "new", "--keep_factors") == 2
    assert "--peft_model full has no factors to keep; leave --keep_factors out" in capsys.readouterr().err
    checkpoint = trained("sltrain") / "step_00000008"
    assert export(trained("sltrain"), checkpoint / "hf") == 2
    assert f"is inside the checkpoint {checkpoint}, which would then count as damaged" in capsys.readouterr().err
    assert main(["report", str(trained("sltrain")), str(trained("full")), "--out", str(checkpoint / "report")]) == 2
    assert not [path for path in checkpoint.iterdir() if path.name in ("hf", "report", ".hf.partial")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export(trained("sltrain"), Path()) == 2
    assert "--out .: is the current working directory; name a folder inside it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "here"]


def test_a_full_disk_is_reported_and_leaves_no_files(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("sltrain")
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert export(run, tmp_path / "out") == 2
    assert "needs 0.0 GiB, the disk has 0.0 GiB free" in capsys.readouterr().err
    monkeypatch.undo()

    def no_room(*args: object, **kwargs: object) -> None:
        raise shards.SafetensorError("No space left on device")

    monkeypatch.setattr(shards, "save_file", no_room)
    assert export(trained("sltrain"), tmp_path / "out") == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_and_exports_are_named(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(resolve(trained("sltrain")), tmp_path / "step_00000008")
    with next((tmp_path / "step_00000008" / "tensors").glob("*.distcp")).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    assert export(tmp_path / "step_00000008", tmp_path / "out") == 2
    assert "is damaged" in capsys.readouterr().err
    assert export(trained("sltrain"), tmp_path / "factored", "--keep_factors") == 0
    weights = tmp_path / "factored" / shards.SINGLE
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=r"weights cannot be read"):
        load_factored(tmp_path / "factored")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + f"\nsize {len(whole)}\n")
    with pytest.raises(ExportError, match=rf"{shards.SINGLE}: is a git-lfs pointer, not the file of {len(whole):,} bytes"):
        load_factored(tmp_path / "factored")
    config = json.loads((tmp_path / "factored" / write.FACTORS_CONFIG).read_text())
    (tmp_path / "factored" / write.FACTORS_CONFIG).write_text(json.dumps(config | {"rank": 4}))
    weights.write_bytes(whole)
    with pytest.raises(ExportError, match=r"lora_A has shape \(8, 32\), expected \(4, 32\)"):
        load_factored(tmp_path / "factored")
    with pytest.raises(ExportError, match="configuration cannot be used"):
        load_factored(tmp_path)
    assert export(trained("sltrain"), tmp_path / "dense") == 0
    with pytest.raises(ExportError, match=r"a dense export; load it with AutoModelForCausalLM"):
        load_factored(tmp_path / "dense")


def test_exported_files_are_readable_by_others(trained: Trained, tmp_path: Path) -> None:
    assert export(trained("sltrain"), tmp_path / "dense") == 0
    assert (tmp_path / "dense" / shards.SINGLE).stat().st_mode & 0o077 == 0o044
    with safe_open(str(tmp_path / "dense" / shards.SINGLE), framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
