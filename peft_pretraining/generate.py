"""`python -m peft_pretraining generate`: text from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "continue a prompt with a checkpoint's model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="step_XXXXXXXX folder, or a run's folder")
    parser.add_argument("--prompt", default="The ", help="text to continue (default: %(default)r)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="sample among the k likeliest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation. Raises ValueError for values that cannot work."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    if args.temperature < 0 or args.top_k < 1:
        raise ValueError(f"--temperature {args.temperature} --top_k {args.top_k}: must be at least 0 and at least 1")
    import torch

    from peft_pretraining.build import load_model
    from peft_pretraining.distributed import World, pick_device

    device = pick_device(args.device, World())
    model, tokenizer, _ = load_model(args.checkpoint, device)
    prompt_ids = tokenizer.encode_batch([args.prompt])[0]
    room = model.config.max_position_embeddings - args.max_new_tokens
    if not 1 <= len(prompt_ids) <= room:
        raise ValueError(
            f"--prompt has {len(prompt_ids)} tokens: must be 1 to {room}, so that prompt and continuation fit the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    ids = torch.tensor([prompt_ids], device=device)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            use_cache=True,
            **(sampling if args.temperature > 0 else {"do_sample": False}),
        )
    text = tokenizer.decode(output[0].tolist())
    # A model may write what a terminal would obey.
    print("".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text))
    return 0
