"""Uploads an export to a repository on the Hugging Face hub, with the hub's own library, which alone uses the token."""

from __future__ import annotations

import shlex
from pathlib import Path

from peft_pretraining.data import first_line
from peft_pretraining.data.tokenizer import hub_problem
from peft_pretraining.export.shards import ExportError


def check_push(name: str) -> None:
    """Raises ExportError if an upload to the repository `name` cannot work, as far as this is known without a network."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ExportError(
            f"--push {name}: is no name of a repository on the hub ({first_line(error)}); use OWNER/MODEL"
        ) from None
    if "/" not in name:
        raise ExportError(f"--push {name}: names no owner; use OWNER/{name}, with your account or organisation as OWNER")
    if constants.HF_HUB_OFFLINE:
        raise ExportError(f"--push {name}: HF_HUB_OFFLINE forbids every upload; unset it, or leave --push out")
    if get_token() is None:
        raise ExportError(
            f"--push {name}: this machine has no token for the hub; run `hf auth login`, or set HF_TOKEN, with a token that may "
            "write, or leave --push out"
        )


def push(folder: Path, name: str, *, public: bool) -> str:
    """Uploads a finished export to the repository `name`, made if it does not exist; returns the address of its page.

    public: make a new repository public, and upload to one that is public. An existing repository keeps its visibility.

    Raises ExportError: the hub cannot be reached or refuses, or the repository is public and `public` is false.
    """
    from huggingface_hub import HfApi

    later = shlex.join(["hf", "upload", name, str(folder), ".", "--no-private" if public else "--private"])
    complete = f"the export in {folder} is complete; upload it later with: {later}"
    if (problem := hub_problem()) is not None:
        raise ExportError(f"--push {name}: the hub cannot be reached ({_without_token(problem)}); {complete}")
    api = HfApi()
    try:
        page = str(api.create_repo(name, private=not public, exist_ok=True))
        exposed = not public and not api.model_info(name).private
        if not exposed:
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an exported model")
    except Exception as error:
        # The HTTP library's exceptions too; it has changed between versions of huggingface_hub.
        reason = _without_token(getattr(error, "server_message", None) or first_line(error))
        raise ExportError(f"--push {name}: the upload failed ({reason}); {complete}") from None
    if exposed:
        raise ExportError(
            f"--push {name}: exists and is public, so everyone could read the model; the export in {folder} is complete. Make "
            f"the repository private, name another, or publish it with: {shlex.join(['hf', 'upload', name, str(folder), '.'])}"
        )
    return page


def _without_token(text: str) -> str:
    """Returns a message without the token, should a server have repeated it."""
    from huggingface_hub import get_token

    return text.replace(get_token() or "\0", "[token]")
