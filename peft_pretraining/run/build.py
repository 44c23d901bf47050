"""Builds the parts of a run from its arguments: data, tokenizer, model and optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_pretraining.config.arguments import Arguments, ConfigError, embedding_bits
from peft_pretraining.config.model_config import ModelConfig
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.parameter_groups import group_of, lr_ratios, undecayed_groups
from peft_pretraining.data.loader import EvalSet, TrainLoader
from peft_pretraining.data.mixture import Mixture, open_dataset
from peft_pretraining.data.records import OnBadRecord
from peft_pretraining.data.source import READING_RULES, Source
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.distributed.device import torch_dtype
from peft_pretraining.distributed.parallel import Sharding, settle_shards, shard
from peft_pretraining.distributed.world import World
from peft_pretraining.memory.counts import loss_chunk_rows
from peft_pretraining.methods import METHODS, has_effect
from peft_pretraining.model.llama import initialize, materialize, meta_model, prepare_to_train, scale_start, start_from_svd
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.optim.build import build_galore, build_optimizer
from peft_pretraining.optim.galore import Subspace
from peft_pretraining.optim.orthogonal import pairs_of_factors
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, Updates, WholeUpdate
from peft_pretraining.plan.checks import check_inputs
from peft_pretraining.plan.plan import Plan
from sparse_lora import kernels


def default_workers(device: torch.device, world: World) -> int:
    """Returns the number of tokenising processes per rank: at most 8, leaving one core to each training process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // world.local_size - 1))


@dataclass(frozen=True)
class Data:
    """The data of a run: training and held-out source, tokenizer, training loader and evaluation set."""

    source: Source | Mixture
    held_out: Source | Mixture
    tokenizer: Tokenizer
    loader: TrainLoader
    eval_set: EvalSet


def build_data(args: Arguments, plan: Plan, world: World, device: torch.device, rules: int = READING_RULES) -> Data:
    """Opens the data and the tokenizer and checks that they fit the model.

    rules: READING_RULES, or those with which the run began in an earlier version.

    Raises:
        DataError, TokenizerError: the data or the tokenizer cannot be opened.
        ConfigError: local inputs are missing, or the tokenizer produces ids outside the model's vocabulary.
    """
    check_inputs(args)
    source = open_dataset(args.dataset, "train", text_field=args.text_field, rules=rules)
    held_out = open_dataset(
        *(args.eval_dataset or args.dataset, "validation"),
        text_field=args.text_field,
        trained_on=None if args.eval_dataset is None else [args.dataset] if rules > 2 else [],
        rules=rules,
    )
    # Prepared data contains its tokenizer, used only for the run's folder and for bits per byte.
    tokenizer = load_tokenizer(args.tokenizer or source.default_tokenizer)
    check_vocabulary(plan.model, tokenizer)
    workers = default_workers(device, world) if args.workers is None else args.workers
    on_bad_record: OnBadRecord = "fail" if args.on_bad_record == "fail" else "skip"
    loader = TrainLoader(
        source,
        tokenizer,
        max_length=args.max_length,
        packing=args.packing,
        lanes=plan.data_lanes,
        seed=args.seed,
        rank=world.rank,
        world_size=world.size,
        workers=0 if source.prepared is not None and args.workers is None else workers,
        batch_size=args.batch_size,
        pin_memory=device.type == "cuda",
        on_bad_record=on_bad_record,
        data_order=args.data_order,  # type: ignore[arg-type]
    )
    eval_set = EvalSet(
        held_out,
        tokenizer,
        max_length=args.max_length,
        packing=args.packing,
        max_tokens=plan.eval_tokens,
        rank=world.rank,
        world_size=world.size,
        batch_size=args.batch_size,
        workers=workers,
        pin_memory=device.type == "cuda",
        on_bad_record=on_bad_record,
    )
    return Data(source, held_out, tokenizer, loader, eval_set)


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuses a model whose vocabulary is smaller than the tokenizer's. Raises ConfigError."""
    if model.vocab_size < tokenizer.text_vocab_size:
        raise ConfigError(
            [
                f"{model.path}: vocab_size {model.vocab_size} is too small, text of tokenizer {tokenizer.name} needs ids "
                f"up to {tokenizer.text_vocab_size - 1}; set vocab_size to at least {tokenizer.text_vocab_size}, or choose "
                "another --tokenizer"
            ]
        )


def build_token_loss(
    args: Arguments, plan: Plan, world: World, device: torch.device, eos_id: int | None = None, restored: bool = False
) -> TokenLoss:
    """Builds the model with its method and loss on the device, with initial values drawn from the seed; sharded with fsdp.

    eos_id: token id that ends a document, for --document_mask. restored: a checkpoint is loaded next, so --init svd is skipped.
    """
    kernels.choose(args.kernels)
    # For --device cpu and other methods a notice has said so before.
    wanted = args.kernels == "triton" and args.device != "cpu" and has_effect("kernels", args.peft_model)
    sharded = args.parallel == "fsdp" and world.size > 1
    dtype = torch_dtype((sharded and args.compute_dtype) or plan.dtype)
    if wanted and (reason := kernels.why_unavailable(device, dtype)) is not None:
        world.say(f"notice: --kernels triton has no effect: {reason}")
    model = meta_model(plan.model, torch_dtype(plan.dtype))
    METHODS[args.peft_model].apply(model, args)
    if args.weight_dtype is not None:
        from peft_pretraining.model.int8 import quantise_parameters

        quantise_parameters(model)
    document_end = eos_id if args.packing and args.document_mask else None
    token_loss = TokenLoss(model, loss_chunk_rows(device.type), document_end, args.head_gradient)
    if sharded:
        # A tied embedding is also the output head, which is not sharded separately.
        embedding = [] if plan.model.tie_word_embeddings else [model.model.embed_tokens]
        sharding = Sharding(_dtype(args.compute_dtype), _dtype(args.reduce_dtype), args.reshard_after_forward)
        shard(token_loss, [*embedding, *model.model.layers], device, sharding)
    materialize(model, device)
    initialize(model, args.seed)
    if args.init == "svd" and not restored:
        start_from_svd(model, model.config.initializer_range, args.seed, world)
    if args.start_scale != 1 and not restored:
        scale_start(model, METHODS[args.peft_model].start_parameters, args.start_scale)
    if sharded:
        settle_shards(token_loss, device)
    prepare_to_train(model, args.activation_checkpointing, args.compile)
    return token_loss


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else torch_dtype(name)


def start_cache(args: Arguments, plan: Plan, model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Caches positions as planned (--linear_cache).

    Returns the context in which an update is made: it holds the linears' weights if they are cached, else it does nothing.
    """
    if plan.linear_cache == "none":
        return nullcontext
    from sparse_lora.cache import WeightCache, cache_positions

    cache_positions(model)
    return WeightCache(model, args.batch_size * args.max_length).filled if plan.linear_cache == "weights" else nullcontext


def build_updates(args: Arguments, model: nn.Module, world: World, device: torch.device, num_micro_batches: int = 1) -> Updates:
    """Builds the optimizer and its update procedure (whole or per layer). Raises OptimizerUnavailable.

    num_micro_batches: of each update and process.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    settings: dict[str, Any] = {
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "beta1": args.beta1,
        "beta2": args.beta2,
        "eps": args.eps,
        "lr_ratios": lr_ratios(args),
        "undecayed": undecayed_groups(args),
        "momentum": args.muon_momentum,
        "condition_gradients": args.condition_gradients,
        "factor_scale": args.lora_alpha / args.rank,
        "embedding_bits": embedding_bits(args),
        "rounding": StochasticRounding(args.seed) if args.stochastic_rounding else None,
        "sliced": args.weight_dtype is not None or args.accumulate == "moments",
    }
    build = partial(build_optimizer, args.optimizer, **settings)
    if METHODS[args.peft_model].projected:
        subspace = Subspace(args.rank, args.update_proj_gap, args.galore_scale, args.proj_type)
        matrices = frozenset(METHODS[args.peft_model].projected_matrices(model))
        build = partial(build_galore, args.optimizer, matrices=matrices, subspace=subspace, world=world, **settings)
    growth = None if args.grad_norm_growth is None else GrowthLimit(args.grad_norm_growth, len(parameters), device)
    if args.per_layer:
        joint = pairs_of_factors(parameters) if OPTIMIZERS[args.optimizer].steps_pairs else []
        ends = [name for name, parameter in parameters.items() if group_of(name, parameter.dim()) in ("embedding", "head")]
        # A tied matrix gets the sum of two gradients.
        by_rows = ends if args.head_gradient == "slices" and len(ends) == 2 else []
        common: dict[str, Any] = {"reduce_dtype": _dtype(args.reduce_dtype), "joint": joint, "by_rows": by_rows}
        if args.accumulate == "moments" and num_micro_batches > 1:
            from peft_pretraining.optim.accumulation import AccumulatingUpdate

            return AccumulatingUpdate(build, parameters, world, num_micro_batches=num_micro_batches, seed=args.seed, **common)
        return PerLayerUpdate(build, parameters, world, growth=growth, **common)
    return WholeUpdate(
        build,
        parameters,
        world,
        grad_clipping=args.grad_clipping,
        growth=growth,
        free_gradients=world.size == 1 or args.parallel == "fsdp",
    )
