"""`python -m peft_pretraining generate`: generates text with a checkpoint or an export."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.config.files import read_text

if TYPE_CHECKING:
    import torch

    from peft_pretraining.data.tokenizer import Tokenizer
    from peft_pretraining.export.load import Loaded

_LEAST_TEMPERATURE = 1e-6
HELP = "continue prompts with the model of a checkpoint or an export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, step_XXXXXXXX folder, or export")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", help="text to continue; several are continued in one batch (default: 'The ')")
    source.add_argument("--file", type=Path, help="file whose whole text is the prompt; - for standard input")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="sampling temperature; 0: always the most likely token (default: %(default)s)",
    )
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample among the k most likely tokens; 0: all (default: %(default)s)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample among the most likely tokens that reach this total probability (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the model (default: as stored)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints each prompt and its continuation; streams a single one. Raises ValueError for refused values."""
    check_values(args)
    prompts = read_prompts(args)
    import torch

    from peft_pretraining.distributed.device import pick_device
    from peft_pretraining.distributed.world import World
    from peft_pretraining.export.load import load_for_inference
    from sparse_lora import prepare_for_inference

    loaded = load_for_inference(args.checkpoint, pick_device(args.device, World()), args.dtype)
    prepare_for_inference(loaded.model)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{args.checkpoint}: the folder has no tokenizer, which prompts need; copy the tokenizer's files into it"
        )
    ids = encode(prompts, tokenizer, loaded.model.config.max_position_embeddings, args.max_new_tokens)
    torch.manual_seed(args.seed)
    if len(ids) == 1:
        printer = Printer(tokenizer, lambda text: print(text, end="", flush=True))
        generate(loaded, tokenizer, ids, args, printer)
        print()
        return 0
    for number, tokens in enumerate(generate(loaded, tokenizer, ids, args)):
        print(f"{'' if number == 0 else chr(10)}[{number + 1}] {printable(tokenizer.decode(tokens))}")
    return 0


def check_values(args: argparse.Namespace) -> None:
    """Raises ValueError, naming the first flag that is out of range."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    # Dividing logits by a smaller temperature may overflow.
    if args.temperature != 0 and not _LEAST_TEMPERATURE <= args.temperature < math.inf:
        raise ValueError(
            f"--temperature {args.temperature}: must be 0 (the most likely token), or a number of at least {_LEAST_TEMPERATURE}"
        )
    if args.top_k < 0:
        raise ValueError(f"--top_k {args.top_k}: must be at least 0")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if not -(2**63) <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: must fit 64 bits")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts from the arguments, a file or standard input. Raises ValueError or OSError."""
    source = "--prompt" if args.file is None else f"--file {args.file}"
    try:
        if args.file is None:
            prompts: list[str] = args.prompt or ["The "]
        else:
            prompts = [sys.stdin.read().removeprefix("\ufeff") if str(args.file) == "-" else read_text(args.file)]
        for prompt in prompts:
            # Python reads invalid bytes of arguments and standard input as surrogates.
            prompt.encode()
    except UnicodeError as error:
        raise ValueError(f"{source}: is not UTF-8 text ({error}); convert it to UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return prompts


def encode(prompts: Sequence[str], tokenizer: Tokenizer, positions: int, new: int) -> list[list[int]]:
    """Token ids of each prompt. Raises ValueError for an empty prompt, or one too long for the model's positions."""
    if new >= positions:
        raise ValueError(f"--max_new_tokens {new}: must be below the model's {positions} positions, which include the prompt")
    encoded = tokenizer.encode_batch(prompts)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 1 <= len(ids) <= positions - new:
            shown = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
            raise ValueError(
                f"prompt {shown!r} has {len(ids)} tokens: must be 1 to {positions - new}, so that prompt and continuation fit "
                f"the model's {positions} positions"
            )
    return encoded


def generate(
    loaded: Loaded, tokenizer: Tokenizer, prompts: Sequence[list[int]], args: argparse.Namespace, streamer: Any = None
) -> list[list[int]]:
    """Token ids of each prompt and its continuation, up to the end token. Prompts are left-padded to equal length."""
    import torch

    longest, device = max(map(len, prompts)), next(loaded.model.parameters()).device
    ids = torch.tensor([[tokenizer.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    with torch.inference_mode():
        output = loaded.model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            use_cache=True,
            streamer=streamer,
            **(sampling if args.temperature > 0 else {"do_sample": False}),
        )
    rows: list[list[int]] = output.tolist()  # type: ignore[union-attr]
    return [row[longest - len(prompt) :] for prompt, row in zip(prompts, rows, strict=True)]


class Printer:
    """Streams text: transformers calls `put` with the prompt's ids and then each token; writes complete characters."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]):
        """write: called with each piece of text."""
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._written = 0

    def put(self, ids: torch.Tensor) -> None:
        """Takes token ids of one sequence, in any shape."""
        self._ids += ids.flatten().tolist()
        text = self._tokenizer.decode(self._ids)
        # A character of several tokens decodes to a replacement character until its last token arrives.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._flush(text)

    def end(self) -> None:
        """Writes the remaining text."""
        self._flush(self._tokenizer.decode(self._ids))

    def _flush(self, text: str) -> None:
        self._write(printable(text[self._written :]))
        self._written = len(text)


def printable(text: str) -> str:
    """The text with control characters escaped, which a terminal would otherwise execute."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
