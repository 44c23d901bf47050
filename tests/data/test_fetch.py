"""`data fetch` copies files completely and verified or not at all, and resumes interrupted copies."""

import hashlib
import json

import pytest
from test_network import CONTENT, FAST, FAULTS, Server, every, status

from peft_pretraining.__main__ import main
from peft_pretraining.data import DataError, NetworkGone, network
from peft_pretraining.data import fetch as fetch_module
from peft_pretraining.data.fetch import fetch_file
from peft_pretraining.data.source import Shard, open_source

pytest.importorskip("aiohttp")
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=[True, False], ids=["ranges", "stream"])
def server(request, monkeypatch):
    monkeypatch.setattr(fetch_module, "_BLOCK_BYTES", 2**13)
    monkeypatch.setattr(fetch_module, "_STEP_BYTES", 2**12)
    monkeypatch.setattr(network, "_BUFFER_BYTES", 2**12)
    monkeypatch.setattr(network._Attempts, "_contact_made", False)
    server = Server(request.param)
    server.etag = f'"{SHA256}"'
    yield server
    server.close()


def fetched(server, out, name="c4-train.00000-of-01024.json.gz"):
    return fetch_file(Shard(f"{server.url}/{name}", name, "json", "gzip"), out, FAST, progress=False)


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "a part as if that were all"])
def test_a_file_is_copied_completely_over_a_bad_network(server, tmp_path, fault):
    server.fault = FAULTS[fault]
    path = fetched(server, tmp_path / "copy")
    assert path.read_bytes() == CONTENT
    assert [each.name for each in (tmp_path / "copy").iterdir()] == ["c4-train.00000-of-01024.json.gz"]
    requests = server.requests
    assert fetched(server, tmp_path / "copy") == path
    assert server.requests == requests  # the file exists, so only its size is requested


def test_an_interrupted_copy_resumes(server, tmp_path):
    server.fault = lambda number, handler: number > 8 and not status(503)(handler)
    if not server.ranges:
        server.fault = every(1, lambda handler: handler.answer(True, cut=30_000))
    with pytest.raises(NetworkGone):
        fetched(server, tmp_path)
    partial = tmp_path / ".c4-train.00000-of-01024.json.gz.partial"
    copied = partial.stat().st_size
    assert 2**12 <= copied < len(CONTENT)
    assert not (tmp_path / "c4-train.00000-of-01024.json.gz").exists()
    server.fault = FAULTS["none"]
    requests = server.requests
    assert fetched(server, tmp_path).read_bytes() == CONTENT
    if server.ranges:
        assert server.requests - requests <= (len(CONTENT) - copied) // 2**13 + 2
    assert not partial.exists()


def test_a_partial_copy_of_another_version_is_not_used(server, tmp_path):
    partial = tmp_path / ".x.json.gz.partial"
    partial.write_bytes(b"of yesterday's file")
    partial.with_suffix(".json").write_text(json.dumps({"size_bytes": len(CONTENT), "mark": "old", "sha256": None}))
    assert fetched(server, tmp_path, "x.json.gz").read_bytes() == CONTENT


def test_content_with_a_wrong_checksum_is_refused_and_removed(server, tmp_path):
    server.etag = f'"{"0" * 64}"'
    with pytest.raises(DataError, match=rf"its SHA-256 is {SHA256}, the server announced 0000"):
        fetched(server, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".json"] == []
    server.etag = None  # only the size can be compared
    assert fetched(server, tmp_path).read_bytes() == CONTENT


def test_a_name_outside_the_folder_is_refused(server, tmp_path):
    with pytest.raises(DataError, match="leads out of"):
        fetched(server, tmp_path / "in", "../x.json.gz")


def test_a_missing_file_is_named(server, tmp_path):
    server.fault = every(1, status(404))
    with pytest.raises(DataError, match=r"c4-train.* cannot be read"):
        fetched(server, tmp_path)


def test_data_fetch_makes_a_folder_that_is_a_data_set(server, tmp_path, capsys):
    """One file of a server is a data set, whose held-out documents are chosen by hash as usual."""
    arguments = [
        "data",
        "fetch",
        "--dataset",
        f"{server.url}/x.json.gz",
        "--shards",
        "2",
        "--out",
        str(tmp_path / "copy"),
    ]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == len(CONTENT)
    assert open_source(str(tmp_path / "copy"), "train").shards[0].size_bytes == len(CONTENT)


def test_local_data_is_not_fetched(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    assert main(["data", "fetch", "--dataset", str(tmp_path), "--shards", "1", "--out", str(tmp_path / "copy")]) == 2
    assert "is here already" in capsys.readouterr().err


def test_fetching_in_offline_mode_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["data", "fetch", "--dataset", "c4", "--shards", "1", "--out", str(tmp_path / "copy")]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
