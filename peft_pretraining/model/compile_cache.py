"""Where torch.compile keeps what it has made, so that the next start of a run takes it up instead of making it again."""

import hashlib
import os
from pathlib import Path

import sparse_lora
from peft_pretraining.config.arguments import ConfigError
from peft_pretraining.data.demo import default_cache_dir

FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code() -> str | None:
    """Give torch.compile a lasting folder: $TORCHINDUCTOR_CACHE_DIR, or one beside the demo corpus; before anything is compiled.

    torch's own default lies in the machine's folder for temporary files, and is gone with the container or the job.

    Returns:
        what is wrong where nothing can be kept.

    Raises:
        ConfigError: the folder that the variable names cannot be written.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    folder = Path(chosen) if chosen else default_cache_dir() / f"compiled-{_layer_version()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        if chosen:
            raise ConfigError([f"{FOLDER_VARIABLE}={chosen}: cannot be written ({error.strerror})"]) from None
        return (
            f"compiled code is not kept for the next start: {folder} cannot be written ({error.strerror}); "
            f"set {FOLDER_VARIABLE} to a folder that can"
        )
    os.environ[FOLDER_VARIABLE] = str(folder)
    return None


def _layer_version() -> str:
    """Digest of the layer's sources: compiled code names its operators, and torch does not look into what they do."""
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(Path(sparse_lora.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
