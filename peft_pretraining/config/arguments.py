"""The program's arguments: one dataclass per topic, in which each field is a flag with its row (`flag.Row`).

`never`, `if_allowed` and `freely` make the row; their names say whether a resumed run may change the flag (default: freely).
Flags that a resumed run may not change freely also define the run, unless their row says otherwise.

`Arguments` contains what the user asked for, as read by `command_line`. What follows from it (gradient accumulation, update
steps, tokens) is in `plan.Plan`. Imports no torch, because `--help` and error messages must appear in about a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config.flag import flag, freely, if_allowed, never, rows_of
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.supports import SUPPORTS


def _method_names() -> dict[str, str]:
    """Returns the names of the files in methods/ that define METHOD. They are not imported, because they import this module."""
    files = sorted((Path(__file__).parent.parent / "methods").glob("*.py"))
    return {file.stem: file.stem for file in files if "\nMETHOD = " in file.read_text(encoding="utf-8")}


# Names that --peft_model accepts. methods.register adds those of methods that are defined elsewhere.
METHOD_NAMES = _method_names()
# Methods with low-rank factors.
_FACTORED = ("lowrank", "relora", "sltrain")
# Methods that replace a dense weight by a low-rank (plus sparse) one.
_REPARAMETERIZED = ("lowrank", "sltrain")
PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
SCHEDULERS = ("linear", "cosine", "cosine_restarts")
DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
INITS = ("default", "svd")
LINEAR_PATHS = ("auto", "materialised", "factored")
LINEAR_CACHES = ("auto", "none", "positions", "weights")
HEAD_GRADIENTS = ("whole", "slices")
PARALLEL = ("ddp", "fsdp")
WEIGHT_DTYPES = ("int8",)
EMBEDDING_STATES = {"32bit": 32, "8bit": 8, "4bit": 4}
ON_BAD_RECORD = ("skip", "fail")
DATA_ORDERS = ("lanes", "global")
ACCUMULATE = ("gradients", "moments")
WANDB_MODES = ("auto", "online", "offline", "disabled")
TRACKERS = ("wandb", "trackio")


def _without_tracker(args: Any) -> str | None:
    return "with --wandb disabled" if args.tracker == "wandb" and args.wandb == "disabled" else None


def _without_weight_decay(args: Any) -> str | None:
    return "without --weight_decay" if not args.weight_decay else None


def _without_adam(args: Any) -> str | None:
    return None if OPTIMIZERS[args.optimizer].has_adam else f"with --optimizer {args.optimizer}: it is not of the Adam family"


def _without_beta1(args: Any) -> str | None:
    optimizer = OPTIMIZERS[args.optimizer]
    if optimizer.uses_beta1:
        return None
    kept = "its momentum is --muon_momentum" if optimizer.matrix_bytes is not None else "the Adam family keeps 0.9"
    return f"with --optimizer {args.optimizer}: {kept}"


def _without_moments(args: Any) -> str | None:
    if OPTIMIZERS[args.optimizer].keeps_moments(args.beta1):
        return None
    return f"with --optimizer {args.optimizer} without --beta1: it keeps no moments"


def _without_momentum(args: Any) -> str | None:
    used = OPTIMIZERS[args.optimizer].matrix_bytes is not None
    return None if used else f"with --optimizer {args.optimizer}: it belongs to muon and spectron"


def _without_other_conditioning(args: Any) -> str | None:
    return (
        f"with --optimizer {args.optimizer}: it conditions all gradients"
        if OPTIMIZERS[args.optimizer].conditions_all_gradients
        else None
    )


def _without_uniform_support_on_a_gpu(args: Any) -> str | None:
    if args.kernels != "auto" and not SUPPORTS[args.support].stored:
        return f"with --support {args.support}, which has no kernels"
    return "on a CPU" if args.kernels != "auto" and args.device == "cpu" else None


def _with_nothing_to_cache(args: Any) -> str | None:
    if args.linear_cache == "positions" and not SUPPORTS[args.support].stored:
        return "without a uniform support, which alone stores positions"
    if args.linear_cache == "weights" and args.linear_path == "factored":
        return "with --linear_path factored, which builds no weights"
    return None


def _without_float32_on_a_gpu(args: Any) -> str | None:
    if args.tf32 and args.dtype != "float32":
        return "without --dtype float32"
    return "on a CPU" if args.tf32 and args.device == "cpu" else None


class ConfigError(ValueError):
    """Raised for invalid arguments; `problems` contains one complete sentence for each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class ModelArguments:
    """model"""

    model_config: str = flag(
        "",
        "JSON file of the model's shape, e.g. configs/llama_60m.json",
        never(kind="path", unit="file", required=True, synonyms="model model_name_or_path model_path config_name"),
    )
    dtype: str | None = flag(
        None,
        "parameters and arithmetic: bfloat16 | float32 (default: bfloat16 on a GPU that has it, else float32)",
        never(choices=DTYPES, synonyms="precision torch_dtype bf16"),
    )
    tf32: bool = flag(
        False,
        "with --dtype float32 on a GPU: products of matrices in TF32, which keeps 10 of 23 bits of each factor",
        if_allowed(added_later=True, no_effect=_without_float32_on_a_gpu, synonyms="allow_tf32 matmul_precision"),
    )
    weight_dtype: str | None = flag(
        None,
        "how embedding, head and the linears' parameters are stored: int8 (codes with a scale per 128 elements, rounded "
        "stochastically in each update; arithmetic stays in --dtype) (default: in --dtype)",
        never(
            choices=WEIGHT_DTYPES, added_later=True, synonyms="weights_dtype weight_bits weight_quantization load_in_8bit int8"
        ),
    )
    activation_checkpointing: str | None = flag(
        None,
        "recompute activations in the backward pass: layer (keep only each decoder layer's input; the same without a "
        "value) | selective (keep attention's output too)",
        freely(const="layer", choices=("layer", "selective"), synonyms="gradient_checkpointing recompute"),
    )
    compile: bool = flag(False, "compile every decoder layer with torch.compile", freely(synonyms="torch_compile"))
    use_hf_model: bool = flag(
        False,
        "published flag, no effect: the model always is transformers' LLaMA",
        freely(no_effect=lambda args: "in this program: the model always is transformers' LLaMA" if args.use_hf_model else None),
    )


@dataclass
class MethodArguments:
    """method"""

    peft_model: str = flag(
        "full",
        f"what the attention and MLP linears become: {' | '.join(METHOD_NAMES)}; full: dense, galore: dense with projected "
        "gradients, lowrank: two factors, relora: dense and frozen, plus factors that are merged into them every --relora "
        "updates, sltrain: two factors plus a sparse part",
        never(warm_start=True, choices=METHOD_NAMES, synonyms="method peft_type training_method"),
    )
    rank: int = flag(
        128,
        "rank r of the low-rank part B A; of galore's projections",
        never(warm_start=True, minimum=1, methods=(*_FACTORED, "galore"), synonyms="lora_r r lora_rank galore_rank"),
    )
    sp_ratio: float = flag(
        0.01,
        "sparsity delta: share of each weight's entries that the sparse part trains, in (0, 1)",
        never(
            warm_start=True,
            minimum=0,
            maximum=1,
            unit="share",
            methods=("sltrain",),
            synonyms="sparsity delta density sparse_ratio",
        ),
    )
    lora_alpha: float = flag(
        32.0,
        "alpha: the low-rank part is scaled by alpha / rank",
        if_allowed(
            warm_start=True,
            above=0,
            methods=_FACTORED,
            no_effect=lambda args: (
                "with --train_scaling: the trained scale tanh(c) replaces alpha / rank" if args.train_scaling else None
            ),
            synonyms="alpha",
        ),
    )
    train_scaling: bool = flag(
        False,
        "train the low-rank part's scale as tanh(c), c starting at 1, instead of alpha / rank",
        never(warm_start=True, methods=_FACTORED, synonyms="trainable_scaling"),
    )
    support: str = flag(
        "uniform",
        "positions of the sparse entries: uniform (random over the whole weight, as published) | block (1/sp_ratio dense "
        "blocks, rows interleaved: no positions to store; on a CPU faster than full-rank from 350m on, on a GPU not measured)",
        never(warm_start=True, choices=tuple(SUPPORTS), methods=("sltrain",), synonyms="sparse_support sparsity_pattern"),
    )
    linear_path: str = flag(
        "auto",
        "how a low-rank (plus sparse) linear is computed: materialised (builds W) | factored | auto (the lower estimated cost)",
        freely(choices=LINEAR_PATHS, methods=_REPARAMETERIZED),
    )
    linear_cache: str = flag(
        "auto",
        "what low-rank (plus sparse) linears keep instead of computing it in every pass; results stay the same: none | positions "
        "(of a uniform support, 4 bytes per entry) | weights (also W during an update, as large as the dense weights; not with "
        "fsdp) | auto (positions on a GPU, if the peak stays below 80 % of its memory; else none)",
        freely(choices=LINEAR_CACHES, methods=_REPARAMETERIZED, no_effect=_with_nothing_to_cache),
    )
    kernels: str = flag(
        "auto",
        "what builds W and the gradient of S's values on a GPU (uniform support): triton | torch | auto (Triton on GPUs where it "
        "was measured to be faster, of which there are none yet)",
        freely(
            choices=("auto", "triton", "torch"),
            methods=("sltrain",),
            no_effect=_without_uniform_support_on_a_gpu,
            synonyms="triton use_triton",
        ),
    )
    lora_dropout: float = flag(
        0.0,
        "published flag, no effect (the published layer never applied it)",
        freely(
            unit="share",
            no_effect=lambda args: "in this program: the published layer never applied it" if args.lora_dropout else None,
        ),
    )
    update_proj_gap: int = flag(
        200,
        "galore: update steps from one SVD of the gradients to the next",
        if_allowed(
            warm_start=True, unit="updates", minimum=1, methods=("galore",), synonyms="galore_update_proj_gap update_interval"
        ),
    )
    galore_scale: float = flag(
        0.25,
        "galore: the projected step is multiplied by this when it is mapped back to the weights",
        if_allowed(warm_start=True, above=0, methods=("galore",), synonyms="galore_alpha"),
    )
    proj_type: str = flag(
        "std",
        "galore: singular vectors that span the subspace: std (of the weight's shorter side) | reverse_std (of its longer one) "
        "| right | left | full (both)",
        never(warm_start=True, choices=PROJ_TYPES, methods=("galore",), synonyms="galore_proj_type projection_type"),
    )
    start_scale: float = flag(
        1.0,
        "factor of the initial weights of the attention and MLP linears (of factored ones: of B and the sparse values)",
        if_allowed(
            warm_start=True,
            above=0,
            added_later=True,
            no_effect=lambda args: None if args.warmed_up_model is None else "with --warmed_up_model, which has trained weights",
        ),
    )
    init: str = flag(
        "default",
        "lowrank, sltrain: initial values: default (as published) | svd (balanced factors of a dense initialisation's best "
        "rank-r approximation, sparse values from the remainder)",
        if_allowed(warm_start=True, choices=INITS, methods=_REPARAMETERIZED, synonyms="init_lora_weights initialization"),
    )
    restart_every: int | None = flag(
        None,
        "lowrank, sltrain: update steps between restarts, which set the moments of the factored linears to zero (default: none)",
        if_allowed(warm_start=True, unit="updates", minimum=1, methods=_REPARAMETERIZED),
    )
    rebalance: bool = flag(
        False,
        "with --restart_every: a restart replaces B and A by balanced factors of the same product",
        if_allowed(warm_start=True, methods=_REPARAMETERIZED),
    )
    relora: int | None = flag(
        None,
        "relora: update steps between merges of the factors into the dense weights",
        if_allowed(
            warm_start=True, unit="updates", minimum=1, methods=("relora",), synonyms="merge_every relora_steps relora_every"
        ),
    )
    warmed_up_model: str | None = flag(
        None,
        "relora: a full-rank run's folder or checkpoint, whose weights, update step and data position it starts from "
        "(default: from the seed's initial values)",
        if_allowed(kind="path", warm_start=True, unit="folder", methods=("relora",), synonyms="warm_start init_from"),
    )
    reset_optimizer_on_relora: bool | None = flag(
        None,
        "relora: zero the factors' moments at a merge (default: true, unless they are pruned)",
        if_allowed(warm_start=True, methods=("relora",)),
    )
    optimizer_random_pruning: float | None = flag(
        None,
        "relora: share of the factors' moments, chosen at random, that a merge zeroes instead",
        if_allowed(warm_start=True, above=0, maximum=1, unit="share", methods=("relora",)),
    )
    optimizer_magnitude_pruning: float | None = flag(
        None,
        "relora: share of the factors' moments, the smallest ones, that a merge zeroes instead",
        if_allowed(warm_start=True, above=0, maximum=1, unit="share", methods=("relora",)),
    )


@dataclass
class DataArguments:
    """data"""

    dataset: str = flag(
        "c4",
        "c4 (streamed from the hub) | demo (built from installed documentation; demo-2k: with a tokenizer of 2,000 pieces) | "
        "folder, file, glob or URL | hub:NAME | folder made by `python -m peft_pretraining data prepare` | several of these with "
        'their shares of the tokens: "c4:0.7, /data/code:0.3"; without shares their sizes decide',
        if_allowed(kind="datasets", synonyms="data dataset_name train_file data_path data_dir train_data"),
    )
    eval_dataset: str | None = flag(
        None,
        "evaluation data, named like --dataset; of a data set that is trained on, what is held out of it (default: the "
        "validation split of --dataset)",
        # The trained model does not depend on it.
        if_allowed(
            kind="datasets", defines_run=False, synonyms="validation_file val_data eval_data valid_data validation_dataset"
        ),
    )
    text_field: str = flag(
        "text", "field of a record that holds the text", if_allowed(synonyms="text_column dataset_text_field text_key")
    )
    tokenizer: str | None = flag(
        None,
        "hub name, tokenizer folder, tokenizer.json or SentencePiece .model file (default: t5-base; demo and prepared data have "
        "their own)",
        if_allowed(kind="place", synonyms="tokenizer_name tokenizer_path tokenizer_name_or_path"),
    )
    max_length: int = flag(
        256,
        "sequence length, tokens",
        never(
            unit="tokens",
            # A sequence of one token has nothing to predict.
            minimum=2,
            synonyms="seq_len seq_length sequence_length max_seq_len max_seq_length block_size context_length ctx_len",
        ),
    )
    packing: bool = flag(
        False,
        "concatenate documents with eos, no padding (default, as published: each document cut to max_length and padded)",
        never(synonyms="pack sample_packing"),
    )
    document_mask: bool = flag(
        False,
        "with --packing: a token attends to its own document only, and positions restart at each document, in training and "
        "evaluation",
        if_allowed(
            no_effect=lambda args: (
                "without --packing: a sequence holds one document" if args.document_mask and not args.packing else None
            )
        ),
    )
    data_lanes: int | None = flag(
        None,
        "virtual readers, which make the data order independent of processes and workers (default: c4 64, else 24)",
        never(unit="readers", minimum=1),
    )
    data_order: str | None = flag(
        None,
        "order of the training data: lanes (each virtual reader has a share of the documents) | global (each pass reads every "
        "document once; tokenised at the start and held in memory) (default: global with --packing on files of at most "
        "32 MB together, and for each data set of a list of at most 32 MB; else lanes; a run keeps its order when it is resumed)",
        never(choices=DATA_ORDERS, defines_run=False),
    )
    workers: int | None = flag(
        None,
        "tokenising processes per rank, 0 for none (default: up to 8, leaving a core to the trainer; 0 for prepared data)",
        freely(unit="processes", minimum=0, synonyms="num_workers dataloader_num_workers"),
    )
    on_bad_record: str = flag(
        "skip",
        "records without text and files that cannot be read: skip (leave out and count; more than a quarter of all end the run) "
        "| fail (end the run at the first, with file and line)",
        freely(choices=ON_BAD_RECORD),
    )


@dataclass
class OptimizationArguments:
    """optimization"""

    batch_size: int = flag(
        0,
        "sequences per micro-batch and process",
        freely(
            unit="sequences",
            required=True,
            minimum=1,
            synonyms="per_device_train_batch_size micro_batch_size device_batch_size micro_batch",
        ),
    )
    gradient_accumulation: int | None = flag(
        None,
        "micro-batches per update (default: from total_batch_size)",
        freely(unit="micro-batches", minimum=1, synonyms="gradient_accumulation_steps grad_accum accumulate_grad_batches"),
    )
    total_batch_size: int | None = flag(
        None,
        "sequences per update over all processes (default: batch_size x accumulation x processes)",
        if_allowed(unit="sequences", minimum=1, synonyms="global_batch_size train_batch_size"),
    )
    num_training_steps: int = flag(
        10_000,
        "update steps to train for, exactly",
        if_allowed(
            warm_start=True,
            unit="updates",
            minimum=1,
            no_effect=lambda args: (
                None if args.max_train_tokens is None else f"with --max_train_tokens {args.max_train_tokens}: tokens end the run"
            ),
            synonyms="max_steps max_train_steps num_steps steps max_iters train_iters total_steps num_iterations",
        ),
    )
    max_train_tokens: int | None = flag(
        None,
        "end with the update that reaches this many tokens (150M, 1.1B, ...); replaces num_training_steps",
        if_allowed(warm_start=True, kind="tokens", minimum=1, synonyms="max_tokens train_tokens num_tokens"),
    )
    optimizer: str = flag(
        "adam",
        f"{' | '.join(OPTIMIZERS)}; published names galore_adamw, ... mean --peft_model galore with one of these",
        never(warm_start=True, choices=tuple(OPTIMIZERS), synonyms="optim optimizer_type"),
    )
    lr: float = flag(
        1e-4,
        "peak learning rate",
        if_allowed(warm_start=True, above=0, synonyms="learning_rate max_lr peak_lr base_lr adam_lr adamw_lr"),
    )
    embedding_lr: float | None = flag(
        None,
        "peak learning rate of the token embedding (default: --lr); of the output head too where they are tied",
        if_allowed(warm_start=True, above=0, added_later=True, synonyms="emb_lr embed_lr embeddings_lr lr_embedding"),
    )
    head_lr: float | None = flag(
        None,
        "peak learning rate of the output head (default: --lr)",
        if_allowed(warm_start=True, above=0, added_later=True, synonyms="lm_head_lr unembedding_lr lr_head"),
    )
    matrix_lr: float | None = flag(
        None,
        "peak learning rate of the attention and MLP linears: dense weights, or factors (default: --lr)",
        if_allowed(
            warm_start=True,
            above=0,
            added_later=True,
            synonyms="hidden_lr linear_lr factor_lr lora_lr muon_lr spectron_lr lr_matrix",
        ),
    )
    sparse_lr: float | None = flag(
        None,
        "peak learning rate of the sparse values (default: --lr)",
        if_allowed(warm_start=True, above=0, added_later=True, methods=("sltrain",)),
    )
    norm_lr: float | None = flag(
        None,
        "peak learning rate of norms, biases and trained scales (default: --lr)",
        if_allowed(warm_start=True, above=0, added_later=True, synonyms="scalar_lr"),
    )
    weight_decay: float = flag(
        0.0, "weight decay, applied to every parameter as published", if_allowed(warm_start=True, minimum=0, synonyms="wd")
    )
    decay_embedding: bool = flag(
        True,
        "apply --weight_decay to embedding and output head too",
        if_allowed(warm_start=True, added_later=True, no_effect=_without_weight_decay),
    )
    decay_norms: bool = flag(
        True,
        "apply --weight_decay to norms, biases and trained scales too",
        if_allowed(warm_start=True, added_later=True, no_effect=_without_weight_decay),
    )
    beta1: float = flag(
        0.0,
        "momentum of sgd and first moment of adafactor (0: off); the Adam family keeps 0.9",
        never(
            warm_start=True,
            minimum=0,
            below=1,
            no_effect=_without_beta1,
            synonyms="momentum adam_beta1",
        ),
    )
    muon_momentum: float = flag(
        0.95,
        "momentum of muon and spectron, for the linears' matrices",
        if_allowed(warm_start=True, minimum=0, below=1, added_later=True, no_effect=_without_momentum),
    )
    condition_gradients: bool = flag(
        False,
        "with muon and spectron: clip the other parameters' gradients and steady their norms as stable_spam does",
        never(
            warm_start=True,
            added_later=True,
            no_effect=_without_other_conditioning,
            synonyms="conditioned_gradients gradient_conditioning stable_spam",
        ),
    )
    reset_moments_every: int | None = flag(
        None,
        "update steps between resets of all moments to zero (default: 1000 with stable_spam, else none; 0: never)",
        if_allowed(
            warm_start=True,
            unit="updates",
            minimum=0,
            added_later=True,
            no_effect=_without_moments,
            synonyms="reset_every reset_interval",
        ),
    )
    beta2: float = flag(
        0.999,
        "second moment of the Adam family",
        if_allowed(
            warm_start=True, minimum=0, below=1, added_later=True, no_effect=_without_adam, synonyms="adam_beta2 adamw_beta2"
        ),
    )
    eps: float = flag(
        1e-8,
        "term added to the denominator of the Adam family's steps",
        if_allowed(warm_start=True, above=0, added_later=True, no_effect=_without_adam, synonyms="adam_epsilon epsilon"),
    )
    grad_clipping: float | None = flag(
        None,
        "clip the global gradient norm to this value (0 or not given: off)",
        if_allowed(
            warm_start=True,
            minimum=0,
            no_effect=lambda args: (
                "with an optimizer named *_per_layer, as published"
                + ("" if args.accumulate == "moments" else "; --grad_norm_growth 1.01 limits each tensor's gradient")
                if args.per_layer and args.grad_clipping is None and "per_layer" not in args.given
                else None
            ),
            synonyms="max_grad_norm grad_clip clip_grad gradient_clipping clip_grad_norm",
        ),
    )
    grad_norm_growth: float | None = flag(
        None,
        "limit each tensor's gradient norm to this many times its previous one, e.g. 1.01; also works with per_layer",
        if_allowed(warm_start=True, minimum=1, synonyms="norm_growth_limiter"),
    )
    per_layer: bool = flag(
        False,
        "step each parameter during the backward pass and free its gradient immediately (published: optimizers *_per_layer)",
        # Results are bit-identical to whole updates.
        freely(defines_run=True, synonyms="layerwise optim_layerwise"),
    )
    head_gradient: str = flag(
        "whole",
        "gradient of the output head: whole, computed in the forward pass | slices of the vocabulary, in the backward pass (less "
        "memory, one more matrix product of the head); with per_layer, head and embedding are also stepped in slices",
        freely(choices=HEAD_GRADIENTS),
    )
    accumulate: str = flag(
        "gradients",
        "what micro-batches are added up in, with per_layer: gradients | moments (no gradient of the whole model is kept; Adam's "
        "second moments are those of micro-batches)",
        never(warm_start=True, choices=ACCUMULATE, added_later=True),
    )
    embedding_states: str | None = flag(
        None,
        "moments of embedding and output head with optimizers named *8bit and *4bit: 32bit (default) | 8bit | 4bit (with *4bit)",
        never(
            warm_start=True,
            choices=tuple(EMBEDDING_STATES),
            no_effect=lambda args: (
                None
                if OPTIMIZERS[args.optimizer].low_bit
                else f"with --optimizer {args.optimizer}: its moments are not quantised"
            ),
        ),
    )
    stochastic_rounding: bool = flag(
        False,
        "round new bfloat16 parameters up or down at random, unbiased, so that small updates are not lost; also new int8 "
        "values with --weight_dtype int8, where the default is true",
        never(
            warm_start=True,
            no_effect=lambda args: (
                "with --dtype float32: nothing is rounded"
                if args.stochastic_rounding and args.dtype == "float32" and args.weight_dtype is None
                else None
            ),
        ),
    )
    scheduler: str = flag(
        "cosine",
        " | ".join(SCHEDULERS),
        if_allowed(warm_start=True, choices=SCHEDULERS, synonyms="lr_scheduler_type lr_scheduler lr_schedule lr_decay_style"),
    )
    min_lr_ratio: float = flag(
        0.1,
        "end of the cosine schedules as a share of the peak",
        if_allowed(
            warm_start=True,
            unit="share",
            minimum=0,
            maximum=1,
            no_effect=lambda args: "with --scheduler linear, which ends at 0" if args.scheduler == "linear" else None,
            synonyms="min_lr final_lr_ratio lr_min_ratio",
        ),
    )
    warmup_steps: int = flag(
        1_000,
        "update steps of linear warm-up",
        if_allowed(
            warm_start=True,
            unit="updates",
            minimum=0,
            synonyms="warmup num_warmup_steps warmup_iters warmup_ratio lr_warmup_steps",
        ),
    )
    cycle_length: int | None = flag(
        None,
        "update steps per cycle of the cosine schedules (default: one cycle)",
        if_allowed(
            warm_start=True,
            unit="updates",
            minimum=1,
            no_effect=lambda args: "with --scheduler linear, which has no cycles" if args.scheduler == "linear" else None,
        ),
    )
    restart_warmup_steps: int | None = flag(
        None,
        "update steps of warm-up after each restart of cosine_restarts, --restart_every or --relora",
        if_allowed(warm_start=True, unit="updates", minimum=0),
    )
    adjust_step: int = flag(
        0, "shift of the restarts, update steps (cosine_restarts)", if_allowed(warm_start=True, unit="updates", minimum=0)
    )


@dataclass
class RunArguments:
    """run, evaluation, record"""

    save_dir: str | None = flag(
        None,
        "the run's folder (default: checkpoints/<config>-<method>-<hash of the arguments>)",
        freely(kind="path", unit="folder", synonyms="output_dir out_dir run_dir"),
    )
    save_every: int = flag(
        10_000,
        "update steps between checkpoints; one more is written at the end",
        freely(unit="updates", minimum=1, synonyms="save_steps save_interval checkpoint_every"),
    )
    save_minutes: float | None = flag(
        None,
        "save too when this many minutes have passed since the last checkpoint, by rank 0's clock (default: off)",
        freely(unit="minutes", above=0, synonyms="save_interval_minutes save_time checkpoint_minutes"),
    )
    keep_checkpoints: int | None = flag(
        None, "newest checkpoints to keep (default: all)", freely(unit="checkpoints", minimum=1, synonyms="save_total_limit")
    )
    keep_every: int | None = flag(
        None,
        "save at multiples of this many update steps too; --keep_checkpoints never removes those (default: off)",
        freely(unit="updates", minimum=1, synonyms="keep_interval keep_period"),
    )
    async_save: bool = flag(
        False, "write checkpoints in the background, from a copy of the state (memory: parameters, support and moments)"
    )
    continue_from: str | None = flag(
        None,
        "a checkpoint (step_XXXXXXXX folder, or a run's folder: its newest) to resume from",
        freely(kind="path", unit="folder", synonyms="resume_from_checkpoint resume_from load_from checkpoint"),
    )
    resume: str = flag(
        "auto",
        "auto: resume from the newest checkpoint in save_dir; never: start a new run in a numbered folder",
        freely(choices=("auto", "never")),
    )
    on_nonfinite: str = flag(
        "skip",
        "an update whose loss or gradient is not finite: skip (10 in a row end the run) | stop (save state and token ids, "
        "and end the run)",
        freely(choices=("skip", "stop")),
    )
    allow_changes: str | None = flag(
        None, "comma-separated arguments that may differ from the checkpoint's, e.g. lr,num_training_steps"
    )
    eval_every: int = flag(
        5_000,
        "update steps between evaluations; one more follows at the end",
        freely(unit="updates", minimum=1, synonyms="eval_steps eval_interval val_interval"),
    )
    eval_tokens: int | None = flag(
        None,
        "tokens to evaluate on (default: 10M for c4, else the whole held-out split)",
        # The trained model does not depend on it.
        if_allowed(defines_run=False, kind="tokens", minimum=1, synonyms="eval_iters max_eval_tokens max_eval_samples"),
    )
    eval_at_start: bool = flag(False, "evaluate before the first update too", freely(synonyms="eval_on_start"))
    log_every: int = flag(
        1,
        "update steps between lines of metrics.jsonl",
        freely(unit="updates", minimum=1, synonyms="logging_steps log_interval log_freq"),
    )
    trace: int | None = flag(
        None,
        "trace this many updates with torch's profiler, after two of warm-up, to trace/ in the run's folder",
        freely(unit="updates", minimum=1, synonyms="profile profiler profile_steps"),
    )
    peak_tflops: float | None = flag(
        None,
        "peak of one device in the run's dtype, 10^12 operations per second, for mfu in the record (default: from a table of "
        "GPUs; measured on a CPU)",
        freely(unit="TFLOP/s", above=0, synonyms="peak_flops promised_flops gpu_peak_tflops"),
    )
    name: str | None = flag(
        None,
        "the run's name in the dashboard (default: the run folder's name)",
        freely(no_effect=_without_tracker, synonyms="run_name wandb_name exp_name"),
    )
    tags: str | None = flag(
        None,
        "comma-separated tags in the dashboard",
        freely(no_effect=_without_tracker, synonyms="wandb_tags"),
    )
    tracker: str = flag(
        "wandb",
        "the dashboard that gets the rows of metrics.jsonl: wandb | trackio (on this machine, without an account; "
        "scripts/dashboard.sh opens it)",
        freely(choices=TRACKERS, synonyms="log_with logger_type trackers"),
    )
    wandb: str = flag(
        "auto",
        "auto: online with a key, else offline | online | offline | disabled",
        freely(
            choices=WANDB_MODES,
            no_effect=lambda args: (
                f"with --tracker {args.tracker}" if args.tracker != "wandb" and args.wandb != "disabled" else None
            ),
            synonyms="report_to wandb_mode",
        ),
    )


@dataclass
class SystemArguments:
    """system"""

    seed: int = flag(42, "seed of initial values, support and data order", never(minimum=0, below=2**63, synonyms="random_seed"))
    device: str = flag("auto", "auto | cpu | cuda | cuda:N", freely(synonyms="gpu device_type"))
    memory: int | None = flag(
        None,
        "plan for a device with this much memory, such as 80GB (10^9 bytes) or 24GiB (2^30), that need not be here; with "
        "--dry_run, for a GPU unless --device cpu is given",
        freely(
            kind="memory",
            minimum=1,
            no_effect=lambda args: None if args.dry_run else "without --dry_run: a run has the memory of its device",
            synonyms="device_memory gpu_memory vram",
        ),
    )
    single_gpu: bool = flag(False, "published flag: one process without a process group; refused where torchrun started more")
    parallel: str = flag(
        "ddp",
        "how several processes share the work: ddp (each holds everything) | fsdp (parameters, gradients and moments are "
        "sharded, layers gathered one at a time)",
        freely(choices=PARALLEL, synonyms="strategy fsdp ddp distributed_strategy"),
    )
    reduce_dtype: str | None = flag(
        None,
        "dtype in which gradients are summed over processes: bfloat16 | float32 (default: that of the arithmetic)",
        if_allowed(warm_start=True, choices=DTYPES),
    )
    compute_dtype: str | None = flag(
        None,
        "with --parallel fsdp: gather parameters and compute in bfloat16, parameters and moments stay in --dtype float32",
        if_allowed(
            warm_start=True,
            choices={"bfloat16": "bfloat16", "bf16": "bfloat16"},
            no_effect=lambda args: (
                f"with --dtype {args.dtype}: parameters have that dtype already" if args.compute_dtype == args.dtype else None
            ),
            synonyms="param_dtype",
        ),
    )
    reshard_after_forward: bool = flag(
        True,
        "with --parallel fsdp: free a layer after its forward pass and gather it again in backward; false keeps all",
        freely(
            no_effect=lambda args: (
                None if args.parallel == "fsdp" else f"with --parallel {args.parallel}: every process holds all layers"
            )
        ),
    )
    timeout_s: float = flag(
        1800.0,
        "seconds that processes wait for one another before the run ends; must exceed the longest save",
        freely(unit="seconds", above=0, synonyms="timeout ddp_timeout"),
    )
    force: bool = flag(False, "start even where the plan predicts more memory than the device has")
    dry_run: bool = flag(False, "print the plan and stop: no data, no network")
    config: str | None = flag(
        None,
        "YAML or JSON file of flag names and values; the command line takes precedence",
        freely(kind="path", unit="file", synonyms="config_file config_path"),
    )


GROUPS = (ModelArguments, MethodArguments, DataArguments, OptimizationArguments, RunArguments, SystemArguments)
ROWS = rows_of(GROUPS)


@dataclass
class Arguments(SystemArguments, RunArguments, OptimizationArguments, DataArguments, MethodArguments, ModelArguments):
    """The values of all flags.

    given: flags that the user gave. refused: problems of the command line, by flag or by the unknown word; such a flag has its
    default here, and `plan.checks.check` raises the problems together with all others.
    """

    given: frozenset[str] = frozenset()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


def flags_with(on_resume: str) -> frozenset[str]:
    """Returns the flags with this value of `on_resume`."""
    return frozenset(name for name, row in ROWS.items() if row.on_resume == on_resume)


def allowed_changes(args: Arguments) -> frozenset[str]:
    """Returns the names that --allow_changes lists."""
    return frozenset(name.strip() for name in (args.allow_changes or "").split(",") if name.strip())


def reset_interval(args: Arguments) -> int | None:
    """Updates between resets of all moments, None for no resets."""
    every = OPTIMIZERS[args.optimizer].reset_every if args.reset_moments_every is None else args.reset_moments_every
    return every or None


def embedding_bits(args: Arguments) -> int | None:
    """Returns the bits of the moments of embedding and output head if --embedding_states chooses them, else None."""
    if not OPTIMIZERS[args.optimizer].low_bit:
        return None
    return EMBEDDING_STATES[args.embedding_states or "32bit"]


def arguments_of_record(values: dict[str, Any]) -> Arguments:
    """Returns the Arguments recorded in a run.json, without names that this version does not know.

    Raises:
        ValueError: a value does not have its argument's type.
    """
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    types = {field.name: str(field.type) for field in dataclasses.fields(Arguments) if field.name in ROWS}
    # An earlier version recorded None for some flags; its runs behaved as the present default.
    known = {name: value for name, value in values.items() if name in types and (value is not None or "None" in types[name])}
    for name, value in known.items():
        if not any(isinstance(value, kinds[kind]) for kind in types[name].split(" | ")):
            raise ValueError(f"{name} {value!r} is not of type {types[name]}")
    return Arguments(**known)


def default_save_dir(args: Arguments, total_batch_size: int) -> Path:
    """Returns checkpoints/<config>-<method>-<8 hex digits of the run-defining arguments>, for any number of processes."""
    defining = {name: getattr(args, name) for name, row in ROWS.items() if row.defines_run}
    defaults = {field.name: field.default for field in dataclasses.fields(Arguments) if field.name in ROWS}
    # Runs that were started before a flag existed keep their folder.
    defining = {name: value for name, value in defining.items() if not (ROWS[name].added_later and value == defaults[name])}
    defining["total_batch_size"] = total_batch_size
    digest = hashlib.blake2b(json.dumps(defining, sort_keys=True).encode(), digest_size=4).hexdigest()
    return Path("checkpoints") / f"{Path(args.model_config).stem}-{args.peft_model}-{digest}"


def as_dict(args: Arguments) -> dict[str, Any]:
    """Returns all arguments by name, as JSON-serialisable values, for run.json and the dashboard."""
    return {name: getattr(args, name) for name in ROWS}
