"""Builds transformers' LlamaForCausalLM from a ModelConfig; the traps of the published files are handled in this one place.

Order: build on the meta device -> the method's change (SLTrain's layers) -> storage on the device -> seeded initial
values -> activation checkpointing -> compile. Nothing is allocated or drawn twice, and initial values depend only on (seed,
parameter name).
"""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
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
from sparse_lora import ReLoRALinear, SparseLowRankLinear, generator_for

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
ACTIVATION_CHECKPOINTING = ("layer", "selective")


def hf_config(cfg: ModelConfig) -> "LlamaConfig":
    """The transformers configuration of `cfg`, as saved beside an export."""
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


def build_model(
    cfg: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    reparameterize: Callable[["LlamaForCausalLM"], object] | None = None,
    start: Callable[["LlamaForCausalLM"], object] | None = None,
    activation_checkpointing: str | None = None,
    compile: bool = False,
) -> "LlamaForCausalLM":
    """A model ready to train: scaled-dot-product attention, no key-value cache, in train mode.

    Args:
        dtype: of the parameters and the arithmetic (norms, softmax and rotary tables use float32 inside).
        device: "meta" stops before storage and values, for counting.
        seed: of the initial values; see initialize.
        reparameterize: changes the model in place while it is on the meta device (the method's layers, sharding).
        start: changes the initial values in place.
        activation_checkpointing: None, "layer" (each decoder layer keeps its input only) or "selective" (attention's
            output too, which is small and expensive to recompute).
        compile: each decoder layer by torch.compile; one compilation serves all layers.

    Raises:
        ValueError: an unknown kind of checkpointing.
    """
    model = meta_model(cfg, dtype, reparameterize)
    if torch.device(device).type != "meta":
        materialize(model, device)
        initialize(model, seed)
        if start is not None:
            start(model)
    prepare_to_train(model, activation_checkpointing, compile)
    return model


def prepare_to_train(model: "LlamaForCausalLM", activation_checkpointing: str | None, compile: bool) -> None:
    """The last step of build_model, in place, with its arguments."""
    apply_activation_checkpointing(model, activation_checkpointing)
    if compile:
        for layer in model.model.layers:
            layer.compile()
    model.train()


def meta_model(
    cfg: ModelConfig, dtype: torch.dtype, reparameterize: Callable[["LlamaForCausalLM"], object] | None = None
) -> "LlamaForCausalLM":
    """The first step of build_model: the model with its method's layers, without storage."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(hf_config(cfg), dtype=dtype, attn_implementation="sdpa")
    # With a padding index the embedding's row never gets a gradient, which is wrong if the padding id is also a token of text
    # (often the end of sequence). Padding needs no such help: nothing attends to it and it is not scored.
    model.model.embed_tokens.padding_idx = None
    model.config.use_cache = False
    if reparameterize is not None:
        reparameterize(model)
    return model


def materialize(model: "LlamaForCausalLM", device: torch.device | str) -> None:
    """Give a meta model storage on `device`; parameters are left undefined, the rotary tables are right."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model.to_empty(device=device)
    # The rotary tables are non-persistent buffers computed in the constructor: to_empty leaves garbage in them.
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(model.config)
    model.model.rotary_emb = rotary.to(device)
    model.tie_weights()  # to_empty gives tied parameters a storage each


@runtime_checkable
class HasInitialValues(Protocol):
    """A module that knows the initial values of its own parameters, as the linears of sparse_lora and of methods do."""

    def initial_values(self, seed: int, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yields (parameter name, float32 CPU tensor), drawn with (seed, the module's qualified name and the parameter's)."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """As nn.Module has it."""


@torch.no_grad()
def initialize(model: "LlamaForCausalLM", seed: int) -> None:
    """Draw every parameter from the CPU generator of (seed, qualified name), in float32, and cast: the same numbers on
    any device, in any construction order, and up to rounding in any dtype. A sharded parameter keeps this process's part.

    Linears, frozen ones too, and embedding: N(0, initializer_range^2). Norms: 1. Biases: 0. Factors and sparse values: the
    module's own `initial_values`. Raises TypeError on a module whose initialisation is not known here.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    std = model.config.initializer_range
    drawn: set[nn.Parameter] = set()  # a tied weight is drawn once, under its first name
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
    """Compute decoder layers again in backward instead of keeping their activations; see build_model for the kinds.

    Raises ValueError on an unknown kind.
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
    # Of a low-rank plus sparse linear nothing must be kept: the dense weight is one of its intermediate results.
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


# --- A lasting folder for compiled code ---


def keep_compiled_code() -> str | None:
    """Give torch.compile a lasting folder: $TORCHINDUCTOR_CACHE_DIR, or one beside the demo corpus. Call before compiling.

    The next start of a run then reuses the compiled code. torch's default is a temporary folder, which ends with the job.

    Returns:
        the problem if nothing can be kept, else None.

    Raises:
        ConfigError: the folder that the variable names cannot be written.
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
