"""Models in the published parameterisations, in plain torch and transformers, and folders as the published programs save them.

The module uses no code of this project, because imports are compared with its results.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA, SHARE = 8, 2, 0.1
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 2048,
    "max_sequence_length": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "initializer_range": 0.02, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": -1, "tie_word_embeddings": False, "use_cache": True, "torch_dtype": "float32",
    "transformers_version": "4.31.0",
}  # fmt: skip
# The order of linears in the published LLaMA; in transformers' own up comes before down.
PUBLISHED_MLP, HF_MLP = ("gate_proj", "down_proj", "up_proj"), ("gate_proj", "up_proj", "down_proj")


def dense_model() -> LlamaForCausalLM:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
    )
    return LlamaForCausalLM(LlamaConfig(**{name: CONFIG[name] for name in names}, pad_token_id=None, use_cache=False))


@dataclass
class Reference:
    """A model in a published parameterisation.

    parameters: trained tensors by published name, in the published order. fixed: positions and frozen weights.
    """

    method: str
    parameters: dict[str, Tensor]
    fixed: dict[str, Tensor]
    model: LlamaForCausalLM

    def weights(self) -> dict[str, Tensor]:
        """Returns the dense weights, by transformers' names, as differentiable functions of the parameters."""
        have = {**self.parameters, **self.fixed}
        found = {name: tensor for name, tensor in have.items() if name.endswith((".weight",)) and ".lora_" not in name}
        suffix = "" if self.method.startswith("sltrain") else ".weight"
        for name in [name for name in have if name.endswith(f".lora_A{suffix}")]:
            layer = name.removesuffix(f".lora_A{suffix}")
            scale = have[f"{layer}.scaling"].tanh() if f"{layer}.scaling" in have else ALPHA / RANK
            weight = scale * (have[f"{layer}.lora_B{suffix}"] @ have[name])
            if self.method.startswith("sltrain"):
                weight = (
                    weight.flatten().index_add(0, have[f"{layer}.sparse_index"], have[f"{layer}.sparse_value"]).view_as(weight)
                )
            elif self.method.startswith("relora"):
                weight = weight + have[f"{layer}.weight"]
            found[f"{layer}.weight"] = weight
        return found

    def logits(self, ids: Tensor) -> Tensor:
        return functional_call(self.model, self.weights(), (ids,)).logits

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss over valid labels."""
        logits = self.logits(ids)[:, :-1].flatten(0, 1)
        return cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)

    def step(self, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> float:
        loss = self.loss(ids, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())


def reference(method: str, mlp: tuple[str, ...] = PUBLISHED_MLP) -> Reference:
    """Returns a model with values as after some training.

    method: sltrain | sltrain_scaled | relora | relora_scaled | lowrank | full.
    """
    torch.manual_seed(7)
    model = dense_model()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parameters: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}

    def trained(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        parameters[name] = (torch.randn(*shape) * std + mean).requires_grad_()

    trained("model.embed_tokens.weight", *shapes["model.embed_tokens.weight"], std=0.1)
    for number in range(CONFIG["num_hidden_layers"]):
        attention = [f"self_attn.{each}_proj" for each in "qkvo"]
        for module in (*attention, *(f"mlp.{each}" for each in mlp)):
            layer = f"model.layers.{number}.{module}"
            _add_linear(method, layer, shapes[f"{layer}.weight"], trained, fixed, parameters)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            trained(f"model.layers.{number}.{norm}.weight", CONFIG["hidden_size"], std=0.1, mean=1.0)
    trained("model.norm.weight", CONFIG["hidden_size"], std=0.1, mean=1.0)
    trained("lm_head.weight", *shapes["lm_head.weight"], std=0.1)
    return Reference(method, parameters, fixed, model)


def _add_linear(method, layer, shape, trained, fixed, parameters) -> None:
    rows, columns = shape
    if method == "full":
        trained(f"{layer}.weight", rows, columns, std=0.1)
        return
    if method.startswith("sltrain"):
        trained(f"{layer}.lora_A", RANK, columns, std=0.1)
        trained(f"{layer}.lora_B", rows, RANK, std=0.1)
        if method == "sltrain_scaled":
            trained(f"{layer}.scaling", 1, std=0.1, mean=0.5)
        count = int(SHARE * (rows * columns))
        fixed[f"{layer}.sparse_index"] = torch.randperm(rows * columns)[:count].sort().values
        trained(f"{layer}.sparse_value", count, std=0.1)
        return
    if method.startswith("relora"):
        fixed[f"{layer}.weight"] = torch.randn(rows, columns) * 0.1
    if method == "relora_scaled":
        fixed[f"{layer}.scaling"] = torch.randn(1)  # not in the published optimizer
    trained(f"{layer}.lora_A.weight", RANK, columns, std=0.1)
    trained(f"{layer}.lora_B.weight", rows, RANK, std=0.1)


def some_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 320, (count, 4, 16), generator=generator)
    return [(each, each.clone()) for each in ids]


def trained_a_while(model: Reference, kind: Any = torch.optim.AdamW, updates: int = 3, **settings: Any) -> Any:
    """Returns an optimizer of the model's parameters, in the published order, after some updates."""
    optimizer = kind(list(model.parameters.values()), lr=0.003, **settings)
    for ids, labels in some_batches(updates):
        model.step(optimizer, ids, labels)
    return optimizer


def write(
    folder: Path,
    model: Reference,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    safe: bool = False,
    shards: int = 1,
    prefix: str = "",
    state: bool = True,
) -> Path:
    """Writes a folder as the published program saves it after update 3."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().clone() for name, tensor in {**model.parameters, **model.fixed}.items()}
    for number in range(CONFIG["num_hidden_layers"]):  # saved by the published LLaMA
        tensors[f"model.layers.{number}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    _write_weights(folder, tensors, safe, shards)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    settings = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": ["attn", "mlp", "attention"]}
    if model.method.startswith("sltrain"):
        # The published file has false even if the scaling is trained.
        settings |= {"sp_ratio": SHARE, "trainable_scaling": False}
        (folder / "splora_config.json").write_text(json.dumps(settings))
    elif model.method != "full":
        settings |= {"lora_dropout": 0.1, "keep_original_weights": True, "lora_only": False, "quantize": None}
        (folder / "relora_config.json").write_text(json.dumps(settings))
    if state:
        counts = {
            "global_step": 6,
            "update_step": 3,
            "tokens_seen": 12345,
            "tokens_seen_before": 12000,
            "update_time": 0.5,
        }
        (folder / "training_state.json").write_text(json.dumps(counts))
    if optimizer is not None:
        recorded = {
            "max_lr": 0.003,
            "optimizer": "AdamW",
            "scheduler": "cosine",
            "grad_clipping": 0.0,
            "total_batch_size": 8,
        }
        document = {
            "scheduler": {"last_epoch": 3, "lr_lambdas": [{}]},
            "config": recorded,
            "wandb": "x",
            "dtype": "float32",
        }
        document |= {"optimizer": optimizer.state_dict(), "update_step": 3, "global_step": 6}
        torch.save(document, folder / "optimizer.pt")
    return folder


def _write_weights(folder: Path, tensors: dict[str, Tensor], safe: bool, shards: int) -> None:
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        if safe:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
