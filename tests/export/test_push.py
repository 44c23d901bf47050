"""`export --push` uploads an export with the hub's library, here to a server on this machine that speaks the hub's protocol."""

import base64
import json
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from peft_pretraining.__main__ import main
from peft_pretraining.export import write

Trained = Callable[[str], Path]
Captured = pytest.CaptureFixture[str]
TOKEN = "hf_ofatest0123456789"


class Hub(ThreadingHTTPServer):
    """A server with the requests of an upload. requests: path, token and body of each; files: what was committed, by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private, self.refusal = True, ""
        self.requests: list[tuple[str, str, bytes]] = []
        self.large: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            return {"url": f"{self.url}/me/model"}
        if path == "/api/models/me/model":
            return {"id": "me/model", "private": self.private, "siblings": []}
        if "/preupload/" in path:
            mode = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": mode[name.endswith(".safetensors")], "shouldIgnore": False} for name in names]
            return {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"objects": [each | {"actions": {"upload": {"href": f"{self.url}/large/{each['oid']}"}}} for each in objects]}
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
        if "/commit/" in path:
            self.commit([json.loads(line) for line in body.splitlines()])
            return {"commitOid": "a" * 40, "commitUrl": f"{self.url}/me/model/commit/{'a' * 40}"}
        return {}

    def commit(self, lines: list[dict]) -> None:
        for value in (line["value"] for line in lines if line["key"] == "file"):
            self.files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            self.files[value["path"]] = self.large[value["oid"]]


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, self.headers.get("Authorization", ""), body))
        refused = self.server.refusal and self.path.startswith("/api/")
        content = json.dumps({"error": self.server.refusal} if refused else self.server.answer(self.path, body)).encode()
        self.send_response(403 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that the library is pointed at, with a token on this machine."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's other protocol for large files
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exports the tiny run to the folder `out` with these flags; returns exit code, output and errors, free of the token."""

    run_folder = trained("sltrain")

    def run(*flags: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["export", "--checkpoint", str(run_folder), "--out", str(tmp_path / "out"), *flags])
        printed = capfd.readouterr()
        assert TOKEN not in printed.out + printed.err
        assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        return code, printed.out, printed.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_whole_folder_is_uploaded_to_a_private_repository(hub: Hub, push: Callable, tmp_path: Path) -> None:
    code, printed, _ = push("--push", "me/model", "--json")
    assert code == 0
    assert json.loads(printed)["pushed"] == f"{hub.url}/me/model"
    assert hub.files == contents(tmp_path / "out")
    created = [json.loads(body) for path, _, body in hub.requests if path == "/api/repos/create"]
    assert [each.get("visibility") == "private" or each.get("private") is True for each in created] == [True]
    assert any(token == f"Bearer {TOKEN}" for path, token, _ in hub.requests if "/commit/" in path)
    assert not any(TOKEN.encode() in body for _, _, body in hub.requests)
    assert 'from_pretrained("me/model")' in hub.files["README.md"].decode()


def test_a_public_repository_is_used_only_if_asked_for(hub: Hub, push: Callable, tmp_path: Path) -> None:
    hub.private = False
    code, _, said = push("--push", "me/model")
    assert (code, hub.files) == (2, {})
    assert "--push me/model: exists and is public, so everyone could read the model" in said
    assert f"hf upload me/model {tmp_path / 'out'} ." in said
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    assert push("--push", "me/model", "--public")[0] == 0
    assert hub.files == contents(tmp_path / "out")
    created = [json.loads(body) for path, _, body in hub.requests if path == "/api/repos/create"]
    assert [each.get("visibility") == "private" or each.get("private") is True for each in created] == [True, False]


def test_a_refusal_is_passed_on_and_the_export_is_complete(hub: Hub, push: Callable, tmp_path: Path) -> None:
    hub.refusal = f"You don't have the rights to create a model under the namespace me with {TOKEN}"
    code, printed, said = push("--push", "me/model")
    assert code == 2
    assert "the upload failed (You don't have the rights to create a model under the namespace me with [token])" in said
    assert said.rstrip().endswith(f"complete; upload it later with: hf upload me/model {tmp_path / 'out'} . --private")
    assert "dense model" in printed
    assert {"model.safetensors", "config.json", "README.md"} <= contents(tmp_path / "out").keys()


def test_without_a_network_the_export_is_complete_and_the_message_says_how_to_upload_it(
    hub: Hub, push: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    code, _, said = push("--push", "me/model", "--public")
    assert code == 2
    assert "--push me/model: the hub cannot be reached (" in said
    assert f"the export in {tmp_path / 'out'} is complete" in said
    command = shlex.split(said.rstrip().rpartition("upload it later with: ")[2])
    assert command == ["hf", "upload", "me/model", str(tmp_path / "out"), ".", "--no-private"]
    assert "model.safetensors" in contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push", "me/my model"], ["--push me/my model: is no name of a repository on the hub", "use OWNER/MODEL"]),
        (["--push", "https://hub/me/model"], ["is no name of a repository"]),
        (["--push", "model"], ["--push model: names no owner; use OWNER/model"]),
        (["--public"], ["--public has no effect without --push OWNER/MODEL"]),
    ],
)
def test_a_name_that_cannot_work_is_refused_before_the_export(
    hub: Hub, push: Callable, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    code, _, said = push(*flags)
    assert code == 2
    assert all(word in said for word in words)
    assert (list(tmp_path.iterdir()), hub.requests) == ([], [])


def test_a_missing_token_and_an_offline_hub_are_refused_before_the_export(
    hub: Hub, push: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "export", lambda *args, **kwargs: pytest.fail("exported"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids every upload; unset it" in push("--push", "me/model")[2]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, said = push("--push", "me/model")
    assert code == 2
    assert "this machine has no token for the hub; run `hf auth login`, or set HF_TOKEN" in said
    assert (list(tmp_path.iterdir()), hub.requests) == ([], [])
