"""The released model's full size on a small machine: what loading and converting it take at most. Give --slow.

The files are hollow: headers and pickles are real, the numbers are a hole in the disk, so 7.7 GB take no room.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pseudo import manifest
from test_convert import hollow

from emilie_min.checkpoint import reading
from emilie_min.errors import CheckpointError

pytestmark = pytest.mark.slow
PRELUDE = """
import json, resource, sys
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
import torch, emilie_min
from emilie_min import loading
from emilie_min.checkpoint.convert import convert
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.config import load_config
torch.set_num_threads(1)
meta_networks(load_config("ip2p"))
before = peak()
"""


def measured(code):
    """What a process of its own prints: bytes at its peak, before and after `code`, and what `code` calls `result`."""
    code = f"{PRELUDE}{code}\nprint(json.dumps([before, peak(), result]))"
    root = Path(reading.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    before, after, result = json.loads(done.stdout)
    print(f"\n  before {before / 1e9:.2f} GB, peak {after / 1e9:.2f} GB, result {result}")
    return before, after, result


def hollow_ckpt(path):
    """The released layout as torch.save writes it; see `hollow` for the other format."""
    with torch._subclasses.FakeTensorMode():
        state = {
            key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for key, entry in manifest("manifest")["state_dict"].items()
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"epoch": 3, "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The released layout at full size, in both formats."""
    folder = tmp_path_factory.mktemp("full")
    for path in (hollow_ckpt(folder / "full.ckpt"), hollow(folder / "full.safetensors")):
        assert path.stat().st_size > 7.7e9
    return folder


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_loading(full, kind):
    """At most half as much again as the kept weights, the interpreter and its libraries included."""
    code = (
        f"editor = loading.load({str(full / f'full.{kind}')!r}, device='cpu', dtype='float16')\n"
        "result = sum(p.nbytes for net in (editor.unet, editor.vae, editor.text) for p in net.parameters())"
    )
    before, after, kept = measured(code)
    assert kept == 2 * (859_532_484 + 83_653_863 + 123_060_480)
    assert after <= 1.5 * kept
    assert after - before <= 1.1 * kept


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_converting(full, kind, tmp_path):
    """The result, and no more than a few tensors beside the libraries."""
    target = tmp_path / "half.safetensors"
    code = f"result = convert({str(full / f'full.{kind}')!r}, {str(target)!r})"
    before, after, _ = measured(code)
    assert target.stat().st_size > 2.13e9 and len(reading.index(target)) == 686 + 248 + 196
    target.unlink()
    assert after - before <= 1.1 * 2.13e9


def test_a_full_size_file_that_breaks_off(tmp_path):
    """Beyond 4 GB zip files change their layout."""
    path = hollow_ckpt(tmp_path / "full.ckpt")
    for cut in (7_600_000_000, 5_500_000_000, 4_294_967_296, 1_000_000_000):
        with open(path, "r+b") as f:
            f.truncate(cut)
        with pytest.raises(CheckpointError, match="cut short"):
            reading.index(path)
