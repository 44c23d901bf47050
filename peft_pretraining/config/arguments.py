"""The program's arguments: one dataclass per topic, what each may be, and what they say of a run.

`Arguments` holds what the user asked for (read by `command_line`, checked by `refusals`); what follows from it (accumulation,
steps, tokens) is `plan.Plan`. No torch in here: `--help` and every argument error must answer in about a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.config.supports import SUPPORTS


def _method_names() -> list[str]:
    """Names of the files of methods/ that define METHOD; listed and not imported, since methods/ imports this room."""
    files = sorted((Path(__file__).parent.parent / "methods").glob("*.py"))
    return [file.stem for file in files if "\nMETHOD = " in file.read_text(encoding="utf-8")]


# What --peft_model may be. methods.register adds the name of a method that is defined elsewhere.
METHOD_NAMES = _method_names()

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")


SCHEDULERS = ("linear", "cosine", "cosine_restarts")


DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}


INITS = ("default", "svd")


LINEAR_PATHS = ("auto", "materialised", "factored")


PARALLEL = ("ddp", "fsdp")


EMBEDDING_STATES = ("32bit", "8bit")


ON_BAD_RECORD = ("skip", "fail")


WANDB_MODES = ("auto", "online", "offline", "disabled")


class ConfigError(ValueError):
    """Arguments that cannot work; `problems` holds one complete sentence for each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def _arg(default: Any, help: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """model"""

    model_config: str = _arg("", "JSON file of the model's shape, e.g. configs/llama_60m.json", required=True)
    dtype: str | None = _arg(
        None,
        "parameters and arithmetic: bfloat16 | float32 (default: bfloat16 on a GPU that has it, else float32)",
        choices=DTYPES,
    )
    activation_checkpointing: str | None = _arg(
        None,
        "recompute activations in backward: layer (keep each decoder layer's input only; the flag alone) | selective "
        "(keep attention's output too)",
        const="layer",
        choices=("layer", "selective"),
    )
    compile: bool = _arg(False, "compile every decoder layer with torch.compile")
    use_hf_model: bool = _arg(False, "published flag, no effect: the model always is transformers' LLaMA")


@dataclass
class MethodArguments:
    """method"""

    peft_model: str = _arg(
        "full",
        f"what the attention and MLP linears become: {' | '.join(METHOD_NAMES)}; full: dense, galore: dense with projected "
        "gradients, lowrank: two factors, relora: dense and frozen, plus factors that are merged into them every --relora "
        "updates, sltrain: two factors plus a sparse part",
        choices=METHOD_NAMES,
    )
    rank: int = _arg(128, "rank r of the low-rank part B A; of galore's projections")
    sp_ratio: float = _arg(0.01, "sparsity delta: share of each weight's entries that the sparse part trains, in (0, 1)")
    lora_alpha: float = _arg(32.0, "alpha: the low-rank part is scaled by alpha / rank")
    train_scaling: bool = _arg(False, "train the low-rank part's scale as tanh(c), c starting at 1, instead of alpha / rank")
    support: str = _arg(
        "uniform",
        "where the sparse entries lie: uniform (at random over the whole weight, as published) | block (1/sp_ratio "
        "dense blocks, rows interleaved: faster, nothing to store)",
        choices=tuple(SUPPORTS),
    )
    linear_path: str = _arg(
        "auto",
        "how a low-rank (plus sparse) linear is computed: materialised (builds W) | factored | auto (whichever is faster)",
        choices=LINEAR_PATHS,
    )
    lora_dropout: float = _arg(0.0, "published flag, no effect (the published layer never applied it)")
    update_proj_gap: int = _arg(200, "galore: update steps from one SVD of the gradients to the next")
    galore_scale: float = _arg(0.25, "galore: the projected step is multiplied by this on its way back to the weights")
    proj_type: str = _arg(
        "std",
        "galore: singular vectors that span the subspace: std (of the weight's shorter side) | reverse_std (of its longer one) "
        "| right | left | full (both)",
        choices=PROJ_TYPES,
    )
    init: str = _arg(
        "default",
        "lowrank, sltrain: initial values: default (the published ones) | svd (of a dense initialisation: the best rank-r part "
        "as balanced factors, the sparse values from what it leaves)",
        choices=INITS,
    )
    restart_every: int | None = _arg(
        None,
        "lowrank, sltrain: update steps between restarts, which set the moments of the factored linears to zero (default: none)",
    )
    rebalance: bool = _arg(False, "with --restart_every: a restart replaces B and A by balanced factors of the same product")
    relora: int | None = _arg(None, "relora: update steps between merges of the factors into the dense weights")
    warmed_up_model: str | None = _arg(
        None,
        "relora: a full-rank run's folder or checkpoint, whose weights, update step and data position it starts from "
        "(default: from the seed's initial values)",
    )
    reset_optimizer_on_relora: bool | None = _arg(
        None, "relora: zero the factors' moments at a merge (default: true, unless they are pruned)"
    )
    optimizer_random_pruning: float | None = _arg(
        None, "relora: share of the factors' moments, chosen at random, that a merge zeroes instead"
    )
    optimizer_magnitude_pruning: float | None = _arg(
        None, "relora: share of the factors' moments, the smallest ones, that a merge zeroes instead"
    )


@dataclass
class DataArguments:
    """data"""

    dataset: str = _arg(
        "c4",
        "c4 (streamed from the hub) | demo (built from installed documentation) | folder, file, glob or URL | hub:NAME | folder "
        "made by `python -m peft_pretraining data prepare`",
    )
    eval_dataset: str | None = _arg(None, "held-out data, named like --dataset (default: the validation split of --dataset)")
    text_field: str = _arg("text", "field of a record that holds the text")
    tokenizer: str | None = _arg(
        None,
        "hub name, tokenizer folder or SentencePiece .model file (default: t5-base; their own for demo and prepared data)",
    )
    max_length: int = _arg(256, "sequence length, tokens")
    packing: bool = _arg(
        False,
        "concatenate documents with eos, no padding (default, as published: each document cut to max_length and padded)",
    )
    document_mask: bool = _arg(
        False,
        "with --packing: a token attends to its own document only, and positions begin anew at each document, in training and "
        "evaluation",
    )
    data_lanes: int | None = _arg(
        None,
        "virtual readers; they fix the data's order for any number of processes and workers (default: c4 64, else 24)",
    )
    workers: int | None = _arg(
        None,
        "tokenising processes per rank, 0 for none (default: up to 8, leaving a core to the trainer; 0 for prepared data)",
    )
    on_bad_record: str = _arg(
        "skip",
        "records that hold no text, and files that cannot be read: skip (pass over and count; more than a quarter of all end "
        "the run) | fail (end the run at the first, with file and line)",
        choices=ON_BAD_RECORD,
    )


@dataclass
class OptimizationArguments:
    """optimization"""

    batch_size: int = _arg(0, "sequences per micro-batch and process", required=True)
    gradient_accumulation: int | None = _arg(None, "micro-batches per update (default: from total_batch_size)")
    total_batch_size: int | None = _arg(
        None, "sequences per update over all processes (default: batch_size x accumulation x processes)"
    )
    num_training_steps: int = _arg(10_000, "update steps to train for, exactly")
    max_train_tokens: int | None = _arg(
        None,
        "end with the update that reaches this many tokens (150M, 1.1B, ...); replaces num_training_steps",
        type="tokens",
    )
    optimizer: str = _arg(
        "adam",
        f"{' | '.join(OPTIMIZERS)}; published names galore_adamw, ... mean --peft_model galore with one of these",
        choices=tuple(OPTIMIZERS),
    )
    lr: float = _arg(1e-4, "peak learning rate")
    weight_decay: float = _arg(0.0, "weight decay, applied to every parameter as published")
    beta1: float = _arg(0.0, "momentum of sgd and first moment of adafactor (0: off); the Adam family keeps 0.9")
    grad_clipping: float | None = _arg(None, "clip the global gradient norm to this value (0 or not given: off)")
    grad_norm_growth: float | None = _arg(
        None, "limit each tensor's gradient norm to this many times its last one, e.g. 1.01; works with per_layer too"
    )
    per_layer: bool = _arg(
        False,
        "step each parameter in the backward pass and free its gradient at once (published: optimizers *_per_layer)",
    )
    embedding_states: str | None = _arg(
        None,
        "moments of embedding and output head with adam8bit and adamw4bit: 32bit (default) | 8bit (as the optimizer's others)",
        choices=EMBEDDING_STATES,
    )
    stochastic_rounding: bool = _arg(
        False,
        "round new bfloat16 parameters up or down at random, right on average, so that small updates are not lost",
    )
    scheduler: str = _arg("cosine", " | ".join(SCHEDULERS), choices=SCHEDULERS)
    min_lr_ratio: float = _arg(0.1, "end of the cosine schedules as a share of the peak")
    warmup_steps: int = _arg(1_000, "update steps of linear warm-up")
    cycle_length: int | None = _arg(None, "update steps per cycle of the cosine schedules (default: one cycle)")
    restart_warmup_steps: int | None = _arg(
        None, "update steps of warm-up after each restart of cosine_restarts, --restart_every or --relora"
    )
    adjust_step: int = _arg(0, "shift of the restarts, update steps (cosine_restarts)")


@dataclass
class RunArguments:
    """run, evaluation, record"""

    save_dir: str | None = _arg(None, "the run's folder (default: checkpoints/<config>-<method>-<hash of the arguments>)")
    save_every: int = _arg(10_000, "update steps between checkpoints; one more is written at the end")
    keep_checkpoints: int | None = _arg(None, "newest checkpoints to keep (default: all)")
    async_save: bool = _arg(
        False, "write checkpoints in the background, from a copy of the state (memory: parameters, support and moments)"
    )
    continue_from: str | None = _arg(None, "a checkpoint (step_XXXXXXXX folder, or a run's folder: its newest) to go on from")
    resume: str = _arg(
        "auto",
        "auto: go on from the newest checkpoint in save_dir; never: start afresh in a numbered folder",
        choices=("auto", "never"),
    )
    on_nonfinite: str = _arg(
        "skip",
        "an update whose loss or gradient is not finite: skip it, 10 in a row end the run | stop: save what is needed to look "
        "into it, and end",
        choices=("skip", "stop"),
    )
    allow_changes: str | None = _arg(
        None, "comma-separated arguments that may differ from the checkpoint's, e.g. lr,num_training_steps"
    )
    eval_every: int = _arg(5_000, "update steps between evaluations; one more follows at the end")
    eval_tokens: int | None = _arg(
        None, "tokens to evaluate on (default: 10M for c4, else the whole held-out split)", type="tokens"
    )
    eval_at_start: bool = _arg(False, "evaluate before the first update too")
    log_every: int = _arg(1, "update steps between lines of metrics.jsonl")
    name: str | None = _arg(None, "the run's name in wandb (default: the run folder's name)")
    tags: str | None = _arg(None, "comma-separated tags in wandb")
    wandb: str = _arg("auto", "auto: online with a key, else offline | online | offline | disabled", choices=WANDB_MODES)


@dataclass
class SystemArguments:
    """system"""

    seed: int = _arg(42, "seed of initial values, support and data order")
    device: str = _arg("auto", "auto | cpu | cuda | cuda:N")
    single_gpu: bool = _arg(False, "published flag: one process without a process group; refused where torchrun started more")
    parallel: str = _arg(
        "ddp",
        "how several processes share the work: ddp (each holds everything) | fsdp (parameters, gradients and moments are "
        "sharded, layers gathered one at a time)",
        choices=PARALLEL,
    )
    reduce_dtype: str | None = _arg(
        None,
        "dtype in which gradients are summed over processes: bfloat16 | float32 (default: that of the arithmetic)",
        choices=DTYPES,
    )
    compute_dtype: str | None = _arg(
        None,
        "with --parallel fsdp: gather parameters and compute in bfloat16, parameters and moments stay in --dtype float32",
        choices={"bfloat16": "bfloat16", "bf16": "bfloat16"},
    )
    reshard_after_forward: bool = _arg(
        True,
        "with --parallel fsdp: free a layer after its forward pass and gather it again in backward; false keeps all",
    )
    timeout_s: float = _arg(
        1800.0, "seconds that processes wait for one another before the run ends; more than the longest save takes"
    )
    force: bool = _arg(False, "start even where the plan says that memory will not do")
    dry_run: bool = _arg(False, "print the plan and stop: no data, no network")
    config: str | None = _arg(None, "YAML or JSON file of these names; the command line wins over it")


@dataclass
class Arguments(SystemArguments, RunArguments, OptimizationArguments, DataArguments, MethodArguments, ModelArguments):
    """Everything the user can say, flat; `given` names what was said rather than defaulted."""

    given: frozenset[str] = frozenset()


GROUPS = (ModelArguments, MethodArguments, DataArguments, OptimizationArguments, RunArguments, SystemArguments)


# Arguments that say which run this is; the default save_dir is keyed by them, so that the same script finds its run.
RUN_DEFINING = (
    *("model_config", "dtype", "peft_model", "rank", "sp_ratio", "lora_alpha", "train_scaling", "support"),
    *("update_proj_gap", "galore_scale", "proj_type", "init", "restart_every", "rebalance"),
    *("relora", "warmed_up_model", "reset_optimizer_on_relora"),
    *("optimizer_random_pruning", "optimizer_magnitude_pruning"),
    *("dataset", "text_field", "tokenizer", "max_length", "packing", "document_mask", "data_lanes", "seed"),
    *("num_training_steps", "max_train_tokens"),
    *("optimizer", "lr", "weight_decay", "beta1", "grad_clipping", "scheduler", "min_lr_ratio"),
    *("grad_norm_growth", "per_layer", "embedding_states", "stochastic_rounding", "reduce_dtype", "compute_dtype"),
    *("warmup_steps", "cycle_length", "restart_warmup_steps", "adjust_step"),
)


# Of a run that goes on, these can be other than before where --allow_changes names them ("dataset": its contents too).
CHANGEABLE = (
    *("lr", "scheduler", "warmup_steps", "min_lr_ratio", "cycle_length", "restart_warmup_steps", "adjust_step"),
    *(
        "num_training_steps",
        "max_train_tokens",
        "total_batch_size",
        "weight_decay",
        "grad_clipping",
        "grad_norm_growth",
    ),
    *("update_proj_gap", "galore_scale", "init", "restart_every", "rebalance"),
    *("relora", "warmed_up_model", "reset_optimizer_on_relora"),
    *("optimizer_random_pruning", "optimizer_magnitude_pruning"),
    *("lora_alpha", "document_mask", "dataset", "text_field", "tokenizer", "reduce_dtype", "compute_dtype"),
)


# These cannot: the checkpoint's tensors or its data position would not fit.
UNCHANGEABLE = (
    *("model_config", "dtype", "peft_model", "rank", "sp_ratio", "train_scaling", "support", "proj_type", "seed"),
    *("max_length", "packing", "data_lanes"),
    *("optimizer", "beta1", "embedding_states", "stochastic_rounding"),
)


# What --warmed_up_model takes from the full-rank run is its weights and how far it has come: method, optimizer and schedule
# are the new run's own.
WARM_START_CHANGES = frozenset(
    {"peft_model", "rank", "sp_ratio", "train_scaling", "support", "proj_type", "optimizer", "beta1"}
    | {"embedding_states", "stochastic_rounding"}
    | set(CHANGEABLE) - {"document_mask", "dataset", "text_field", "tokenizer", "total_batch_size"}
)


def allowed_changes(args: Arguments) -> frozenset[str]:
    """The names that --allow_changes lists."""
    return frozenset(name.strip() for name in (args.allow_changes or "").split(",") if name.strip())


def suggestion(name: str, known: set[str]) -> str:
    """What to add to a message about an unknown name: the known one that is close, if any."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def embedding_bits(args: Arguments) -> int | None:
    """Bits of the moments of embedding and output head where they are chosen apart from the others'."""
    if not OPTIMIZERS[args.optimizer].low_bit:
        return None
    return 8 if args.embedding_states == "8bit" else 32


def arguments_of_record(values: dict[str, Any]) -> Arguments:
    """Arguments from a run.json, of which names that this version does not know are left out.

    Raises:
        ValueError: a value is not of its argument's type.
    """
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    fields = {field.name: str(field.type) for field in dataclasses.fields(Arguments) if field.name != "given"}
    # Where an earlier version left a value open that has a default now, it ran as that does.
    known = {name: value for name, value in values.items() if name in fields and (value is not None or "None" in fields[name])}
    for name, value in known.items():
        if not any(isinstance(value, kinds[kind]) for kind in fields[name].split(" | ")):
            raise ValueError(f"{name} {value!r} is no {fields[name]}")
    return Arguments(**known)


def default_save_dir(args: Arguments, total_batch_size: int) -> Path:
    """checkpoints/<config>-<method>-<8 hex digits of the run-defining arguments>, the same for any number of processes."""
    defining = {name: getattr(args, name) for name in RUN_DEFINING} | {"total_batch_size": total_batch_size}
    digest = hashlib.blake2b(json.dumps(defining, sort_keys=True).encode(), digest_size=4).hexdigest()
    return Path("checkpoints") / f"{Path(args.model_config).stem}-{args.peft_model}-{digest}"


def as_dict(args: Arguments) -> dict[str, Any]:
    """Every argument by name, JSON-able, for run.json and the dashboard."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name != "given"}
