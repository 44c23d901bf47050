"""Recomputes a checkpoint's manifest after a test changed its files, so that the checksums agree."""

from pathlib import Path

from peft_pretraining.checkpoint.manifest import MANIFEST, digest_of, render


def reseal(checkpoint: Path) -> None:
    """Writes the manifest of the files that are in the folder now."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    digests = {path.relative_to(checkpoint).as_posix(): digest_of(path.read_bytes()) for path in files}
    (checkpoint / MANIFEST).write_bytes(render(digests))
