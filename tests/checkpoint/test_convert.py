"""`info` and `convert`: what they say and write, and what they do when something is in the way."""

import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
from pseudo import DATA, manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_reading import load, parameters, same, without

from emilie_min.checkpoint import download, reading
from emilie_min.checkpoint.convert import PREFIXES, convert, digests
from emilie_min.checkpoint.info import info
from emilie_min.checkpoint.reading import EMA, RAW
from emilie_min.errors import CheckpointError, ConfigError

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
    text = info(small_ckpt, config=SMALL)
    assert text.splitlines()[0] == str(small_ckpt)
    for line in (
        "  format       torch.save, 90.",
        "  UNet (EMA)    686 tensors,   34.",
        "  UNet (raw)    686 tensors,   34.",
        "  autoencoder   248 tensors,   21.",
        "  text model     37 tensors,    4",
        "  other          14 tensors,   48.0kB, float32, int32",
        f"  model        {SMALL}: complete, every shape fits",
        "  sampling     uses the EMA UNet weights",
    ):
        assert line in text, text
    assert "12 noise schedule" in text and "686 raw UNet weights" in text
    assert "fits no model" not in text and "sha256" not in text


def test_info_without_a_config(small_ckpt, tmp_path):
    assert "does not fit: of a model that no built-in config fits: name its YAML file" in info(small_ckpt)
    text = info(hollow(tmp_path / "released.safetensors"))
    assert "safetensors, 7.70GB, 1831 tensors" in text
    assert "model        ip2p: complete" in text and "UNet (EMA)    686 tensors,   3.44GB, float32" in text


def test_info_of_stable_diffusion(tmp_path):
    def four(state):
        first = [RAW + "input_blocks.0.0.weight"]
        state = without(state, EMA)
        return {**state, **{key: {**state[key], "shape": [320, 4, 3, 3]} for key in first}}

    text = info(hollow(tmp_path / "sd.safetensors", change=four))
    assert "model        sd15: complete" in text and "uses the raw UNet weights" in text
    assert "320x4x3x3 and should be 320x8x3x3" in info(tmp_path / "sd.safetensors", config="ip2p")


def test_info_names_what_is_missing(small_state, tmp_path):
    state = without(small_state, "first_stage_model.decoder.conv_out", EMA)
    state["surprise.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "a.safetensors")
    text = info(tmp_path / "a.safetensors", config=SMALL)
    assert "2 missing (first_stage_model.decoder.conv_out.bias, first_stage_model.decoder.conv_out.weight)" in text
    assert "1 unknown (surprise.weight)" in text and "complete" not in text


def test_info_of_other_files(tmp_path):
    save_file({"down_blocks.0.norm.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert "does not fit: the UNet of diffusers' layout" in info(tmp_path / "a.safetensors")
    (tmp_path / "b.ckpt").write_bytes(b"junk")
    assert "neither" in refused(info, tmp_path / "b.ckpt")
    assert "no weights at" in refused(info, tmp_path / "c.ckpt")
    refused(info, tmp_path / "a.safetensors", config="nonsense", error=ConfigError)


def test_info_hashes(small_safetensors, monkeypatch):
    digest = hashlib.sha256(small_safetensors.read_bytes()).hexdigest()
    text = info(small_safetensors, sha256=True, config=SMALL)
    assert f"sha256       {digest}" in text and "not a released file" in text
    monkeypatch.setitem(download.RELEASED, digest, "some.ckpt")
    assert "the released some.ckpt" in info(small_safetensors, sha256=True, config=SMALL)


def test_info_quotes_no_control_characters(small_state, tmp_path):
    save_file(small_state, tmp_path / "a.safetensors", {"source": "a\x1b[2J\nb" * 100, "format": "pt"})
    text = info(tmp_path / "a.safetensors", config=SMALL)
    assert all(line.isprintable() and len(line) < 300 for line in text.splitlines())


# convert


def umask():
    os.umask(was := os.umask(0))
    return was


@pytest.mark.parametrize("dtype, kind", [("float16", "ckpt"), ("bfloat16", "safetensors"), ("float32", "safetensors")])
def test_convert(small_ckpt, small_safetensors, small_state, small_config, networks, tmp_path, dtype, kind):
    path, torch_dtype = tmp_path / "a.safetensors", getattr(torch, dtype)
    text = convert(small_ckpt if kind == "ckpt" else small_safetensors, path, dtype, SMALL)
    assert "EMA weights" in text and str(path) in text and "\n" not in text
    with safe_open(path, "pt") as f:  # the library's own checks of the header
        notes = {key: value for key, value in f.metadata().items() if not key.startswith("sha256.")}
        assert notes == {"format": "pt", "source": f"small.{kind}", "family": "EMA"}
        assert digests(f.keys(), f.get_tensor) == {part: f.metadata()[f"sha256.{part}"] for part in PREFIXES}
    out = load_file(path)
    assert not any(key.startswith(EMA) for key in out)
    for key, shadowed in manifest("small_manifest")["ema_of"].items():
        assert torch.equal(out.pop(shadowed), small_state[key].to(torch_dtype))
    rest = {k: t for k, t in without(small_state, RAW, EMA).items() if "." in k and not k.endswith("position_ids")}
    assert same(out, {key: t.to(torch_dtype) for key, t in rest.items()})
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    loaded, report = load(small_config, path, torch.float32)
    assert report.family == "raw" and not report.dropped
    assert same(parameters(loaded), {name: p.to(torch_dtype).float() for name, p in parameters(networks).items()})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    told = info(path, config=SMALL)
    assert f"source       small.{kind}" in told and "family       EMA" in told and dtype in told


def test_a_converted_file_converts_to_itself(small_safetensors, tmp_path):
    convert(small_safetensors, tmp_path / "a.safetensors", torch.float16, SMALL)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "float16", SMALL)
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


def test_convert_refuses(small_safetensors, tmp_path, small_state):
    target = tmp_path / "a.safetensors"
    assert "dtype must be one of" in refused(convert, small_safetensors, target, "int8", SMALL)
    assert "name it so, not a.ckpt" in refused(convert, small_safetensors, tmp_path / "a.ckpt", config=SMALL)
    assert "no built-in config fits" in refused(convert, small_safetensors, target)
    assert "misshapen" in refused(convert, small_safetensors, target, config="toy")
    assert "no folder" in refused(convert, small_safetensors, tmp_path / "none" / "a.safetensors", config=SMALL)
    assert "no weights at" in refused(convert, tmp_path / "none.ckpt", target, config=SMALL)
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder" in refused(convert, small_safetensors, tmp_path / "folder.safetensors", config=SMALL)
    (tmp_path / "folder.safetensors").rmdir()
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"mine")
    assert "is there already" in refused(convert, small_safetensors, target, config=SMALL)
    assert "no weights at" in refused(convert, tmp_path / "none.ckpt", target, config=SMALL, overwrite=True)
    assert target.read_bytes() == b"mine"
    convert(small_safetensors, target, config=SMALL, overwrite=True)
    for same_file in (target, tmp_path / "link.safetensors"):
        if same_file != target:
            same_file.symlink_to(target)
        assert "the file that is read" in refused(convert, target, same_file, config=SMALL, overwrite=True)
    assert len(load_file(target)) == 686 + 248 + 36


def test_convert_into_a_folder_that_may_not_be_written(small_safetensors, tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied", "a.safetensors")

    monkeypatch.setattr(os, "replace", denied)
    message = refused(convert, small_safetensors, tmp_path / "a.safetensors", config=SMALL)
    assert "may not write there" in message


def test_convert_on_a_disk_without_room(small_safetensors, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    message = refused(convert, small_safetensors, tmp_path / "a.safetensors", config=SMALL)
    assert "the disk is full" in message and "MB are needed" in message


def test_convert_on_a_disk_that_fills_up(small_safetensors, tmp_path, monkeypatch):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"mine")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refused(convert, small_safetensors, target, config=SMALL, overwrite=True)
    assert target.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_convert_on_a_disk_that_fills_up_within_the_library(small_safetensors, tmp_path):
    """The library has an error of its own for it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        message = refused(convert, small_safetensors, tmp_path / "a.safetensors", config=SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in message and "File too large" in message and not list(tmp_path.iterdir())


def test_an_interrupted_convert_leaves_nothing(small_safetensors, tmp_path, monkeypatch):
    get, calls = reading.Reader.get, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return get(self, *args)

    monkeypatch.setattr(reading.Reader, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(small_safetensors, tmp_path / "a.safetensors", config=SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, says", [(1e6, "try bfloat16"), (float("nan"), "is not finite")])
def test_convert_sees_numbers_that_overflow(small_state, tmp_path, number, says):
    state = without(small_state, EMA)
    key = RAW + "out.2.bias"
    state[key] = state[key].clone().index_fill(0, torch.tensor([1]), number)
    save_file(state, tmp_path / "a.safetensors")
    message = refused(convert, tmp_path / "a.safetensors", tmp_path / "b.safetensors", config=SMALL)
    assert key in message and says in message
    assert not (tmp_path / "b.safetensors").exists()
    if number == 1e6:
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bfloat16", SMALL)
