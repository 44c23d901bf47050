"""Command lines of other programs are answered with what each of their flags is here."""

import re

import pytest

import torchrun_main
from peft_pretraining.__main__ import main as command
from peft_pretraining.config.arguments import ROWS, ConfigError
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.other_programs import MEANINGS, hint
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.checks import check

# The flags of the published training programs (torchrun_main.py of ReLoRA, GaLore and SLTrain), and of run_clm.py and Trainer.
RELORA = """
    training_config model_config model_name_or_path use_hf_model warmed_up_model resume_from continue_from continue_from_peft
    restore_optimizer load_optimizer_state_on_resume dataset_path megatron_dataset_config max_length batch_size
    gradient_accumulation total_batch_size use_peft lora_r lora_alpha relora train_scaling reset_optimizer_on_relora
    optimizer_random_pruning optimizer_magnitude_pruning svd_optimizer_on_relora keep_first_opt_rows force_keep_original train_ln
    optimizer lr scheduler cycle_length restart_warmup_steps adjust_step min_lr_ratio adam_beta1 adam_beta2 weight_decay
    warmup_steps clip_grad_norm activation_checkpointing eval_every num_training_steps max_train_tokens save_every save_dir
    keep_checkpoints tags dtype workers quantize use_double_quant distributed_type profile autoresume comment wandb_watch
    skip_batches seed
"""
GALORE_AND_SLTRAIN = """
    model_config use_hf_model continue_from batch_size gradient_accumulation total_batch_size max_length optimizer lr scheduler
    min_lr_ratio activation_checkpointing weight_decay warmup_steps eval_every num_training_steps max_train_tokens save_every
    save_dir tags dtype workers seed name grad_clipping beta1 rank update_proj_gap galore_scale proj_type single_gpu peft_model
    lora_alpha lora_dropout train_scaling sp_ratio enable_galore lora_all_modules
"""
TRAINER = """
    model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer token trust_remote_code torch_dtype
    low_cpu_mem_usage dataset_name dataset_config_name train_file validation_file streaming block_size overwrite_cache
    validation_split_percentage preprocessing_num_workers output_dir overwrite_output_dir do_train do_eval eval_strategy
    evaluation_strategy per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type warmup_ratio
    warmup_steps logging_dir logging_strategy logging_steps save_strategy save_steps save_total_limit seed data_seed bf16 fp16
    tf32 local_rank dataloader_drop_last eval_steps dataloader_num_workers run_name remove_unused_columns
    load_best_model_at_end fsdp deepspeed optim optim_args optim_target_modules adafactor group_by_length report_to
    ddp_find_unused_parameters dataloader_pin_memory resume_from_checkpoint push_to_hub gradient_checkpointing torch_compile
    disable_tqdm
"""
SYNONYMS = {synonym for row in ROWS.values() for synonym in row.synonyms}


@pytest.mark.parametrize("flags", [RELORA, GALORE_AND_SLTRAIN, TRAINER], ids=["relora", "galore and sltrain", "trainer"])
def test_every_flag_of_another_program_is_known_and_not_guessed(flags):
    unknown = set(flags.split()) - ROWS.keys() - SYNONYMS - MEANINGS.keys()
    assert not unknown


def test_what_is_explained_does_not_exist_and_is_explained_by_flags_that_do():
    assert not MEANINGS.keys() & ROWS.keys()
    of_other_commands = {"nproc_per_node", "push"}  # torchrun and export
    for name, meaning in MEANINGS.items():
        assert set(re.findall(r"--(\w+)", meaning)) <= ROWS.keys() | of_other_commands, name


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("--use_peft", "--peft_model relora --relora N"),
        ("--lora_r 128", "--rank"),
        ("--dataset_path data/tokenised", "--dataset"),
        ("--training_config a.yaml", "--config FILE"),
        ("--autoresume true", "resumes from the newest checkpoint"),
        ("--learning_rate 0.001", "did you mean --lr?"),
        ("--learning-rate=0.001", "did you mean --lr?"),
        ("--per_device_train_batch_size 8", "did you mean --batch_size?"),
        ("--fp16", "--dtype bfloat16"),
        ("--local-rank=0", "torchrun"),
        ("--adam_beta2 0.95", "did you mean --beta2?"),
        ("--adam_epsilon 1e-6", "did you mean --eps?"),
        ("--embed_lr 0.1", "did you mean --embedding_lr?"),
        ("--lr_embedding 0.1", "did you mean --embedding_lr?"),
        ("--spectron_lr 0.1", "did you mean --matrix_lr?"),
        ("--adamw_lr 0.1", "did you mean --lr?"),
        ("--num_train_epochs 3", "--num_training_steps"),
        ("--warmup_ratio 0.1", "did you mean --warmup_steps?"),
    ],
)
def test_each_gets_its_own_line(typed, answer, capsys):
    line = ["--model_config", "configs/llama_60m.json", "--batch_size", "8", "--clearly_unknown", "1", *typed.split()]
    assert torchrun_main.main(line) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if typed in text]
    assert len(lines) == 1
    assert answer in lines[0]


def test_a_name_that_is_not_close_is_not_guessed():
    for name in ("clearly_unknown", "lr_find", "use_liger_kernel", "pad_token"):
        assert "did you mean" not in hint(name, ROWS)


def test_names_in_a_config_file_and_in_commands_are_explained_too(tmp_path, capsys):
    (tmp_path / "relora.yaml").write_text("use_peft: true\nlora_r: 128\nbatch_size: 8\n")
    with pytest.raises(ConfigError) as refused:
        check(parse_args(["--config", str(tmp_path / "relora.yaml"), "--model_config", "x.json"]), World())
    assert "unknown name 'use_peft': here --peft_model relora" in str(refused.value)
    assert "unknown name 'lora_r' (did you mean rank?)" in str(refused.value)
    for words in (["estimate"], ["import", "--published", "a", "--save_dir", "b"]):
        with pytest.raises(SystemExit) as ended:
            command([*words, "--model_config", "x.json", "--learning_rate", "1"])
        assert ended.value.code == 2
        assert "--learning_rate 1 (did you mean --lr?)" in capsys.readouterr().err


def test_pruning_that_relora_turns_off_by_zero_is_off():
    flags = ["--model_config", "configs/llama_60m.json", "--batch_size", "8", "--peft_model", "relora", "--relora", "10"]
    args = parse_args([*flags, "--optimizer_random_pruning", "0.0", "--optimizer_magnitude_pruning", "0"])
    assert args.optimizer_random_pruning is None
    assert args.optimizer_magnitude_pruning is None


def test_a_hint_for_a_synonym_names_the_flag_that_it_stands_for():
    """A name may be in the table although it is a synonym, because its value differs; both must lead to the same flag."""
    for name, row in ROWS.items():
        for synonym in MEANINGS.keys() & set(row.synonyms):
            assert f"--{name}" in MEANINGS[synonym], synonym
