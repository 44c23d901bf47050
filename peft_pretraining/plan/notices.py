"""Which of the given flags have no effect in this run: a line for each."""

from __future__ import annotations

import dataclasses

from peft_pretraining.config.arguments import Arguments, MethodArguments
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.methods import METHODS, has_effect, owners


def _method_notices(args: Arguments) -> list[str]:
    lines = []
    for field in dataclasses.fields(MethodArguments):
        if field.name in args.given and not has_effect(field.name, args.peft_model):
            of = owners(field.name)
            lines.append(
                f"--{field.name} has no effect with --peft_model {args.peft_model}"
                + (f": it belongs to {of[0]}" if len(of) == 1 else "")
            )
    return lines + METHODS[args.peft_model].notices(args)


def notices(args: Arguments) -> list[str]:
    """One line for each flag that was given and has no effect in this run."""
    lines = _method_notices(args)
    if args.use_hf_model:
        lines.append("--use_hf_model has no effect: the model always is transformers' LLaMA")
    if args.lora_dropout:
        lines.append(f"--lora_dropout {args.lora_dropout} has no effect: the published layer never applied it")
    if args.document_mask and not args.packing:
        lines.append("--document_mask has no effect without --packing: a sequence holds one document")
    if "beta1" in args.given and not OPTIMIZERS[args.optimizer].uses_beta1:
        lines.append(f"--beta1 {args.beta1} has no effect with --optimizer {args.optimizer}: the Adam family keeps 0.9")
    if args.per_layer and "grad_clipping" in args.given and args.grad_clipping is None and "per_layer" not in args.given:
        lines.append(
            "--grad_clipping has no effect with an optimizer named *_per_layer, as published; --grad_norm_growth 1.01 limits "
            "each tensor's gradient"
        )
    if args.embedding_states is not None and not OPTIMIZERS[args.optimizer].low_bit:
        lines.append(f"--embedding_states has no effect with --optimizer {args.optimizer}: its moments are not quantised")
    if args.stochastic_rounding and args.dtype == "float32":
        lines.append("--stochastic_rounding has no effect with --dtype float32: nothing is rounded")
    if args.compute_dtype is not None and args.dtype == args.compute_dtype:
        lines.append(f"--compute_dtype has no effect with --dtype {args.dtype}: that is what parameters have")
    if "reshard_after_forward" in args.given and args.parallel != "fsdp":
        lines.append(f"--reshard_after_forward has no effect with --parallel {args.parallel}: every process holds all layers")
    if args.wandb == "disabled":
        lines += [f"--{name} has no effect with --wandb disabled" for name in ("name", "tags") if name in args.given]
    restarts = args.scheduler == "cosine_restarts" or METHODS[args.peft_model].restart(args) is not None
    cycles = ("cycle_length", "min_lr_ratio") if args.scheduler == "linear" else ()
    lines += [
        f"--{name} has no effect with --scheduler {args.scheduler}"
        for name in (*(() if restarts else ("restart_warmup_steps",)), *cycles)
        if name in args.given
    ]
    if args.max_train_tokens is not None and "num_training_steps" in args.given:
        lines.append(f"--max_train_tokens {args.max_train_tokens} replaces --num_training_steps {args.num_training_steps}")
    return lines
