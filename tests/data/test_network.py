"""Reading over a failing network gives every record once and in order, or one message after a limited number of attempts."""

import dataclasses
import gzip
import hashlib
import itertools
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from corpora import json_lines

from peft_pretraining.data import DataError, NetworkGone, network
from peft_pretraining.data.loader import TrainLoader
from peft_pretraining.data.records import document_text, read_records
from peft_pretraining.data.source import RetryPolicy, open_source

pytest.importorskip("aiohttp")
# Hardly compressible, so that the file has many blocks of the size set below.
DOCUMENTS = [f"{i:05d} {hashlib.sha256(b'%d' % i).hexdigest()}" for i in range(2000)]
CONTENT = gzip.compress(json_lines(DOCUMENTS), compresslevel=1)
FAST = RetryPolicy(first_tries=4, later_tries=6, first_wait_s=0.01, longest_wait_s=0.05)


class Server:
    """Serves CONTENT under any name; `fault(request number, handler)` may answer instead and then returns True."""

    def __init__(self, ranges: bool):
        self.ranges, self.requests = ranges, 0
        self.etag: str | None = None
        self.fault: Callable[[int, BaseHTTPRequestHandler], bool] = lambda number, handler: False
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                with lock:
                    outer.requests += 1
                    number = outer.requests
                if not outer.fault(number, self):
                    self.answer(body=True)

            def answer(self, body: bool, cut: int | None = None, admit: bool = True):
                first, last = 0, len(CONTENT) - 1
                wanted = self.headers.get("Range", "") if outer.ranges else ""
                if wanted:
                    begin, end = wanted.removeprefix("bytes=").split("-")
                    first, last = int(begin), min(last, int(end or last))
                self.send_response(206 if wanted else 200)
                if outer.etag is not None:
                    self.send_header("ETag", outer.etag)
                if outer.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
                length = last + 1 - first
                self.send_header("Content-Length", str(length if admit else min(length, cut)))
                self.end_headers()
                if body:
                    self.wfile.write(CONTENT[first : last + 1][:cut])
                if cut is not None:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler):
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return send


@pytest.fixture(params=[True, False], ids=["ranges", "stream"])
def server(request, monkeypatch):
    monkeypatch.setattr(network, "_BLOCK_BYTES", 2**13)
    monkeypatch.setattr(network, "_BUFFER_BYTES", 2**12)
    monkeypatch.setattr(network._Attempts, "_contact_made", False)
    server = Server(request.param)
    yield server
    server.close()


def open_remote(server: Server, name: str = "x.json.gz"):
    return dataclasses.replace(open_source(f"{server.url}/{name}", "train", hold_out=False), retry=FAST)


def read_all(source):
    return [document_text(record, source.shards[0], "text") for record in read_records(source.shards[0], source)]


def every(n: int, action: Callable[[BaseHTTPRequestHandler], None]):
    def fault(number, handler):
        if number % n != 1 % n:
            return False
        action(handler)
        return True

    return fault


FAULTS = {
    "none": lambda number, handler: False,
    "503 every other time": every(2, status(503)),
    "429 every third time": every(3, status(429, Retry_After="0.02")),
    "500, 502, 504": lambda number, handler: number % 5 in (1, 2, 3) and not status([500, 502, 504][number % 3])(handler),
    "dropped after 4 kB every other time": every(2, lambda handler: handler.answer(True, cut=4096)),
    # Not in the first two requests, by which a server without ranges is recognised, and cut after the end of their data.
    "a part as if that were all": lambda number, handler: (
        number in (3, 5, 6) and not handler.answer(True, cut=4096 if handler.headers.get("Range") else 20_000, admit=False)
    ),
    "dropped before the answer": every(2, lambda handler: setattr(handler, "close_connection", True)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_interrupted_reading_continues_at_the_same_record(server, fault):
    source = open_remote(server)
    server.fault = FAULTS[fault]
    assert read_all(source) == DOCUMENTS
    least = len(CONTENT) // 2**14 if server.ranges else 1
    assert server.requests >= least + (fault != "none")


@pytest.mark.parametrize("data_order", ["lanes", "global"])
def test_batches_over_a_failing_network_equal_those_from_the_disk(server, tmp_path, byte_tokenizer, data_order):
    (tmp_path / "x.json.gz").write_bytes(CONTENT)
    local = open_source(str(tmp_path), "train", hold_out=False)
    # Every third request: with every second one, all faults would affect the same of two workers.
    server.fault = every(3, lambda handler: handler.answer(True, cut=4096))
    found = []
    for source, workers in ((local, 0), (open_remote(server), 2)):
        options = {"packing": True, "lanes": 4, "seed": 1, "data_order": data_order}
        loader = TrainLoader(source, byte_tokenizer, max_length=64, workers=workers, **options)
        found.append([batch.input_ids.tolist() for batch, _ in zip(loader, range(40), strict=False)])
        loader.close()
    assert found[0] == found[1]


def test_a_server_that_stays_down_gives_one_message(server):
    source = open_remote(server)
    server.fault = every(1, status(503))
    with pytest.raises(NetworkGone, match=r"x\.json\.gz: no answer after 4 tries .*503.*check the network"):
        read_all(source)
    assert server.requests <= 4 * 3  # the library may retry a few times itself


def test_a_network_that_fails_later_is_retried_longer(server):
    """A long run waits longer for the network than a start does."""
    source = open_remote(server)
    assert read_all(source) == DOCUMENTS
    server.fault = every(1, status(503))
    with pytest.raises(NetworkGone, match="no answer after 6 tries"):
        read_all(source)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_loses_the_network_can_be_saved_and_resumed(server, tmp_path, byte_tokenizer, workers):
    """The error has its own type, also from worker processes, and the loader's state is then that after the last batch."""
    source = open_remote(server)
    (tmp_path / "x.json.gz").write_bytes(CONTENT)
    options = {"max_length": 64, "packing": True, "lanes": 4, "seed": 1, "data_order": "lanes"}
    local = TrainLoader(open_source(str(tmp_path), "train", hold_out=False), byte_tokenizer, **options)
    expected = [batch.input_ids.tolist() for batch, _ in zip(local, range(3000), strict=False)]
    loader = TrainLoader(source, byte_tokenizer, workers=workers, **options)
    served = server.requests
    server.fault = lambda number, handler: number > served + 12 and not status(503)(handler)
    found: list = []
    with pytest.raises(NetworkGone, match="no answer after 6 tries"):
        found.extend(batch.input_ids.tolist() for batch in itertools.islice(loader, 3000))
    loader.close()
    server.fault = FAULTS["none"]
    later = TrainLoader(source, byte_tokenizer, **options)
    later.load_state_dict(loader.state_dict())
    found += [batch.input_ids.tolist() for batch, _ in zip(later, range(3000 - len(found)), strict=False)]
    assert found == expected


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_http_errors_that_are_final_are_not_retried(server, code):
    source = open_remote(server)
    server.fault = every(1, status(code))
    with pytest.raises(DataError, match=r"x\.json\.gz cannot be read .*check the address"):
        read_all(source)
    assert server.requests <= 2


def test_the_servers_retry_after_is_respected(server, monkeypatch):
    waits = []
    monkeypatch.setattr(network.time, "sleep", waits.append)
    source = open_remote(server)
    answers = iter([status(429, Retry_After="0.37"), status(429)])
    server.fault = lambda number, handler: (answer := next(answers, None)) is not None and not answer(handler)
    assert read_all(source) == DOCUMENTS
    assert waits[0] == pytest.approx(0.37)
    assert waits[1] == pytest.approx(0.02)  # the policy's second wait: twice 0.01


def test_a_server_that_does_not_answer_counts_as_dropped(server, monkeypatch):
    monkeypatch.setattr(network, "_SILENCE_S", 0.2)
    source = open_remote(server)
    server.fault = lambda number, handler: number == 1 and not time.sleep(1.0)
    assert read_all(source) == DOCUMENTS


def test_a_server_that_stops_sending_counts_as_dropped(server, monkeypatch):
    monkeypatch.setattr(network, "_SILENCE_S", 0.2)
    source = open_remote(server)

    def stall(number, handler):
        if number != (2 if server.ranges else 1):
            return False
        handler.answer(True, cut=4096)
        handler.wfile.flush()
        time.sleep(1.0)
        return True

    server.fault = stall
    assert read_all(source) == DOCUMENTS
    assert server.requests >= 2


def test_a_file_truncated_on_the_server_counts_as_damaged(server, monkeypatch):
    """After a few equal attempts the rest counts as one bad record, and the run continues."""
    monkeypatch.setattr("test_network.CONTENT", CONTENT[: len(CONTENT) // 2])
    found = read_all(open_remote(server))
    assert found[-1].kind == "unreadable_rest"
    assert found[:-1] == DOCUMENTS[: len(found) - 1]
    assert len(found) > 500


def test_a_missing_network_is_reported_after_a_few_attempts(monkeypatch):
    c4 = open_source("c4", "train")
    shard = dataclasses.replace(c4.shards[0], url="http://127.0.0.1:9/x.json.gz")
    source = dataclasses.replace(c4, shards=(shard,), retry=FAST)
    monkeypatch.setattr(network._Attempts, "_contact_made", False)
    with pytest.raises(DataError, match=r"no answer after 4 tries .*use --dataset demo or a local folder"):
        read_all(source)


def test_http_data_comes_through_the_proxy_of_the_environment(monkeypatch):
    """The name of the server is known to the proxy only; listing, fetching and reading all ask it."""
    proxy = Server(ranges=True)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.url)
    try:
        source = open_source("http://server.invalid/corpus/a-proxied.jsonl.gz", "validation", hold_out=False)
        source = dataclasses.replace(source, retry=FAST)
        read = [document_text(record, source.shards[0], "text") for record in read_records(source.shards[0], source)]
    finally:
        proxy.close()
    assert read == DOCUMENTS
