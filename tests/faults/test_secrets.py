"""The user's keys never appear in a run's files or output, which people publish."""

import forked

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_SecretSecretSecretSecretSecretSecr",
}


def test_a_runs_folder_and_output_contain_no_secret(tmp_path, tiny_run):
    flags = [*tiny_run, "--num_training_steps", "2", "--warmup_steps", "1", "--batch_size", "2", "--max_length", "32"]
    flags += ["--device", "cpu", "--workers", "0", "--wandb", "offline", "--save_dir", str(tmp_path / "run")]
    code, output = forked.run(flags, tmp_path / "log", environment={**SECRETS, "WANDB_MODE": "offline", "HOME": str(tmp_path)})
    assert code == 0, output
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run.json", "metrics.jsonl", "manifest.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for name, secret in SECRETS.items():
        assert [path for path in [*files, tmp_path / "log"] if secret.encode() in path.read_bytes()] == [], name
