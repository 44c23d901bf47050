"""Text to micro-batches: source -> lanes -> tokenizer -> packing -> loader, every stage resumable.

Nothing is imported here, so that `peft_pretraining.data.source` stays as light as a dry run needs it.
"""
