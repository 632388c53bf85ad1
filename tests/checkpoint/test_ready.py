"""`emilie download` from nothing to weights that load, against a hub on this machine, each stage taken up again."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pseudo import DATA
from safetensors import safe_open
from test_convert import refused, small_safetensors  # noqa: F401  # a fixture
from test_download import FILES, NAME, hub, listing  # noqa: F401  # a fixture

from emilie_min.app import cli
from emilie_min.checkpoint import convert, download, ready
from emilie_min.errors import CheckpointError, TokenizerError

pytestmark = pytest.mark.filterwarnings("ignore:.*two UNets")  # stand-ins, which no average made alike
SMALL = DATA / "small.yaml"
DONE = [ready.READY, "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"]
PATH = f"/{download.REPOSITORY}/resolve/main/{NAME}"


@pytest.fixture
def weights(hub, small_safetensors):  # noqa: F811
    """The small model of the reference data in the place of the released file."""
    hub.files[PATH] = small_safetensors.read_bytes()
    return hub.files[PATH]


@pytest.fixture
def make(hub, weights, tmp_path):  # noqa: F811
    """`ready` on that hub; the lines that it told."""

    def make(**more):
        told: list[str] = []
        digest = hashlib.sha256(weights).hexdigest()
        ready.ready(
            tmp_path, tell=told.append, **{"endpoint": hub.url, "config": SMALL, "expected_sha256": digest} | more
        )
        return "\n".join(told)

    return make


def notes(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_from_nothing(make, hub, weights, tmp_path):  # noqa: F811
    told = make()
    assert listing(tmp_path) == sorted(DONE)  # the large file is gone
    assert notes(tmp_path / ready.READY)["sha256"] == hashlib.sha256(weights).hexdigest()
    plan, *stages = told.splitlines()
    assert "on the disk, of which 2.14GB stay" in plan and "of memory" in plan
    assert [word in told for word in ("sha256 as released", "converting", "in float16", "removed")] == [True] * 4
    asked = len(hub.log)
    assert "already there" in make() and len(hub.log) == asked and listing(tmp_path) == sorted(DONE)


def test_the_released_file_stays_if_asked(make, weights, tmp_path):
    make(keep=True)
    assert listing(tmp_path) == sorted([*DONE, NAME]) and (tmp_path / NAME).read_bytes() == weights
    assert "removed" in make()  # and goes when asked otherwise


def killed_after(monkeypatch, module, name):
    real = getattr(module, name)

    def dies(*args, **more):
        real(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, dies)


@pytest.mark.parametrize("stage", ["the download", "the conversion", "writing"])
def test_each_stage_is_taken_up_where_it_stopped(stage, make, hub, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        if stage == "the download":
            killed_after(patch, ready, "download")
        elif stage == "the conversion":
            killed_after(patch, convert, "convert")
        else:
            patch.setattr(convert.writing, "write_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make()
    assert (tmp_path / ready.READY).exists() == (stage == "the conversion")
    asked = len(hub.log)
    assert "removed" in make() and len(hub.log) == asked  # nothing is fetched again
    assert listing(tmp_path) == sorted(DONE)


def test_a_machine_without_a_network_goes_on_from_copied_files(make, hub, weights, tmp_path):  # noqa: F811
    message = refused(make, endpoint="http://127.0.0.1:9", error=TokenizerError)
    for word in ("HTTPS_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE", f"copy {NAME} to", "vocab.json and merges.txt"):
        assert word in message
    (tmp_path / NAME).write_bytes(weights)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / name).write_bytes(FILES[f"/{download.CLIP}/resolve/main/{name}"])
    assert "removed" in make(endpoint="http://127.0.0.1:9") and not hub.log
    assert listing(tmp_path) == sorted(n for n in DONE if "config" not in n)


def test_the_other_released_file_will_do(make, hub, small_ckpt, tmp_path, monkeypatch):  # noqa: F811
    name = "instruct-pix2pix-00-22000.ckpt"
    (tmp_path / name).write_bytes(small_ckpt.read_bytes())
    monkeypatch.setitem(download.RELEASED, hashlib.sha256(small_ckpt.read_bytes()).hexdigest(), name)
    make()
    assert not hub.gets(NAME) and listing(tmp_path) == sorted(DONE)


def test_what_was_converted_by_hand_stays(make, hub, small_safetensors, tmp_path):  # noqa: F811
    convert.convert(small_safetensors, tmp_path / ready.READY, config=SMALL)
    (tmp_path / NAME).write_bytes(b"of somebody else")
    assert "already there" in make() and not hub.gets(NAME)
    assert (tmp_path / NAME).read_bytes() == b"of somebody else"
    (tmp_path / ready.READY).write_bytes(b"half")
    refused(make)


def test_a_disk_without_room_is_told_before_anything_is_fetched(make, hub, tmp_path, monkeypatch):  # noqa: F811
    usage = ready.shutil._ntuple_diskusage(10**11, 10**11, 9 * 10**9)
    monkeypatch.setattr(ready.shutil, "disk_usage", lambda _: usage)
    assert "needs 9.84GB for the download and its conversion, and the disk has 9.00GB" in refused(make)
    assert not hub.log


def test_memory_that_is_short_is_told(make, tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "available_memory", lambda: 10**9)
    assert "1.00GB are free: close other programs" in make()


def test_a_folder_that_cannot_be_made(make, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(ready.ready, tmp_path / "file" / "weights", error=CheckpointError)


def test_a_proxy_and_a_mirror_as_a_user_sets_them(hub, tmp_path):  # noqa: F811
    """A mirror by a name that only the proxy knows: what the sentences say works."""
    mirror = "http://mirror.invalid"
    hub.files |= {mirror + path: data for path, data in FILES.items()}
    env = {k: v for k, v in os.environ.items() if k.lower() not in ("no_proxy", "all_proxy")}
    env |= {"HTTP_PROXY": hub.url, "http_proxy": hub.url, "HF_ENDPOINT": mirror, "HF_HUB_OFFLINE": "0"}
    code = f"from emilie_min.app import cli; cli.main(['download', '--tokenizer', '--out', {str(tmp_path)!r}])"
    root = Path(cli.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and listing(tmp_path) == sorted(DONE[1:]), done.stderr
    assert all(path.startswith(mirror) for _, path, _ in hub.log)
