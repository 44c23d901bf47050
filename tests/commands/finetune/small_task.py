"""A task and a model small enough for a test: which of two words comes first, for an untrained encoder.

Sentences of both classes have the same words, so a classifier of a frozen encoder's word features cannot solve it.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("red", "blue")
FILLERS = tuple(f"w{number}" for number in range(20))
LENGTH = 6
HIDDEN, INNER, LAYERS = 32, 64, 2


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Returns sentences in sst2's columns; the label is 1 if "red" comes before "blue"."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        words = chance.choices(FILLERS, k=LENGTH)
        first, second = sorted(chance.sample(range(LENGTH), 2))
        label = number % 2
        words[first], words[second] = NAMES[::-1] if label == 0 else NAMES
        made.append({"sentence": " ".join(words), "label": label, "idx": number})
    return made


def write_json(path: Path, table: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return path


def write_model(folder: Path, model: Any = None) -> Path:
    """Writes a tiny RoBERTa with random weights, or another model, and a tokenizer of the task's words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    words = ["<s>", "<pad>", "</s>", "<unk>", *NAMES, *FILLERS]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(folder)
    if model is None:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
        }
        config = RobertaConfig(
            vocab_size=len(words), max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=0.0, **sizes
        )
        model = RobertaModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    return folder
