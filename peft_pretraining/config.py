"""The program's arguments: one dataclass per topic, parsed with plain argparse, checked before anything heavy is loaded.

`Arguments` holds what the user asked for; what follows from it (accumulation, steps, tokens) is `plan.Plan`. No torch in
here: `--help` and every argument error must answer in about a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from peft_pretraining.memory import METHODS, OPTIMIZERS, PROJ_TYPES, SUPPORT_KINDS, block_count

# Methods whose linears are factors that a restart can act on.
RESTARTED = ("lowrank", "sltrain")
LOW_BIT = ("adam8bit", "adamw4bit")
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
        f"what the attention and MLP linears become: {' | '.join(METHODS)} (dense ones, whose gradients are projected); relora: "
        "frozen dense ones plus factors that are merged into them every --relora updates",
        choices=METHODS,
    )
    rank: int = _arg(128, "rank r of the low-rank part B A; of galore's projections")
    sp_ratio: float = _arg(
        0.01, "sparsity delta: share of each weight's entries that the sparse part trains, in (0, 1)"
    )
    lora_alpha: float = _arg(32.0, "alpha: the low-rank part is scaled by alpha / rank")
    train_scaling: bool = _arg(
        False, "train the low-rank part's scale as tanh(c), c starting at 1, instead of alpha / rank"
    )
    support: str = _arg(
        "uniform",
        "where the sparse entries lie: uniform (at random over the whole weight, as published) | block (1/sp_ratio "
        "dense blocks, rows interleaved: faster, nothing to store)",
        choices=SUPPORT_KINDS,
    )
    linear_path: str = _arg(
        "auto",
        "how a low-rank (plus sparse) linear is computed: materialised (builds W) | factored | auto (whichever is faster)",
        choices=LINEAR_PATHS,
    )
    lora_dropout: float = _arg(0.0, "published flag, no effect (the published layer never applied it)")
    update_proj_gap: int = _arg(200, "galore: update steps from one SVD of the gradients to the next", method="galore")
    galore_scale: float = _arg(
        0.25, "galore: the projected step is multiplied by this on its way back to the weights", method="galore"
    )
    proj_type: str = _arg(
        "std",
        "galore: singular vectors that span the subspace: std (of the weight's shorter side) | reverse_std (of its longer one) "
        "| right | left | full (both)",
        choices=PROJ_TYPES,
        method="galore",
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
    rebalance: bool = _arg(
        False, "with --restart_every: a restart replaces B and A by balanced factors of the same product"
    )
    relora: int | None = _arg(
        None, "relora: update steps between merges of the factors into the dense weights", method="relora"
    )
    warmed_up_model: str | None = _arg(
        None,
        "relora: a full-rank run's folder or checkpoint, whose weights, update step and data position it starts from "
        "(default: from the seed's initial values)",
        method="relora",
    )
    reset_optimizer_on_relora: bool | None = _arg(
        None, "relora: zero the factors' moments at a merge (default: true, unless they are pruned)", method="relora"
    )
    optimizer_random_pruning: float | None = _arg(
        None, "relora: share of the factors' moments, chosen at random, that a merge zeroes instead", method="relora"
    )
    optimizer_magnitude_pruning: float | None = _arg(
        None, "relora: share of the factors' moments, the smallest ones, that a merge zeroes instead", method="relora"
    )


@dataclass
class DataArguments:
    """data"""

    dataset: str = _arg(
        "c4",
        "c4 (streamed from the hub) | demo (built from installed documentation) | folder, file, glob or URL | hub:NAME | folder "
        "made by `python -m peft_pretraining data prepare`",
    )
    eval_dataset: str | None = _arg(
        None, "held-out data, named like --dataset (default: the validation split of --dataset)"
    )
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
        choices=OPTIMIZERS,
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

    save_dir: str | None = _arg(
        None, "the run's folder (default: checkpoints/<config>-<method>-<hash of the arguments>)"
    )
    save_every: int = _arg(10_000, "update steps between checkpoints; one more is written at the end")
    keep_checkpoints: int | None = _arg(None, "newest checkpoints to keep (default: all)")
    async_save: bool = _arg(
        False, "write checkpoints in the background, from a copy of the state (memory: parameters, support and moments)"
    )
    continue_from: str | None = _arg(
        None, "a checkpoint (step_XXXXXXXX folder, or a run's folder: its newest) to go on from"
    )
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
    wandb: str = _arg(
        "auto", "auto: online with a key, else offline | online | offline | disabled", choices=WANDB_MODES
    )


@dataclass
class SystemArguments:
    """system"""

    seed: int = _arg(42, "seed of initial values, support and data order")
    device: str = _arg("auto", "auto | cpu | cuda | cuda:N")
    single_gpu: bool = _arg(
        False, "published flag: one process without a process group; refused where torchrun started more"
    )
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


def _allow_changes_problems(args: Arguments) -> list[str]:
    problems = []
    for name in sorted(allowed_changes(args) - set(CHANGEABLE)):
        if name in UNCHANGEABLE:
            reason = "cannot change in a run that goes on: what the checkpoint holds would not fit"
        elif name in {field.name for field in dataclasses.fields(Arguments)}:
            reason = "may always change, it is not compared; leave it out"
        else:
            reason = f"is no argument{_suggestion(name, set(CHANGEABLE))}"
        problems.append(f"--allow_changes {name}: {reason}; names that can be given: {', '.join(sorted(CHANGEABLE))}")
    return problems


def parse_tokens(text: str) -> int:
    """Number of tokens from `150M`, `1.1B`, `2k` or plain digits (powers of 1000). Raises ValueError."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    number, unit = (text[:-1], units.get(text[-1:].lower())) if text[-1:].lower() in units else (text, 1)
    value = float(number) * (unit or 1)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{text!r} is not a whole number of tokens")
    return int(value)


def _parse_bool(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return words[text.lower()]


def _tokens_argument(text: str) -> int:
    try:
        return parse_tokens(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 150M, 1.1B or 20000") from None


class _Parser(argparse.ArgumentParser):
    """argparse that reports an error as one line instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _parser_for(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """argparse keywords for one dataclass field."""
    annotation = str(field.type)
    metadata = field.metadata
    if metadata.get("const"):
        return {"nargs": "?", "const": metadata["const"]}
    if annotation.startswith("bool"):
        return {"nargs": "?", "const": True, "type": _parse_bool, "metavar": "true|false"}
    if metadata.get("type") == "tokens":
        return {"type": _tokens_argument, "metavar": "TOKENS"}
    for name, kind in (("int", int), ("float", float)):
        if annotation.startswith(name):
            return {"type": kind, "metavar": name.upper()}
    return {"metavar": "NAME" if metadata.get("choices") else "TEXT"}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, grouped by topic; defaults stay None here, which tells what was given from what was not."""
    parser = _Parser(
        prog="torchrun_main.py",
        description="Pretrain a LLaMA from a JSON config, its linears full-rank, low-rank, or sparse plus low-rank (SLTrain).",
        epilog="Every flag can also stand in a YAML or JSON file (--config FILE). Start: bash scripts/quickstart.sh",
        allow_abbrev=False,
    )
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags, grouped by topic, their defaults None."""
    for group_class in GROUPS:
        group = parser.add_argument_group(str(group_class.__doc__))
        for field in dataclasses.fields(group_class):
            shown = field.default not in (None, False, "") and not field.metadata.get("required")
            default = f" (default: {field.default})" if shown else ""
            note = " (required)" if field.metadata.get("required") else default
            text = (field.metadata["help"] + note).replace("%", "%%")
            group.add_argument(f"--{field.name}", default=None, help=text, **_parser_for(field))


def _read_config_file(path: str) -> dict[str, Any]:
    """Values of a --config file, checked for unknown names. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--config {path}: cannot be read ({error})"]) from None
    try:
        if path.endswith((".yaml", ".yml")):
            import yaml

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except ValueError as error:
        raise ConfigError([f"--config {path}: not valid JSON ({error})"]) from None
    except Exception as error:  # yaml.YAMLError, named without importing yaml above
        raise ConfigError([f"--config {path}: not valid YAML ({' '.join(str(error).split())})"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"--config {path}: must hold names and values, not a {type(values).__name__}"])
    return values


def _file_to_argv(path: str, values: dict[str, Any]) -> list[str]:
    """A config file's values as the command line that says the same, so that both are parsed by one rule."""
    names = {field.name for field in dataclasses.fields(Arguments)} - {"given", "config"}
    bare = {field.name for field in dataclasses.fields(Arguments) if field.metadata.get("const")}
    problems, argv = [], []
    for key, value in values.items():
        if key not in names:
            problems.append(f"--config {path}: unknown name {key!r}{_suggestion(str(key), names)}")
        elif isinstance(value, (dict, list)):
            problems.append(f"--config {path}: {key} must be a single value, not {value!r}")
        elif isinstance(value, bool) and key in bare:
            argv += [f"--{key}"] if value else []
        elif value is not None:
            argv.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    if problems:
        raise ConfigError(problems)
    return argv


def _suggestion(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def parse_args(argv: Sequence[str]) -> Arguments:
    """Arguments from a command line, with values normalised and every problem of a single value reported.

    Raises:
        ConfigError: an unknown flag, a value of the wrong kind or out of range, a name that is none of the choices.
    """
    parsed, unknown = build_parser().parse_known_args(list(argv))
    given = with_config_file(given_flags(parsed))
    flags = {f"--{field.name}" for field in dataclasses.fields(Arguments)}
    if unknown:
        first = unknown[0].split("=")[0]
        raise ConfigError([f"unknown argument {' '.join(unknown)}{_suggestion(first, flags)}; --help lists every flag"])
    return arguments_from(given)


def given_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was said of `add_flags`' flags, by name."""
    names = {field.name for field in dataclasses.fields(Arguments)}
    return {name: value for name, value in vars(parsed).items() if name in names and value is not None}


def with_config_file(given: dict[str, Any]) -> dict[str, Any]:
    """What was said, over what the --config file that it may name says. Raises ConfigError."""
    if "config" not in given:
        return given
    said = _file_to_argv(given["config"], _read_config_file(given["config"]))
    return {**given_flags(build_parser().parse_args(said)), **given}


def arguments_from(given: dict[str, Any]) -> Arguments:
    """Arguments from what was said, by name. Raises ConfigError."""
    problems = [
        f"--{field.name} is required: {field.metadata['help']}"
        for field in dataclasses.fields(Arguments)
        if field.metadata.get("required") and field.name not in given
    ]
    values, more = _without_galore_names(given)
    values = _without_per_layer_names(values)
    problems += more + _normalise_choices(values)
    if problems:
        raise ConfigError(problems)
    args = Arguments(**values, given=frozenset(given))
    problems = value_problems(args)
    if problems:
        raise ConfigError(problems)
    if args.grad_clipping == 0:
        args.grad_clipping = None
    return args


# Published optimizer names of GaLore, and the optimizer in the subspace.
GALORE_NAMES = {
    "galore_adamw": "adamw",
    "galore_adafactor": "adafactor",
    "galore_adamw8bit": "adam8bit",
    "galore_adamw8bit_per_layer": "adam8bit_per_layer",
}


def embedding_bits(args: Arguments) -> int | None:
    """Bits of the moments of embedding and output head where they are chosen apart from the others'."""
    if args.optimizer not in LOW_BIT:
        return None
    return 8 if args.embedding_states == "8bit" else 32


def _without_galore_names(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values with a published name such as galore_adamw as adamw and --peft_model galore; a problem where another was given."""
    name = str(given.get("optimizer", "")).lower()
    if name not in GALORE_NAMES:
        return dict(given), []
    inside = GALORE_NAMES[name]
    method = given.get("peft_model", "galore")
    values = {**given, "optimizer": inside, "peft_model": method}
    if str(method).lower() == "galore":
        return values, []
    return values, [
        f"--optimizer {given['optimizer']} with --peft_model {method}: it steps dense weights in a subspace, which is "
        f"--peft_model galore; leave --peft_model out, or use --optimizer {inside}"
    ]


def _without_per_layer_names(given: dict[str, Any]) -> dict[str, Any]:
    """Values with a published name such as adam8bit_per_layer as adam8bit and --per_layer.

    Published scripts pass --grad_clipping to these, where it had no effect; it has none here either, with a notice.
    """
    name = str(given.get("optimizer", "")).lower()
    if not name.endswith("_per_layer"):
        return dict(given)
    values = {**given, "optimizer": name.removesuffix("_per_layer")}
    if "per_layer" not in given:
        values |= {"per_layer": True, "grad_clipping": None}
    return values


def _normalise_choices(given: dict[str, Any]) -> list[str]:
    """Lower-case the names that are chosen from a list, in place; problems for those that are none of them."""
    problems = []
    for field in dataclasses.fields(Arguments):
        choices = field.metadata.get("choices")
        if choices is None or field.name not in given:
            continue
        value = str(given[field.name]).lower()
        if value in choices:
            given[field.name] = choices[value] if isinstance(choices, dict) else value
        else:
            hint = _suggestion(value, set(choices))
            problems.append(f"--{field.name} {given[field.name]}: must be one of {', '.join(choices)}{hint}")
    return problems


def arguments_of_record(values: dict[str, Any]) -> Arguments:
    """Arguments from a run.json, of which names that this version does not know are left out.

    Raises:
        ValueError: a value is not of its argument's type.
    """
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    fields = {field.name: str(field.type) for field in dataclasses.fields(Arguments) if field.name != "given"}
    # Where an earlier version left a value open that has a default now, it ran as that does.
    known = {
        name: value
        for name, value in values.items()
        if name in fields and (value is not None or "None" in fields[name])
    }
    for name, value in known.items():
        if not any(isinstance(value, kinds[kind]) for kind in fields[name].split(" | ")):
            raise ValueError(f"{name} {value!r} is no {fields[name]}")
    return Arguments(**known)


def value_problems(args: Arguments) -> list[str]:
    """Problems of single values and of pairs that need neither the model nor the number of processes."""
    problems = _range_problems(args)
    if args.peft_model == "sltrain" and not 0 < args.sp_ratio < 1:
        problems.append(
            f"--sp_ratio {args.sp_ratio}: must lie strictly between 0 and 1 (e.g. 0.03); "
            "for no sparse part use --peft_model lowrank"
        )
    elif args.peft_model == "sltrain" and args.support == "block":
        problems += _block_problems(args.sp_ratio)
    if not 0 <= args.beta1 < 1:
        problems.append(f"--beta1 {args.beta1}: must be at least 0 and below 1")
    if not 0 <= args.min_lr_ratio <= 1:
        problems.append(f"--min_lr_ratio {args.min_lr_ratio}: must lie between 0 and 1")
    if not Path(args.model_config).is_file():
        problems.append(
            f"--model_config {args.model_config}: no such file (configs/ holds llama_9m.json to llama_13b.json)"
        )
    if args.single_gpu and "parallel" in args.given:
        problems.append(
            f"--single_gpu with --parallel {args.parallel}: one process has nothing to share; drop one of the two"
        )
    if args.per_layer and args.grad_clipping:
        problems.append(
            f"--grad_clipping {args.grad_clipping} with --per_layer: the global norm is not known before the first parameter is "
            "stepped; use --grad_norm_growth 1.01, which limits each tensor's norm, or drop one of the two"
        )
    problems += _parallel_problems(args)
    problems += _relora_problems(args) + _restart_problems(args)
    if args.stochastic_rounding and args.optimizer not in ("adam", "adamw", *LOW_BIT):
        problems.append(
            f"--stochastic_rounding with --optimizer {args.optimizer}: works with adam, adamw, adam8bit and adamw4bit"
        )
    if args.grad_norm_growth is not None and not 1 <= args.grad_norm_growth < math.inf:
        problems.append(f"--grad_norm_growth {args.grad_norm_growth}: must be at least 1 and finite, e.g. 1.01")
    problems += _allow_changes_problems(args)
    if args.continue_from is not None and not Path(args.continue_from).is_dir():
        problems.append(f"--continue_from {args.continue_from}: no such folder")
    device, _, index = args.device.partition(":")
    if device not in ("auto", "cpu", "cuda") or (index and not (device == "cuda" and index.isdigit())):
        problems.append(f"--device {args.device}: must be auto, cpu, cuda or cuda:N")
    return problems


def _parallel_problems(args: Arguments) -> list[str]:
    problems = []
    if args.parallel == "fsdp" and args.peft_model == "galore":
        problems.append(
            "--parallel fsdp with --peft_model galore: the projection is the SVD of a weight's whole gradient, of which a "
            "process has a part; use --parallel ddp, with --per_layer and adam8bit where memory is short, or --peft_model sltrain"
        )
    if args.parallel == "fsdp" and args.optimizer == "adafactor":
        problems.append(
            "--parallel fsdp with --optimizer adafactor: its second moments are means over whole rows and columns, of which a "
            "process has a part; use adam8bit or adamw4bit, whose moments are as small, or --parallel ddp"
        )
    if args.compute_dtype is not None and args.parallel != "fsdp":
        problems.append(
            f"--compute_dtype {args.compute_dtype} with --parallel {args.parallel}: parameters are cast as they are gathered; "
            "use --parallel fsdp, or --dtype bfloat16"
        )
    return problems


def restart_interval(args: Arguments) -> int | None:
    """Update steps from one restart to the next: ReLoRA's merges, or those of a method with factors; None without."""
    if args.peft_model == "relora":
        return args.relora
    return args.restart_every if args.peft_model in RESTARTED else None


def moments_at_a_merge(args: Arguments) -> tuple[str, float]:
    """What ReLoRA does with the moments of its factors: ("zero" | "random" | "magnitude" | "keep", share of them)."""
    if args.optimizer_random_pruning is not None:
        return "random", args.optimizer_random_pruning
    if args.optimizer_magnitude_pruning is not None:
        return "magnitude", args.optimizer_magnitude_pruning
    return ("keep", 0.0) if args.reset_optimizer_on_relora is False else ("zero", 1.0)


def _relora_problems(args: Arguments) -> list[str]:
    if args.peft_model != "relora":
        return []
    problems = []
    if args.relora is None:
        problems.append(
            "--peft_model relora needs --relora N (update steps between merges), e.g. --relora 1000; without merges it "
            "would train one low-rank change of random weights"
        )
    prunings = {
        name: getattr(args, name)
        for name in ("optimizer_random_pruning", "optimizer_magnitude_pruning")
        if getattr(args, name) is not None
    }
    for name, share in prunings.items():
        if not 0 < share <= 1:
            problems.append(f"--{name} {share}: must be a share above 0 and at most 1, e.g. 0.9")
        if args.optimizer not in ("adam", "adamw", "sgd"):
            problems.append(
                f"--{name} {share} with --optimizer {args.optimizer}: its moments are quantised or factored, and not pruned one "
                "by one; use --reset_optimizer_on_relora true, or --optimizer adamw"
            )
        if args.reset_optimizer_on_relora:
            problems.append(
                f"--{name} {share} with --reset_optimizer_on_relora true: nothing is left to prune; drop one of the two"
            )
    if len(prunings) == 2:
        problems.append(
            "--optimizer_random_pruning with --optimizer_magnitude_pruning: moments are pruned in one way; drop one of the two"
        )
    if args.max_train_tokens is not None and args.scheduler == "cosine_restarts":
        problems.append(
            f"--max_train_tokens {args.max_train_tokens} with --relora and --scheduler cosine_restarts: the schedule would "
            "restart by tokens and the factors by updates; use --num_training_steps"
        )
    if args.warmed_up_model is not None and not Path(args.warmed_up_model).is_dir():
        problems.append(f"--warmed_up_model {args.warmed_up_model}: no such folder")
    if args.warmed_up_model is not None and args.continue_from is not None:
        problems.append(
            f"--warmed_up_model {args.warmed_up_model} with --continue_from {args.continue_from}: a run begins from one of them; "
            "drop one of the two"
        )
    return problems


def _restart_problems(args: Arguments) -> list[str]:
    problems = []
    if args.restart_every is not None and args.peft_model == "relora":
        problems.append(
            f"--restart_every {args.restart_every} with --peft_model relora: it restarts at its merges; use --relora N"
        )
    if args.restart_every is not None and args.peft_model in RESTARTED and args.scheduler == "cosine_restarts":
        problems.append(
            f"--restart_every {args.restart_every} with --scheduler cosine_restarts: that schedule has restarts of its own, at "
            "other updates; use --scheduler cosine or linear"
        )
    if args.rebalance and args.peft_model in RESTARTED and args.restart_every is None:
        problems.append(
            "--rebalance needs --restart_every N: factors are replaced at restarts, e.g. --restart_every 200"
        )
    interval, warmup = restart_interval(args), args.restart_warmup_steps
    if interval and warmup is not None and args.scheduler != "cosine_restarts" and warmup >= interval:
        name = "relora" if args.peft_model == "relora" else "restart_every"
        problems.append(
            f"--restart_warmup_steps {warmup}: must be below --{name} {interval}, or the rate never comes back to the schedule's"
        )
    return problems


def _block_problems(sp_ratio: float) -> list[str]:
    """Blocks have a share 1 / k of a weight's entries; it must be near what was asked for (sparse_lora.block.block_count)."""
    blocks = block_count(sp_ratio)
    if abs(1 / blocks - sp_ratio) <= 0.05 * sp_ratio:
        return []
    below, above = 1 / (int(1 / sp_ratio) + 1), 1 / int(1 / sp_ratio)
    return [
        f"--sp_ratio {sp_ratio} with --support block: k blocks have a share 1/k of a weight's entries, the nearest are "
        f"{below:.4g} and {above:.4g}; choose one of them, or --support uniform"
    ]


def _range_problems(args: Arguments) -> list[str]:
    at_least_one = (
        "rank",
        "update_proj_gap",
        "max_length",
        "batch_size",
        "num_training_steps",
        "save_every",
        "eval_every",
        "log_every",
    )
    optional_at_least_one = (
        "gradient_accumulation",
        "total_batch_size",
        "max_train_tokens",
        "eval_tokens",
        "data_lanes",
        "cycle_length",
        "keep_checkpoints",
        "restart_every",
        "relora",
    )
    not_negative = (
        "warmup_steps",
        "weight_decay",
        "grad_clipping",
        "workers",
        "seed",
        "restart_warmup_steps",
        "adjust_step",
    )
    problems = []
    for name in (
        at_least_one
        + optional_at_least_one
        + not_negative
        + ("lr", "lora_alpha", "galore_scale", "sp_ratio", "min_lr_ratio", "beta1")
    ):
        value = getattr(args, name)
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name} {value}: must be a finite number")
        elif name in at_least_one + optional_at_least_one and value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
        elif name in not_negative and value < 0:
            problems.append(f"--{name} {value}: must not be negative")
        elif name in ("lr", "lora_alpha", "galore_scale") and value <= 0:
            problems.append(f"--{name} {value}: must be above 0")
    if args.seed >= 2**63:
        problems.append(f"--seed {args.seed}: must be below 2^63")
    if args.max_length == 1:
        problems.append("--max_length 1: a sequence of one token has nothing to predict; use at least 2")
    return problems


# Flags that several methods read and this one does not; those of a single method say so in their own metadata.
_RESTARTS = ("init", "restart_every", "rebalance")
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "full": ("rank", "sp_ratio", "lora_alpha", "train_scaling", "support", "linear_path", *_RESTARTS),
    "galore": ("sp_ratio", "lora_alpha", "train_scaling", "support", "linear_path", *_RESTARTS),
    "lowrank": ("sp_ratio", "support"),
    "relora": ("sp_ratio", "support", "linear_path", "init", "rebalance"),
    "sltrain": (),
}


def _method_notices(args: Arguments) -> list[str]:
    lines = []
    for field in dataclasses.fields(MethodArguments):
        method = field.metadata.get("method")
        if method not in (None, args.peft_model) and field.name in args.given:
            lines.append(f"--{field.name} has no effect with --peft_model {args.peft_model}: it belongs to {method}")
    lines += [
        f"--{name} has no effect with --peft_model {args.peft_model}"
        for name in WITHOUT_EFFECT[args.peft_model]
        if name in args.given
    ]
    if args.train_scaling and args.peft_model in ("lowrank", "relora", "sltrain") and "lora_alpha" in args.given:
        lines.append("--lora_alpha has no effect with --train_scaling: the trained scale tanh(c) replaces alpha / rank")
    return lines + _no_moments_notices(args)


def _no_moments_notices(args: Arguments) -> list[str]:
    """Flags that say what becomes of moments at a restart, with an optimizer that keeps none."""
    if args.optimizer != "sgd" or args.beta1:
        return []
    names = []
    if args.peft_model == "relora":
        names = ["reset_optimizer_on_relora", "optimizer_random_pruning", "optimizer_magnitude_pruning"]
    elif args.peft_model in RESTARTED and not (args.rebalance or args.restart_warmup_steps or args.grad_norm_growth):
        names = ["restart_every"]
    return [
        f"--{name} has no effect with --optimizer sgd without --beta1: it keeps no moments"
        for name in names
        if name in args.given
    ]


def notices(args: Arguments) -> list[str]:
    """One line for each flag that was given and has no effect in this run."""
    lines = _method_notices(args)
    if args.use_hf_model:
        lines.append("--use_hf_model has no effect: the model always is transformers' LLaMA")
    if args.lora_dropout:
        lines.append(f"--lora_dropout {args.lora_dropout} has no effect: the published layer never applied it")
    if args.document_mask and not args.packing:
        lines.append("--document_mask has no effect without --packing: a sequence holds one document")
    if "beta1" in args.given and args.optimizer not in ("sgd", "adafactor"):
        lines.append(f"--beta1 {args.beta1} has no effect with --optimizer {args.optimizer}: the Adam family keeps 0.9")
    if (
        args.per_layer
        and "grad_clipping" in args.given
        and args.grad_clipping is None
        and "per_layer" not in args.given
    ):
        lines.append(
            "--grad_clipping has no effect with an optimizer named *_per_layer, as published; --grad_norm_growth 1.01 limits "
            "each tensor's gradient"
        )
    if args.embedding_states is not None and args.optimizer not in LOW_BIT:
        lines.append(
            f"--embedding_states has no effect with --optimizer {args.optimizer}: its moments are not quantised"
        )
    if args.stochastic_rounding and args.dtype == "float32":
        lines.append("--stochastic_rounding has no effect with --dtype float32: nothing is rounded")
    if args.compute_dtype is not None and args.dtype == args.compute_dtype:
        lines.append(f"--compute_dtype has no effect with --dtype {args.dtype}: that is what parameters have")
    if "reshard_after_forward" in args.given and args.parallel != "fsdp":
        lines.append(
            f"--reshard_after_forward has no effect with --parallel {args.parallel}: every process holds all layers"
        )
    if args.wandb == "disabled":
        lines += [f"--{name} has no effect with --wandb disabled" for name in ("name", "tags") if name in args.given]
    restarts = args.scheduler == "cosine_restarts" or restart_interval(args) is not None
    cycles = ("cycle_length", "min_lr_ratio") if args.scheduler == "linear" else ()
    lines += [
        f"--{name} has no effect with --scheduler {args.scheduler}"
        for name in (*(() if restarts else ("restart_warmup_steps",)), *cycles)
        if name in args.given
    ]
    if args.max_train_tokens is not None and "num_training_steps" in args.given:
        lines.append(
            f"--max_train_tokens {args.max_train_tokens} replaces --num_training_steps {args.num_training_steps}"
        )
    return lines


def default_save_dir(args: Arguments, total_batch_size: int) -> Path:
    """checkpoints/<config>-<method>-<8 hex digits of the run-defining arguments>, the same for any number of processes."""
    defining = {name: getattr(args, name) for name in RUN_DEFINING} | {"total_batch_size": total_batch_size}
    digest = hashlib.blake2b(json.dumps(defining, sort_keys=True).encode(), digest_size=4).hexdigest()
    return Path("checkpoints") / f"{Path(args.model_config).stem}-{args.peft_model}-{digest}"


def as_dict(args: Arguments) -> dict[str, Any]:
    """Every argument by name, JSON-able, for run.json and the dashboard."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name != "given"}
