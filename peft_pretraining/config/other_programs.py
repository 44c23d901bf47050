"""What flags of other programs are here: of ReLoRA's, GaLore's and SLTrain's published programs and of Hugging Face's Trainer.

A flag that only has another name here is a synonym of its row (`flag.Row`); this table has those that differ in more, and is
read first. It is imported only for a flag that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft_pretraining.config.flag import Row, suggested_flag

_RELORA = {
    "use_peft": "here --peft_model relora --relora N (or another --peft_model); without it training is full-rank",
    "training_config": "here --config FILE, a YAML or JSON file of this program's flags",
    "dataset_path": "here --dataset: a folder of text files, or one that `python -m peft_pretraining data prepare` tokenised; a "
    "folder that another program tokenised is not read",
    "megatron_dataset_config": "here --dataset with text, or with what `python -m peft_pretraining data prepare` made of it; "
    "Megatron's files are not read",
    "autoresume": "leave it out, as the same command resumes from the newest checkpoint in --save_dir",
    "continue_from_peft": "here --continue_from",
    "restore_optimizer": "leave it out, as a checkpoint's optimizer state is always restored",
    "load_optimizer_state_on_resume": "leave it out, as a checkpoint's optimizer state is always restored",
    "force_keep_original": "leave it out, as --peft_model relora always keeps the dense weights",
    "train_ln": "leave it out, as norms are always trained",
    "adam_beta1": "leave it out, as the Adam family keeps 0.9 (--beta1 is the momentum of sgd and adafactor)",
    "quantize": "here --weight_dtype int8 for weights; --optimizer adam8bit or adamw4bit for moments",
    "use_double_quant": "not here: scales of --weight_dtype int8 are not quantised; leave it out",
    "distributed_type": "here --parallel ddp | fsdp",
    "svd_optimizer_on_relora": "not here: --optimizer_magnitude_pruning or --optimizer_random_pruning prune moments at merges",
    "keep_first_opt_rows": "not here: --optimizer_magnitude_pruning or --optimizer_random_pruning prune moments at merges",
    "skip_batches": "not here; a non-finite update is skipped by itself (--on_nonfinite)",
    "comment": "here --tags or --name",
    "wandb_watch": "not here; metrics.jsonl has norms and memory of every update",
    "wandb_project": "here the environment variable WANDB_PROJECT",
}
_GALORE = {
    "enable_galore": "here --peft_model galore, or --optimizer galore_adamw",
    "lora_all_modules": "leave it out, as all linears of attention and MLP are trained by the method",
    "target_modules": "leave it out, as all linears of attention and MLP are trained by the method",
    "lora_target_modules": "leave it out, as all linears of attention and MLP are trained by the method",
    "optim_target_modules": "here --peft_model galore, for all linears of attention and MLP",
    "optim_args": "here --rank, --update_proj_gap, --galore_scale and --proj_type",
}
_EVERY = "here a number of updates: --eval_every, --save_every, --log_every"
_TRAINER = {
    "per_device_eval_batch_size": "leave it out, as evaluation has --batch_size too",
    "eval_batch_size": "leave it out, as evaluation has --batch_size too",
    "do_train": "leave it out, as a run trains, and evaluates with --eval_every",
    "do_eval": "leave it out, as a run evaluates with --eval_every and at its end",
    "overwrite_output_dir": "leave it out, as a run resumes; --resume never starts anew in a numbered folder",
    "num_train_epochs": "here --num_training_steps (updates) or --max_train_tokens",
    "num_epochs": "here --num_training_steps (updates) or --max_train_tokens",
    "epochs": "here --num_training_steps (updates) or --max_train_tokens",
    "warmup_ratio": "here a number of updates, not a share of the run (did you mean --warmup_steps?)",
    "min_lr": "here a share of the peak rate, not a rate (did you mean --min_lr_ratio?)",
    "bf16": "here --dtype bfloat16",
    "fp16": "not here; use --dtype bfloat16, which needs no loss scaling",
    "mixed_precision": "here --dtype bfloat16, or --parallel fsdp --compute_dtype bfloat16 for float32 parameters",
    "eval_strategy": _EVERY,
    "evaluation_strategy": _EVERY,
    "save_strategy": _EVERY,
    "logging_strategy": _EVERY,
    "logging_dir": "leave it out, as metrics.jsonl is in --save_dir",
    "report_to": "here --wandb online | offline | disabled, or --tracker trackio",
    "deepspeed": "not here; --parallel fsdp shards parameters, gradients and moments",
    "fsdp": "here --parallel fsdp",
    "ddp": "leave it out, as it is the default (--parallel ddp)",
    "load_best_model_at_end": "not here; --keep_checkpoints N keeps the newest checkpoints",
    "push_to_hub": "here a step after training: python -m peft_pretraining export --push OWNER/MODEL",
    "streaming": "leave it out, as c4 and hub:NAME are always streamed",
    "dataset_config_name": "here a part of the name: --dataset hub:OWNER/NAME/FOLDER",
    "preprocessing_num_workers": "here --workers",
    "validation_split_percentage": "leave it out, as 1 document in 100 is held out; --eval_dataset names other data",
    "trust_remote_code": "leave it out, as no remote code is run",
    "cache_dir": "here the environment variable HF_HOME",
    "hf_token": "here the environment variable HF_TOKEN",
    "token": "here the environment variable HF_TOKEN",
    "use_auth_token": "here the environment variable HF_TOKEN",
    "data_seed": "here --seed",
    "adafactor": "here --optimizer adafactor",
    "attn_implementation": "leave it out, as attention is torch's scaled_dot_product_attention",
    "flash_attn": "leave it out, as attention is torch's scaled_dot_product_attention",
    "local_rank": "leave it out and start with torchrun, which says it through the environment",
    **dict.fromkeys(
        ("nproc_per_node", "nnodes", "num_processes", "num_gpus", "gpus", "devices"),
        "here an argument of torchrun: torchrun --nproc_per_node N torchrun_main.py ... (recipes: NPROC=N)",
    ),
    **dict.fromkeys(
        ("remove_unused_columns", "group_by_length", "dataloader_pin_memory", "dataloader_drop_last", "use_fast_tokenizer",
         "low_cpu_mem_usage", "ddp_find_unused_parameters", "ddp_backend", "overwrite_cache", "disable_tqdm"),
        "leave it out, as it has no counterpart",
    ),
}  # fmt: skip
MEANINGS = {**_RELORA, **_GALORE, **_TRAINER}


def hint(name: str, rows: Mapping[str, Row], prefix: str = "--") -> str:
    """What to add to a message about an unknown flag: what it is here, or the flag that is probably meant.

    prefix: of flags in the answer, "" where names of a file are meant.
    """
    name = name.lstrip("-").replace("-", "_").lower()
    if name in MEANINGS:
        return f": {MEANINGS[name]}"
    meant = suggested_flag(name, rows)
    return (f" (did you mean {prefix}{meant}?)" if meant else "") + "; --help lists every flag"
