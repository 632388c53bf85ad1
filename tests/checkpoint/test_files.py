"""`info`, `convert` and `download`: what they say, write and fetch, and what they do when something is in the way."""

import errno
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from pseudo import DATA, manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import load, parameters, same, without

from emilie_min.checkpoint import files, reading, writing
from emilie_min.checkpoint.reading import EMA, RAW
from emilie_min.errors import CheckpointError, ConfigError, TokenizerError

SMALL = DATA / "small.yaml"


def hollow(path, name="manifest", change=lambda state: state):
    """A safetensors file of a manifest's keys and shapes whose numbers are a hole in the disk: zeros that take none."""
    header, offset = {}, 0
    names = {"float32": ("F32", 4), "int64": ("I64", 8), "int32": ("I32", 4)}
    for key, entry in change(manifest(name)["state_dict"]).items():
        dtype, itemsize = names[entry["dtype"]]
        nbytes = torch.Size(entry["shape"]).numel() * itemsize
        header[key] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    head = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + offset)
    return path


def refused(do, *args, error=CheckpointError, **more):
    with pytest.raises(error) as caught:
        do(*args, **more)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.fixture(scope="session")
def small_safetensors(small_state, tmp_path_factory):
    """The small model's file in the format that is quick to index."""
    save_file(small_state, path := tmp_path_factory.mktemp("twin") / "small.safetensors")
    return path


# info


def test_info_of_a_trainers_file(small_ckpt):
    text = files.info(small_ckpt, config=SMALL)
    assert text.splitlines()[0] == str(small_ckpt)
    for line in (
        "  format       torch.save, 90.",
        "  UNet (EMA)    686 tensors,  34.",
        "  UNet (raw)    686 tensors,  34.",
        "  autoencoder   248 tensors,  21.",
        "  text model     37 tensors, 419.",
        "  other          14 tensors,  48.01 kB, float32, int32",
        f"  model        {SMALL}: complete, every shape fits",
        "  sampling     uses the EMA UNet weights",
    ):
        assert line in text, text
    assert "12 noise schedule" in text and "686 raw UNet weights" in text
    assert "fits no model" not in text and "sha256" not in text


def test_info_without_a_config(small_ckpt, tmp_path):
    assert "does not fit: of a model that no built-in config fits: name its YAML file" in files.info(small_ckpt)
    text = files.info(hollow(tmp_path / "released.safetensors"))
    assert "safetensors, 7.70 GB, 1831 tensors" in text
    assert "model        ip2p: complete" in text and "UNet (EMA)    686 tensors,   3.44 GB, float32" in text


def test_info_of_stable_diffusion(tmp_path):
    def four(state):
        first = [RAW + "input_blocks.0.0.weight"]
        state = without(state, EMA)
        return {**state, **{key: {**state[key], "shape": [320, 4, 3, 3]} for key in first}}

    text = files.info(hollow(tmp_path / "sd.safetensors", change=four))
    assert "model        sd15: complete" in text and "uses the raw UNet weights" in text
    assert "320x4x3x3 and should be 320x8x3x3" in files.info(tmp_path / "sd.safetensors", config="ip2p")


def test_info_names_what_is_missing(small_state, tmp_path):
    state = without(small_state, "first_stage_model.decoder.conv_out", EMA)
    state["surprise.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "a.safetensors")
    text = files.info(tmp_path / "a.safetensors", config=SMALL)
    assert "2 missing (first_stage_model.decoder.conv_out.bias, first_stage_model.decoder.conv_out.weight)" in text
    assert "1 unknown (surprise.weight)" in text and "complete" not in text


def test_info_of_other_files(tmp_path):
    save_file({"down_blocks.0.norm.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert "does not fit: a network in diffusers' layout" in files.info(tmp_path / "a.safetensors")
    (tmp_path / "b.ckpt").write_bytes(b"junk")
    assert "neither" in refused(files.info, tmp_path / "b.ckpt")
    assert "no weights at" in refused(files.info, tmp_path / "c.ckpt")
    refused(files.info, tmp_path / "a.safetensors", config="nonsense", error=ConfigError)


def test_info_hashes(small_safetensors, monkeypatch):
    digest = hashlib.sha256(small_safetensors.read_bytes()).hexdigest()
    text = files.info(small_safetensors, sha256=True, config=SMALL)
    assert f"sha256       {digest}" in text and "not a released file" in text
    monkeypatch.setitem(reading.RELEASED, digest, "some.ckpt")
    assert "the released some.ckpt" in files.info(small_safetensors, sha256=True, config=SMALL)


def test_info_quotes_no_control_characters(small_state, tmp_path):
    save_file(small_state, tmp_path / "a.safetensors", {"source": "a\x1b[2J\nb" * 100, "format": "pt"})
    text = files.info(tmp_path / "a.safetensors", config=SMALL)
    assert all(line.isprintable() and len(line) < 300 for line in text.splitlines())


# convert


@pytest.mark.parametrize("dtype, kind", [("float16", "ckpt"), ("bfloat16", "safetensors"), ("float32", "safetensors")])
def test_convert(small_ckpt, small_safetensors, small_state, small_config, networks, tmp_path, dtype, kind):
    path, torch_dtype = tmp_path / "a.safetensors", getattr(torch, dtype)
    text = files.convert(small_ckpt if kind == "ckpt" else small_safetensors, path, dtype, SMALL)
    assert "EMA weights" in text and str(path) in text and "\n" not in text
    with safe_open(path, "pt") as f:  # the library's own checks of the header
        assert f.metadata() == {"format": "pt", "source": f"small.{kind}", "family": "EMA"}
    out = load_file(path)
    assert not any(key.startswith(EMA) for key in out)
    for key, shadowed in manifest("small_manifest")["ema_of"].items():
        assert torch.equal(out.pop(shadowed), small_state[key].to(torch_dtype))
    rest = {k: t for k, t in without(small_state, RAW, EMA).items() if "." in k and not k.endswith("position_ids")}
    assert same(out, {key: t.to(torch_dtype) for key, t in rest.items()})
    loaded, report = load(small_config, path, torch.float32)
    assert report.family == "raw" and not report.dropped
    assert same(parameters(loaded), {name: p.to(torch_dtype).float() for name, p in parameters(networks).items()})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    told = files.info(path, config=SMALL)
    assert f"source       small.{kind}" in told and "family       EMA" in told and dtype in told


def test_a_converted_file_converts_to_itself(small_safetensors, tmp_path):
    files.convert(small_safetensors, tmp_path / "a.safetensors", torch.float16, SMALL)
    files.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "float16", SMALL)
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


def test_convert_refuses(small_safetensors, tmp_path, small_state):
    target = tmp_path / "a.safetensors"
    assert "dtype must be one of" in refused(files.convert, small_safetensors, target, "int8", SMALL)
    assert "name it so, not a.ckpt" in refused(files.convert, small_safetensors, tmp_path / "a.ckpt", config=SMALL)
    assert "no built-in config fits" in refused(files.convert, small_safetensors, target)
    assert "misshapen" in refused(files.convert, small_safetensors, target, config="toy")
    assert "no folder" in refused(files.convert, small_safetensors, tmp_path / "none" / "a.safetensors", config=SMALL)
    assert "no weights at" in refused(files.convert, tmp_path / "none.ckpt", target, config=SMALL)
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder" in refused(files.convert, small_safetensors, tmp_path / "folder.safetensors", config=SMALL)
    (tmp_path / "folder.safetensors").rmdir()
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"mine")
    assert "is there already" in refused(files.convert, small_safetensors, target, config=SMALL)
    assert target.read_bytes() == b"mine"
    files.convert(small_safetensors, target, config=SMALL, overwrite=True)
    for same_file in (target, tmp_path / "link.safetensors"):
        if same_file != target:
            same_file.symlink_to(target)
        assert "the file that is read" in refused(files.convert, target, same_file, config=SMALL, overwrite=True)
    assert len(load_file(target)) == 686 + 248 + 36


def test_convert_into_a_folder_that_may_not_be_written(small_safetensors, tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(writing, "replacing", denied)
    message = refused(files.convert, small_safetensors, tmp_path / "a.safetensors", config=SMALL)
    assert "may not write there" in message


def test_convert_on_a_disk_without_room(small_safetensors, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    message = refused(files.convert, small_safetensors, tmp_path / "a.safetensors", config=SMALL)
    assert "the disk is full" in message and "28." in message and "MB are needed" in message


def test_convert_on_a_disk_that_fills_up(small_safetensors, tmp_path, monkeypatch):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"mine")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refused(files.convert, small_safetensors, target, config=SMALL, overwrite=True)
    assert target.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_convert_leaves_nothing(small_safetensors, tmp_path, monkeypatch):
    get, calls = reading.Reader.get, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return get(self, *args)

    monkeypatch.setattr(reading.Reader, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.convert(small_safetensors, tmp_path / "a.safetensors", config=SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, says", [(1e6, "try bfloat16"), (float("nan"), "is not finite")])
def test_convert_sees_numbers_that_overflow(small_state, tmp_path, number, says):
    state = without(small_state, EMA)
    key = RAW + "out.2.bias"
    state[key] = state[key].clone().index_fill(0, torch.tensor([1]), number)
    save_file(state, tmp_path / "a.safetensors")
    message = refused(files.convert, tmp_path / "a.safetensors", tmp_path / "b.safetensors", config=SMALL)
    assert key in message and says in message
    assert not (tmp_path / "b.safetensors").exists()
    if number == 1e6:
        files.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bfloat16", SMALL)


# download

CHUNK = 100_000  # in which the client writes to the disk; 10 MB by default
WEIGHTS, VOCAB = os.urandom(3_000_000), b'{"<|endoftext|>": 49407}'
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
NAME = files.WEIGHTS
FILES = {
    f"/{files.REPOSITORY}/resolve/main/{NAME}": WEIGHTS,
    f"/{files.CLIP}/resolve/main/vocab.json": VOCAB,
    f"/{files.CLIP}/resolve/main/merges.txt": b"#version: 0.2\ni n\n",
    f"/{files.CLIP}/resolve/main/tokenizer_config.json": b"{}",
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


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

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
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
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


def download(hub, folder, **more):
    return files.download(folder, endpoint=hub.url, **{"expected_sha256": SHA256, **more})


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


WHOLE = [NAME, "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"]


def test_download(hub, tmp_path):
    folder = tmp_path / "new" / "weights"
    text = download(hub, folder)
    assert listing(folder) == sorted(WHOLE)  # and nothing beside: no cache, no partial file
    assert (folder / NAME).read_bytes() == WEIGHTS and (folder / "tokenizer" / "vocab.json").read_bytes() == VOCAB
    assert "sha256 as released" in text and "vocab.json: 24 bytes" in text
    asked = len(hub.log)
    assert "already there" in download(hub, folder)
    assert len(hub.log) == asked  # a second time needs no network


def test_download_of_the_tokenizer_alone(hub, tmp_path):
    download(hub, tmp_path, tokenizer_only=True)
    assert listing(tmp_path) == sorted(WHOLE[1:])
    assert not any(NAME in path for _, path, _ in hub.log)


def test_download_of_a_revision(hub, tmp_path):
    path = f"/{files.REPOSITORY}/resolve/{{}}/{NAME}"
    hub.files[path.format("refs%2Fpr%2F1")] = hub.files.pop(path.format("main"))
    download(hub, tmp_path, revision="refs/pr/1")
    assert (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_broken_connection_is_taken_up_again(hub, tmp_path):
    hub.breaks = [(1_000_000, "close"), (500_000, "close")]
    download(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS
    assert hub.gets(NAME)[0] is None and len(hub.gets(NAME)) == 3
    assert all(wanted.startswith("bytes=") for wanted in hub.gets(NAME)[1:])


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.breaks = [(1_000_000, "reset")]
    message = refused(download, hub, tmp_path)
    assert "run the same command again, " in message and "are kept" in message
    assert not (tmp_path / NAME).exists()
    kept = (tmp_path / f".{NAME}.partial").stat().st_size
    assert 0 < kept <= 1_000_000
    download(hub, tmp_path)
    assert hub.gets(NAME) == [None, f"bytes={kept}-"]
    assert listing(tmp_path) == sorted(WHOLE) and (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_killed_download_goes_on_where_it_stopped(hub, tmp_path):
    """Killed outright, in a process of its own: the next one asks for the rest alone."""
    hub.breaks = [(2_000_000, "hang")]
    code = (
        f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}\n"
        f"from emilie_min.checkpoint import files; files.download({str(tmp_path)!r}, endpoint={hub.url!r})"
    )
    root = str(Path(files.__file__).parents[2])
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
    download(hub, tmp_path)
    assert hub.gets(NAME) == [None, f"bytes={kept}-"] and (tmp_path / NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("kept", [b"", WEIGHTS[:1000], WEIGHTS, WEIGHTS + b"more"])
def test_what_an_earlier_download_left(hub, tmp_path, kept):
    (tmp_path / f".{NAME}.partial").write_bytes(kept)
    download(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS
    assert hub.gets(NAME) == {1000: ["bytes=1000-"], len(WEIGHTS): []}.get(len(kept), [None])


def test_a_server_that_sends_no_parts(hub, tmp_path):
    hub.ranges = False
    (tmp_path / f".{NAME}.partial").write_bytes(b"x" * 1000)
    download(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_wrong_file_is_not_installed(hub, tmp_path):
    hub.files[f"/{files.REPOSITORY}/resolve/main/{NAME}"] = WEIGHTS[:-1] + b"!"
    message = refused(download, hub, tmp_path)
    assert "was deleted" in message and SHA256 in message
    assert listing(tmp_path) == sorted(WHOLE[1:])
    (tmp_path / f".{NAME}.partial").write_bytes(b"y" * len(WEIGHTS))  # a partial file of something else
    hub.files = dict(FILES)
    refused(download, hub, tmp_path)
    download(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS


def test_a_wrong_file_that_was_there_is_moved_aside(hub, tmp_path):
    (tmp_path / NAME).write_bytes(b"mine")
    assert "moved to" in download(hub, tmp_path)
    assert (tmp_path / NAME).read_bytes() == WEIGHTS
    assert (tmp_path / f"{NAME}.wrong").read_bytes() == b"mine"


def test_without_the_released_hash_nothing_else_passes(hub, tmp_path):
    released = next(digest for digest, name in reading.RELEASED.items() if name == NAME)
    assert released in refused(files.download, tmp_path, endpoint=hub.url)


def test_files_that_are_not_there(hub, tmp_path):
    assert f"has no {NAME} at revision nothing" in refused(download, hub, tmp_path, revision="nothing")
    del hub.files[f"/{files.CLIP}/resolve/main/merges.txt"]
    message = refused(download, hub, tmp_path / "b", error=TokenizerError)
    assert "has no merges.txt" in message


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_server_that_will_not(hub, tmp_path, status):
    hub.status[f"/{files.REPOSITORY}/resolve/main/{NAME}"] = status
    assert f"the server answered {status}" in refused(download, hub, tmp_path)


def test_no_network(hub, tmp_path, monkeypatch):
    hub.shutdown()
    hub.server_close()
    assert "online?" in refused(download, hub, tmp_path, error=TokenizerError)
    assert "online?" in refused(files.download, tmp_path, endpoint="nonsense", error=TokenizerError)
    assert listing(tmp_path) == []


def test_offline_mode(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline" in refused(download, hub, tmp_path, error=TokenizerError)
    assert not hub.log


def test_download_to_a_disk_without_room(hub, tmp_path, monkeypatch):
    download(hub, tmp_path, tokenizer_only=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    message = refused(download, hub, tmp_path)
    assert "the disk is full" in message and "3.00 MB are needed" in message
    assert not hub.gets(NAME)


def test_download_to_a_disk_that_fills_up(hub, tmp_path, monkeypatch):
    download(hub, tmp_path, tokenizer_only=True)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refused(download, hub, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_download_over_a_folder(hub, tmp_path):
    (tmp_path / NAME).mkdir()
    assert "Is a directory" in refused(download, hub, tmp_path)


def test_an_old_partial_tokenizer_is_not_continued(hub, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / ".merges.txt.partial").write_bytes(b"junk")
    download(hub, tmp_path, tokenizer_only=True)
    assert (tmp_path / "tokenizer" / "merges.txt").read_bytes().startswith(b"#version")


def test_download_to_a_place_that_is_no_folder(hub, tmp_path):
    (tmp_path / "weights").write_text("a file")
    assert "cannot be written" in refused(download, hub, tmp_path / "weights", error=TokenizerError)


def test_importing_the_module_is_cheap():
    """The command line imports it to show its help."""
    heavy = {"torch", "transformers", "huggingface_hub"}
    code = f"import emilie_min.checkpoint.files, sys; print({heavy} & sys.modules.keys())"
    root = Path(files.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "set()\n"
