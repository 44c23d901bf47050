"""A manifest has a checksum for every file of a checkpoint: any damage to a file or the manifest is detected and named."""

import json
import os

import pytest

from peft_pretraining.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    digest_of,
    read_manifest,
    render,
    stays_inside,
    verify,
)

FILES = {"state.json": b'{"a": 1}', "tensors/__0_0.distcp": bytes(range(256)) * 40, "tokenizer/empty.txt": b""}


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "step_00000001"
    for name, content in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)
    (top / MANIFEST).write_bytes(render({name: digest_of(content) for name, content in FILES.items()}))
    return top


def test_written_files_pass_verification(folder):
    verify(folder)
    assert read_manifest(folder) == {name: digest_of(content) for name, content in FILES.items()}


def test_any_changed_bit_of_the_manifest_is_detected(folder):
    whole = (folder / MANIFEST).read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            (folder / MANIFEST).write_bytes(changed)
            with pytest.raises(DamagedError, match="manifest"):
                read_manifest(folder)


@pytest.mark.parametrize("length", [0, 1, -1, -2])
def test_a_truncated_manifest_is_detected(folder, length):
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedError, match="was changed after it was written"):
        verify(folder)


def test_a_git_lfs_pointer_is_named_as_such(folder):
    size = len(FILES["tensors/__0_0.distcp"])
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n"
    (folder / "tensors" / "__0_0.distcp").write_text(pointer)
    with pytest.raises(DamagedError, match=rf"^tensors/__0_0.distcp is a git-lfs pointer, not the file of {size:,} bytes"):
        verify(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..", "", "c:\\x", "a\\..\\b", "a\0b"])
def test_names_that_lead_outside_are_refused(folder, name):
    assert not stays_inside(name)
    (folder / MANIFEST).write_bytes(render({name: digest_of(b"")}))
    with pytest.raises(DamagedError, match="not a path inside"):
        verify(folder)


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "link in place of the manifest", "pipe"])
def test_links_and_special_files_are_refused(folder, tmp_path, kind):
    """A link may lead anywhere, and reading a pipe would wait for ever."""
    if kind == "link to a file":
        (tmp_path / "same").write_bytes(FILES["state.json"])
        (folder / "state.json").unlink()
        (folder / "state.json").symlink_to(tmp_path / "same")
    elif kind == "link to a folder":
        (folder / "tensors").rename(tmp_path / "elsewhere")
        (folder / "tensors").symlink_to(tmp_path / "elsewhere")
    elif kind == "link in place of the manifest":
        (folder / MANIFEST).rename(tmp_path / "elsewhere")
        (folder / MANIFEST).symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "state.json").unlink()
        os.mkfifo(folder / "state.json")
    with pytest.raises(DamagedError, match="link"):
        verify(folder)


def test_files_that_the_manifest_does_not_list_are_refused(folder):
    """An added file could be one that the tokenizer loads; files of file managers such as .DS_Store are ignored."""
    (folder / ".DS_Store").write_bytes(b"x")
    verify(folder)
    (folder / "tokenizer" / "added_tokens.json").write_bytes(b"{}")
    with pytest.raises(DamagedError, match=r"tokenizer/added_tokens.json is an unexpected file, not listed in manifest.json"):
        verify(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3, "sha256": ""}', "[" * 100_000, '{"files": {"a": null}}'])
def test_other_json_is_not_accepted_as_manifest(folder, content):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedError, match="was changed after it was written"):
        verify(folder)


def test_the_manifest_is_readable_json(folder):
    document = json.loads((folder / MANIFEST).read_text())
    assert document["files"]["state.json"]["bytes"] == len(FILES["state.json"])
