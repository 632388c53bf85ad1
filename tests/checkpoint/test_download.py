"""`download`, against a hub on this machine: what it fetches, and what it does when something is in the way."""

import errno
import hashlib
import inspect
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from fuzz.hub import HubHandler
from test_convert import refused

from emilie_min.checkpoint import download
from emilie_min.errors import TokenizerError

CHUNK = 100_000  # in which the client writes to the disk; 10 MB by default
WEIGHTS = os.urandom(2_999_999) + b"."  # ends unlike the wrong file of a test
VOCAB = b'{"<|endoftext|>": 49407}'
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
NAME = download.WEIGHTS
FILES = {
    f"/{download.REPOSITORY}/resolve/main/{NAME}": WEIGHTS,
    f"/{download.CLIP}/resolve/main/vocab.json": VOCAB,
    f"/{download.CLIP}/resolve/main/merges.txt": b"#version: 0.2\ni n\n",
    f"/{download.CLIP}/resolve/main/tokenizer_config.json": b"{}",
}


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download asks for, on this machine."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.log, self.ranges = dict(FILES), [], True
        self.status = {}  # path -> a status to answer with
        self.breaks = []  # how the next transfers break off: (bytes sent, "close", "reset" or "hang")
        self.released = threading.Event()  # lets go of the hanging one
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, name):
        """The Range of every GET of a file, None where the whole was wanted."""
        return [wanted for method, path, wanted in self.log if method == "GET" and path.endswith(name)]

    def handle_error(self, request, client_address):
        pass  # connections that a test broke


class Answer(HubHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, wanted = self.server, self.headers.get("Range")
        hub.log.append((self.command, self.path, wanted))
        assert "Authorization" not in self.headers
        data, status = hub.files.get(self.path), hub.status.get(self.path)
        if status or data is None:
            self.send_response(status or 404)
            if not status:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and hub.ranges else 0
        self.begins(data, start)
        if not body:
            return
        if hub.breaks and len(data) > 1000:
            sent, how = hub.breaks.pop(0)
            self.wfile.write(data[start : start + sent])
            self.wfile.flush()
            if how == "hang":
                hub.released.wait(60)
            if how == "reset":
                time.sleep(0.2)  # let what was sent arrive before the reset overtakes it
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data[start:])


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, and no way to any other."""
    from huggingface_hub import constants

    connect = socket.socket.connect

    def local(self, address):
        assert address[0] == "127.0.0.1", f"a test wants to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.file_download.time", type("", (), {"sleep": lambda s: None}))
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub, folder, **more):
    return download.download(folder, endpoint=hub.url, **{"expected_sha256": SHA256, **more})


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


WHOLE = [NAME, "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"]


def test_download(hub, tmp_path):
    folder = tmp_path / "new" / "weights"
    text = fetch(hub, folder)
    assert listing(folder) == sorted(WHOLE)  # and nothing beside: no cache, no partial file
    assert (folder / NAME).read_bytes() == WEIGHTS and (folder / "tokenizer" / "vocab.json").read_bytes() == VOCAB
    assert "sha256 as released" in text and "vocab.json: 24.0B" in text
    asked = len(hub.log)
    assert "already there" in fetch(hub, folder)
    assert len(hub.log) == asked  # a second time needs no network


def test_download_of_the_tokenizer_alone(hub, tmp_path):
    fetch(hub, tmp_path, tokenizer_only=True)
    assert listing(tmp_path) == sorted(WHOLE[1:])
    assert not any(NAME in path for _, path, _ in hub.log)


def test_download_of_a_revision(hub, tmp_path):
    path = f"/{download.REPOSITORY}/resolve/{{}}/{NAME}"
    hub.files[path.format("refs%2Fpr%2F1")] = hub.files.pop(path.format("main"))
    fetch(hub, tmp_path, revision="refs/pr/1")
    assert (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_broken_connection_is_taken_up_again(hub, tmp_path):
    hub.breaks = [(1_000_000, "close"), (500_000, "close")]
    fetch(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS
    assert hub.gets(NAME)[0] is None and len(hub.gets(NAME)) == 3
    assert all(wanted.startswith("bytes=") for wanted in hub.gets(NAME)[1:])


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.breaks = [(1_000_000, "reset")]
    message = refused(fetch, hub, tmp_path)
    assert "run the same command again, " in message and "are kept" in message
    assert not (tmp_path / NAME).exists()
    kept = (tmp_path / f".{NAME}.partial").stat().st_size
    assert 0 < kept <= 1_000_000
    fetch(hub, tmp_path)
    assert hub.gets(NAME) == [None, f"bytes={kept}-"]
    assert listing(tmp_path) == sorted(WHOLE) and (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_killed_download_goes_on_where_it_stopped(hub, tmp_path):
    """Killed outright, in a process of its own: the next one asks for the rest alone."""
    hub.breaks = [(2_000_000, "hang")]
    code = (
        f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}\n"
        f"from emilie_min.checkpoint import download; download.download({str(tmp_path)!r}, endpoint={hub.url!r})"
    )
    root = str(Path(download.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"},
        stderr=subprocess.DEVNULL,
    )
    partial = tmp_path / f".{NAME}.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.02)
    process.kill()
    process.wait()
    hub.released.set()
    kept = partial.stat().st_size
    assert 0 < kept <= 2_000_000
    fetch(hub, tmp_path)
    assert hub.gets(NAME) == [None, f"bytes={kept}-"] and (tmp_path / NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("kept", [b"", WEIGHTS[:1000], WEIGHTS, WEIGHTS + b"more"])
def test_what_an_earlier_download_left(hub, tmp_path, kept):
    (tmp_path / f".{NAME}.partial").write_bytes(kept)
    fetch(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS
    assert hub.gets(NAME) == {1000: ["bytes=1000-"], len(WEIGHTS): []}.get(len(kept), [None])


def test_a_server_that_sends_no_parts(hub, tmp_path):
    hub.ranges = False
    (tmp_path / f".{NAME}.partial").write_bytes(b"x" * 1000)
    fetch(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_wrong_file_is_not_installed(hub, tmp_path):
    hub.files[f"/{download.REPOSITORY}/resolve/main/{NAME}"] = WEIGHTS[:-1] + b"!"
    message = refused(fetch, hub, tmp_path)
    assert "was deleted" in message and SHA256 in message
    assert listing(tmp_path) == sorted(WHOLE[1:])
    (tmp_path / f".{NAME}.partial").write_bytes(b"y" * len(WEIGHTS))  # a partial file of something else
    hub.files = dict(FILES)
    refused(fetch, hub, tmp_path)
    fetch(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_wrong_file_that_was_there_is_moved_aside(hub, tmp_path):
    (tmp_path / NAME).write_bytes(b"mine")
    assert "moved to" in fetch(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS
    assert (tmp_path / f"{NAME}.wrong").read_bytes() == b"mine"


def test_without_the_released_hash_nothing_else_passes(hub, tmp_path):
    released = next(digest for digest, name in download.RELEASED.items() if name == NAME)
    assert released in refused(download.download, tmp_path, endpoint=hub.url)


def test_files_that_are_not_there(hub, tmp_path):
    assert f"has no {NAME} at revision nothing" in refused(fetch, hub, tmp_path, revision="nothing")
    del hub.files[f"/{download.CLIP}/resolve/main/merges.txt"]
    message = refused(fetch, hub, tmp_path / "b", error=TokenizerError)
    assert "has no merges.txt" in message


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_server_that_will_not(hub, tmp_path, status):
    hub.status[f"/{download.REPOSITORY}/resolve/main/{NAME}"] = status
    assert f"the server answered {status}" in refused(fetch, hub, tmp_path)


def test_no_network(hub, tmp_path, monkeypatch):
    hub.shutdown()
    hub.server_close()
    assert "online?" in refused(fetch, hub, tmp_path, error=TokenizerError)
    for nowhere in ("nonsense", f"http://{'a' * 70}"):
        assert "online?" in refused(download.download, tmp_path, endpoint=nowhere, error=TokenizerError)
    assert listing(tmp_path) == []


def test_offline_mode(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline" in refused(fetch, hub, tmp_path, error=TokenizerError)
    assert not hub.log


def test_download_to_a_disk_without_room(hub, tmp_path, monkeypatch):
    fetch(hub, tmp_path, tokenizer_only=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    message = refused(fetch, hub, tmp_path)
    assert "the disk is full" in message and "3.00MB are needed" in message
    assert not hub.gets(NAME)


def test_download_to_a_disk_that_fills_up(hub, tmp_path, monkeypatch):
    fetch(hub, tmp_path, tokenizer_only=True)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refused(fetch, hub, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_file_that_arrives_otherwise_than_it_was_told(hub, tmp_path, monkeypatch):
    fetch(hub, tmp_path, tokenizer_only=True)

    def short(*_, **__):
        raise OSError("Consistency check failed: file should be of size 7 but has size 5")

    monkeypatch.setattr(download, "http_get", short)
    assert "cannot be fetched (Consistency check failed" in refused(fetch, hub, tmp_path)


def test_download_over_a_folder(hub, tmp_path):
    (tmp_path / NAME).mkdir()
    assert "Is a directory" in refused(fetch, hub, tmp_path)


def test_an_old_partial_tokenizer_is_not_continued(hub, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / ".merges.txt.partial").write_bytes(b"junk")
    fetch(hub, tmp_path, tokenizer_only=True)
    assert (tmp_path / "tokenizer" / "merges.txt").read_bytes().startswith(b"#version")


def test_download_to_a_place_that_is_no_folder(hub, tmp_path):
    (tmp_path / "weights").write_text("a file")
    assert "cannot be written" in refused(fetch, hub, tmp_path / "weights", error=TokenizerError)


def test_the_hubs_function_that_is_not_public_is_as_we_call_it():
    """`http_get` resumes and retries, and no public function does; a release that changes it must fail here."""
    parameters = inspect.signature(download.http_get).parameters
    assert list(parameters)[:2] == ["url", "temp_file"]
    assert {"resume_size", "expected_size", "displayed_filename"} <= parameters.keys()


def test_downloading_needs_no_pytorch():
    code = "import emilie_min.checkpoint.download, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    root = Path(download.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "set()\n", done.stderr
