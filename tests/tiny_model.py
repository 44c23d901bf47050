"""The model that tests train, as the content of a config's JSON file."""

TINY_MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 320, "max_sequence_length": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1,
}  # fmt: skip
