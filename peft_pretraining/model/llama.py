"""Builds transformers' LlamaForCausalLM from a ModelConfig.

Order: build on the meta device -> apply the method (SLTrain's layers) -> allocate on the device -> draw initial values ->
activation checkpointing -> compile. Nothing is allocated or drawn twice. Initial values depend only on (seed, parameter name).
"""

import hashlib
import math
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sparse_lora
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.data.demo import default_cache_dir
from peft_pretraining.distributed.device import cpu_features
from peft_pretraining.distributed.parallel import assign_
from peft_pretraining.distributed.world import World, broadcast_
from sparse_lora import ReLoRALinear, SparseLowRankLinear, generator_for

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
ACTIVATION_CHECKPOINTING = ("layer", "selective")


def hf_config(cfg: ModelConfig) -> "LlamaConfig":
    """Returns the transformers configuration of `cfg`, which exports contain."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        hidden_act=cfg.hidden_act,
        max_position_embeddings=cfg.max_position_embeddings,
        initializer_range=cfg.initializer_range,
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=cfg.tie_word_embeddings,
        rope_parameters={"rope_type": "default", **(cfg.rope_scaling or {}), "rope_theta": cfg.rope_theta},
        bos_token_id=cfg.bos_token_id,
        eos_token_id=cfg.eos_token_id,
        pad_token_id=cfg.pad_token_id,
        attention_bias=cfg.attention_bias,
        mlp_bias=cfg.mlp_bias,
    )


def both_spellings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json that transformers 4 and 5 read alike, from the content that version 5 writes.

    Version 4 reads neither `dtype` (before 4.56) nor `rope_parameters`: it would take the default frequencies, without a word.
    """
    content = dict(document)
    if content.get("dtype") is not None:
        content["torch_dtype"] = content["dtype"]
    rope = content.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return content
    # Each kind of layer has its own embedding.
    if "full_attention" in rope:
        names = {"modernbert": ("global_rope_theta", "local_rope_theta"), "gemma3_text": ("rope_theta", "rope_local_base_freq")}
        for kind, name in zip(("full_attention", "sliding_attention"), names.get(content["model_type"], ()), strict=False):
            content[name] = (rope.get(kind) or {}).get("rope_theta")
        return content
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}
    if scaling.get("rope_type") == "longrope":
        _complete_longrope(content, scaling)
        content["rope_parameters"] = {**rope, **scaling}
    content["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    for key, old in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        if rope.get(key) is not None:
            content[key] = rope[key]
            if content.get("model_type") == "gpt_neox":
                content[old] = rope[key]
    return content


def _complete_longrope(content: dict[str, Any], scaling: dict[str, Any]) -> None:
    """Adds, in place, what version 4 takes from other places: the original length, and the factor of attention's logits."""
    positions = content["max_position_embeddings"]
    original = content.setdefault("original_max_position_embeddings", scaling.get("original_max_position_embeddings", positions))
    factor = scaling.get("factor") or positions / original
    if scaling.get("attention_factor") is None:
        scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def build_model(
    cfg: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    reparameterize: Callable[["LlamaForCausalLM"], object] | None = None,
    activation_checkpointing: str | None = None,
    compile: bool = False,
) -> "LlamaForCausalLM":
    """Builds a model that is ready to train: scaled-dot-product attention, no key-value cache, in train mode.

    Args:
        cfg: sizes and settings of the model.
        dtype: dtype of the parameters and the arithmetic (norms, softmax and rotary tables use float32 inside).
        device: the model's device; "meta" leaves out storage and values, for counting.
        seed: seed of the initial values; see `initialize`.
        reparameterize: changes the model in place while it is on the meta device (the method's layers, sharding).
        activation_checkpointing: None, "layer" (each decoder layer keeps only its input) or "selective" (also keeps attention's
            output, which is small and expensive to recompute).
        compile: compile each decoder layer by torch.compile; one compilation serves all layers.

    Raises:
        ValueError: the kind of checkpointing is unknown.
    """
    model = meta_model(cfg, dtype, reparameterize)
    if torch.device(device).type != "meta":
        materialize(model, device)
        initialize(model, seed)
    prepare_to_train(model, activation_checkpointing, compile)
    return model


def prepare_to_train(model: "LlamaForCausalLM", activation_checkpointing: str | None, compile: bool) -> None:
    """Applies activation checkpointing and compilation in place, and sets train mode; arguments as for build_model."""
    apply_activation_checkpointing(model, activation_checkpointing)
    if compile:
        for layer in model.model.layers:
            layer.compile()
    model.train()


def meta_model(
    cfg: ModelConfig, dtype: torch.dtype, reparameterize: Callable[["LlamaForCausalLM"], object] | None = None
) -> "LlamaForCausalLM":
    """Builds the model with its method's layers on the meta device, without storage; arguments as for build_model."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(hf_config(cfg), dtype=dtype, attn_implementation="sdpa")
    # A padding index stops the gradient of its embedding row, which is wrong if the padding id also occurs in text (often as the
    # end of sequence). Padding does not need it: no token attends to padding, and padding is not scored.
    model.model.embed_tokens.padding_idx = None
    model.config.use_cache = False
    if reparameterize is not None:
        reparameterize(model)
    return model


def materialize(model: "LlamaForCausalLM", device: torch.device | str) -> None:
    """Allocates a meta model's storage on `device`; computes the rotary tables and leaves parameters undefined."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model.to_empty(device=device)
    # The rotary tables are buffers that the constructor computes; to_empty leaves them undefined.
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(model.config)
    model.model.rotary_emb = rotary.to(device)
    # to_empty allocates separate storage for tied parameters.
    model.tie_weights()


@runtime_checkable
class HasInitialValues(Protocol):
    """A module that defines the initial values of its own parameters, such as the linears of sparse_lora and of methods."""

    def initial_values(self, seed: int, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yields (parameter name, float32 CPU tensor), drawn with (seed, qualified name of the parameter)."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Returns a parameter by name, like nn.Module."""


@torch.no_grad()
def initialize(model: "LlamaForCausalLM", seed: int) -> None:
    """Draws every parameter from the CPU generator of (seed, qualified name), in float32, and casts it.

    The numbers are the same on any device, in any construction order, and up to rounding in any dtype. Of a sharded parameter
    this process's part is set. Linears (also frozen ones) and embedding: N(0, initializer_range^2). Norms: 1. Biases: 0. Factors
    and sparse values: the module's own `initial_values`. Raises TypeError for a module of another kind.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    std = model.config.initializer_range
    # A tied weight is drawn once, under its first name.
    drawn: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        parameters = {p for p in module.parameters(recurse=False) if p not in drawn}
        drawn |= parameters
        if not parameters:
            continue
        if isinstance(module, nn.Linear | nn.Embedding | ReLoRALinear):
            _draw_normal(module.weight, std, generator_for(seed, f"{name}.weight"))
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, LlamaRMSNorm):
            module.weight.fill_(1.0)
        elif not isinstance(module, HasInitialValues):
            raise TypeError(f"no initialisation known for {name} ({type(module).__name__})")
        if isinstance(module, HasInitialValues):
            for parameter_name, values in module.initial_values(seed, name):
                assign_(module.get_parameter(parameter_name), values)
        if isinstance(module, SparseLowRankLinear):
            module.draw_support(seed, name)


def _draw_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    assign_(parameter, values.normal_(0.0, std, generator=generator))


def apply_activation_checkpointing(model: "LlamaForCausalLM", kind: str | None) -> None:
    """Makes decoder layers recompute activations in backward instead of keeping them; see build_model for the kinds.

    Raises ValueError for an unknown kind.
    """
    if kind is None:
        return
    if kind not in ACTIVATION_CHECKPOINTING:
        raise ValueError(f"--activation_checkpointing {kind}: not one of {', '.join(ACTIVATION_CHECKPOINTING)}")
    keywords: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, **keywords)


_ATTENTION_OPS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _keep_attention(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # Intermediate results of low-rank plus sparse linears include the dense weight, so none of them is saved.
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


# --- Factors from singular values: the start of --init svd, and balanced factors of a product ---
#
# Shapes: O out_features, I in_features, r rank.

# Norm of A's row for a direction that the product lacks: the norm of a row of the published initial A, whose entries have
# variance 1 / (3 I).
_IDLE_ROW_NORM = 1 / math.sqrt(3)


@torch.no_grad()
def start_from_svd(model: nn.Module, std: float, seed: int, world: World) -> None:
    """Sets A, B and sparse values of every low-rank plus sparse layer, in place, from a dense initial weight.

    The dense weight W ~ N(0, std^2) is the one that full-rank training with this seed draws. scaling B A is W's best
    approximation of rank r, in balanced factors, and S is the rest of W at the support's positions. Supports must be drawn
    before. Every process calls this function: process 0 computes the values on the CPU and broadcasts them, because signs of
    singular vectors are arbitrary.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseLowRankLinear):
            for parameter_name, values in _values(module, name, std, seed, world):
                assign_(module.get_parameter(parameter_name), broadcast_(values, world))


def scale_start(model: nn.Module, parameters: Collection[str], scale: float) -> None:
    """Multiplies the initial weights of the attention and MLP linears by `scale`, in place.

    parameters: names, within a linear, of the parameters whose scaling scales its weight.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear, _, own_name = name.rpartition(".")
            if own_name in parameters and linear.endswith("_proj"):
                parameter.mul_(scale)


def _values(layer: SparseLowRankLinear, name: str, std: float, seed: int, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (parameter name, float32 CPU tensor) of a layer; the values are undefined on all processes except the first."""
    if not world.is_main:
        for parameter_name in ("lora_B", "lora_A", *(["sparse_value"] if layer.support is not None else [])):
            yield parameter_name, torch.empty(layer.get_parameter(parameter_name).shape)
        return
    dense = torch.empty(layer.out_features, layer.in_features)
    dense.normal_(0.0, std, generator=generator_for(seed, f"{name}.weight"))
    left, right = best_low_rank(dense, layer.rank)
    share = layer.initial_scaling() ** -0.5
    yield "lora_B", (share * left).contiguous()
    yield "lora_A", (share * right).contiguous()
    if layer.support is not None:
        rest = dense.addmm_(left, right, alpha=-1)
        yield "sparse_value", rest.flatten()[layer.support.flat_indices().cpu()]


@torch.no_grad()
def balanced(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns balanced float32 factors B' (O, r) and A' (r, I) of the product B A.

    Balanced means B'^T B' = A' A'^T = the diagonal matrix of the product's singular values, in descending order. With B = Q_B R_B
    and A^T = Q_A R_A, only the r x r matrix R_B R_A^T = U S V^T is decomposed: B' = Q_B U sqrt(S), A' = sqrt(S) V^T Q_A^T
    (arXiv 2505.22922, section 4). A direction whose singular value is only rounding error gets zeros in B' and a non-zero row in
    A', since with zeros in both, neither would get a gradient.

    Args:
        lora_B, lora_A: (O, r) and (r, I) with r at most O and I, of any floating dtype.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.float())
    Q_A, R_A = torch.linalg.qr(lora_A.float().t())
    U, S, Vt = torch.linalg.svd(R_B @ R_A.t())
    noise = S[0] * max(Q_B.shape[0], Q_A.shape[0]) * torch.finfo(torch.float32).eps
    alive = noise < S
    root = S.sqrt()
    column, row = torch.where(alive, root, 0.0), torch.where(alive, root, _IDLE_ROW_NORM)
    return Q_B @ (U * column), (row[:, None] * Vt) @ Q_A.t()


@torch.no_grad()
def best_low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns balanced float32 factors (O, r) and (r, I) of the nearest matrix of rank r (Eckart and Young).

    They are computed from the eigenvectors of the smaller of W W^T and W^T W in float64, at a small multiple of the cost of one
    product with W. Singular values are accurate down to about 1e-8 of the largest.

    Args:
        weight: (O, I), of any floating dtype; rank at most O and I.
    """
    W = weight.double()
    wide = W.shape[0] <= W.shape[1]
    _, vectors = torch.linalg.eigh(W @ W.t() if wide else W.t() @ W)
    leading = vectors[:, -rank:].flip(1)
    # Rows (or columns) of the other factor are the singular vectors times the singular values.
    other = leading.t() @ W if wide else W @ leading
    root = torch.linalg.vector_norm(other, dim=1 if wide else 0).sqrt()
    safe = root.clamp(min=torch.finfo(torch.float32).tiny)
    if wide:
        return (leading * root).float(), (other / safe[:, None]).float()
    return (other / safe).float(), (leading * root).t().contiguous().float()


# --- A permanent folder for compiled code ---


def keep_compiled_code() -> str | None:
    """Sets torch.compile's folder to $TORCHINDUCTOR_CACHE_DIR, or to one next to the demo corpus; call before compiling.

    The next start of a run then reuses the compiled code. torch's default is a temporary folder, which is deleted with the job.

    Returns:
        A message if compiled code cannot be kept, else None.

    Raises:
        ConfigError: the folder that the variable names is not writable.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    folder = Path(chosen) if chosen else default_cache_dir() / f"compiled-{_compiled_for()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        if chosen:
            raise ConfigError([f"{FOLDER_VARIABLE}={chosen}: cannot be written ({error.strerror})"]) from None
        return (
            f"compiled code is not kept for the next start: {folder} cannot be written ({error.strerror}); "
            f"set {FOLDER_VARIABLE} to a folder that can"
        )
    os.environ[FOLDER_VARIABLE] = str(folder)
    return None


def _compiled_for() -> str:
    """Digest of what torch's key of compiled code leaves out: the layer's sources (it has operators' names only) and the CPU.

    torch compiles for the CPU it runs on, so code from a folder shared between machines may use instructions that another lacks.
    """
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(Path(sparse_lora.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    cpu = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *sorted(cpu_features())]
    digest.update(" ".join(cpu).encode())
    return digest.hexdigest()
