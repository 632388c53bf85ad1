"""Weight files: every layout that is around is read, all else is refused in a line, and nothing in one is run."""

import argparse
import collections
import json
import logging
import os
import pathlib
import pickle
import re
import struct
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pseudo import DATA, write_ckpt
from safetensors.torch import save_file

from emilie_min.checkpoint import reading, writing
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.checkpoint.reading import EMA, RAW, TEXT, VAE
from emilie_min.config import load_config
from emilie_min.errors import CheckpointError

COUNTERS = ("model_ema.decay", "model_ema.num_updates")


def refusal(path):
    """What is said of a file that cannot be used: one line."""
    with pytest.raises(CheckpointError) as caught:
        reading.index(path)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message
    return message


def read(path):
    """All tensors of a file as it holds them."""
    entries = reading.index(path)
    reader = reading.Reader(path, entries)
    return {key: reader.get(key, "cpu", None) for key in entries}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def without(state, *prefixes):
    return {key: t for key, t in state.items() if not key.startswith(prefixes)}


def load(config, path, dtype=torch.float32):
    networks = meta_networks(config)
    return networks, reading.load(networks, path, "cpu", dtype)


def parameters(networks):
    return {f"{part}.{name}": p for part, network in networks.items() for name, p in network.state_dict().items()}


def rezip(source, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The same zip file by another writer; `change` gives each record's bytes, None leaves it out."""
    with zipfile.ZipFile(source) as z, zipfile.ZipFile(target, "w", compression) as out:
        for name in z.namelist():
            data = change(name, z.read(name))
            if data is not None:
                out.writestr(name, data)
    return target


def with_opcodes(target, opcodes):
    """A file of torch.save's, {"a": a tensor}, with pickle opcodes put in while that dict is on the stack."""
    torch.save({"a": torch.zeros(2)}, target.with_suffix(".0"))
    change = lambda name, data: data[:-1] + opcodes + b"." if name.endswith("data.pkl") else data  # noqa: E731
    return rezip(target.with_suffix(".0"), target, change)


@pytest.fixture(scope="module")
def tensors():
    """Strides, offsets, dtypes and shapes of all kinds, some in one storage."""
    x = torch.arange(24.0).view(4, 6)
    return {
        "whole": x,
        "part": x[1:3, 2:5],
        "turned": x.t(),
        "spread": torch.tensor([2.5]).expand(3),
        "number": torch.tensor(7, dtype=torch.int64),
        "nothing": torch.empty(0, 3),
        "half": torch.arange(5).half(),
        "brain": torch.arange(5).bfloat16(),
        "flag": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "long" * 20: torch.arange(1000.0),
    }


# what is read


def test_both_formats_read_every_tensor(tensors, tmp_path):
    torch.save(tensors, tmp_path / "flat.ckpt")
    write_ckpt(tmp_path / "trainer.ckpt", tensors)
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    for name in ("flat.ckpt", "trainer.ckpt", "a.safetensors"):
        out = read(tmp_path / name)
        assert same(out, {key: t.detach() for key, t in tensors.items()})
        assert all(t.is_contiguous() for t in out.values())


def test_the_name_says_nothing_of_the_format(tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.safetensors")
    save_file({"whole": tensors["whole"]}, tmp_path / "b.ckpt")
    assert read(tmp_path / "a.safetensors").keys() == tensors.keys()
    assert read(tmp_path / "b.ckpt").keys() == {"whole"}


@pytest.mark.parametrize("device", ["cuda:0", "cuda:7", "mps", "xla:0"])
def test_tensors_of_a_device_that_is_not_here(tensors, tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: device)
    torch.save(tensors, tmp_path / "a.ckpt")
    assert same(read(tmp_path / "a.ckpt"), {key: t.detach() for key, t in tensors.items()})


def test_unaligned_tensors_and_small_floats(tmp_path):
    header = json.dumps({
        "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "z": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [9, 11]},
    }).encode()  # fmt: skip
    data = b"\x05" + np.array([1.5, -2], "<f4").tobytes() + b"\x38\x40"
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    out = read(tmp_path / "a.safetensors")
    assert out["x"].tolist() == [5] and out["y"].tolist() == [1.5, -2] and out["z"].float().tolist() == [1, 2]


def test_a_read_tensor_does_not_hold_the_file(tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.ckpt")
    out = read(tmp_path / "a.ckpt")["whole"]
    (tmp_path / "a.ckpt").write_bytes(b"")
    assert torch.equal(out, tensors["whole"])


def test_what_is_mapped_is_let_go(tmp_path, monkeypatch):
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    reader = reading.Reader(tmp_path / "a.safetensors", reading.index(tmp_path / "a.safetensors"))
    reader.get("x", "cpu", None)
    assert reader.files and reading.HELD <= 2**28
    monkeypatch.setattr(reading, "HELD", reader.held)
    reader.get("x", "cpu", None)
    assert not reader.files


def test_a_trainers_file(tmp_path, monkeypatch):
    """Classes of packages that are not installed, as keys, as instances with state; NumPy and config values."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    ran = []

    class ModelCheckpoint:
        def __init__(self, score):
            self.score = score

        def __setstate__(self, state):
            ran.append(state)

    class Monitor(dict):
        pass

    for cls in (ModelCheckpoint, Monitor):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    records = {
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "best_k": np.float64(0.25)}},
        "callback": ModelCheckpoint(np.float32(3)),
        "listed": [(ModelCheckpoint, {"deep": ModelCheckpoint(None)})],
        "monitor": Monitor(),
        "lr": np.arange(3.0),
        "hyper_parameters": OmegaConf.create({"model": {"target": "ldm.models.X", "sizes": [1, 2]}}),
        "args": argparse.Namespace(lr=1e-4, folder=pathlib.Path("logs")),
        "counts": collections.defaultdict(list),
        "seen": frozenset([1, 2]),
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(4)}}}],
    }
    write_ckpt(tmp_path / "a.ckpt", {"a": torch.ones(3)}, **records)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read(tmp_path / "a.ckpt")["a"], torch.ones(3))
    assert not ran and "pytorch_lightning" not in sys.modules


# which tensors a model takes


def test_the_average_is_loaded_and_nothing_stays_on_meta(networks, small_state, small_config, small_ckpt):
    fresh, report = load(small_config, small_ckpt)
    assert report.family == "EMA"
    name = "input_blocks.1.0.in_layers.2.weight"
    ours = fresh["unet"].state_dict()[name]
    assert torch.equal(ours, small_state[(EMA + "diffusion_model." + name).replace(".", "").replace("ema", "ema.", 1)])
    assert not torch.equal(ours, small_state[RAW + name])
    for network in fresh.values():
        for tensor in (*network.parameters(), *network.buffers()):
            assert not tensor.is_meta and not tensor.requires_grad
    assert same(parameters(fresh), parameters(networks))
    buffers = dict(fresh["text"].named_buffers())
    (positions,) = buffers.values()
    assert positions.tolist() == [list(range(77))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_load_is_the_cast_of_a_plain_one(networks, small_config, small_ckpt, dtype):
    cast, _ = load(small_config, small_ckpt, dtype)
    assert same(parameters(cast), {name: p.to(dtype) for name, p in parameters(networks).items()})


def no_buffers(state):
    return {key: t for key, t in state.items() if "." in key and not key.endswith("position_ids")}


PRUNED = {  # what community copies keep -> the family that is then used
    "averages alone": (lambda s: without(s, RAW), "EMA"),
    "averages without their counters": (lambda s: without(s, RAW, *COUNTERS), "EMA"),
    "raw alone": (lambda s: without(s, EMA), "raw"),
    "raw with the averages' counters": (lambda s: without(s, EMA + "diffusion_model"), "raw"),
    "raw in half precision": (lambda s: {k: t.half() for k, t in no_buffers(without(s, EMA)).items()}, "raw"),
    "raw without buffers": (lambda s: no_buffers(without(s, EMA)), "raw"),
    "raw with a training loss": (lambda s: {**without(s, EMA), VAE + "loss.logvar": torch.zeros(())}, "raw"),
    "text without its inner name": (lambda s: {k.replace("text_model.", ""): t for k, t in s.items()}, "EMA"),
}


@pytest.mark.parametrize("kind", PRUNED)
def test_pruned_copies(small_state, small_config, networks, tmp_path, kind):
    prune, family = PRUNED[kind]
    save_file(prune(small_state), tmp_path / "a.safetensors")
    loaded, report = load(small_config, tmp_path / "a.safetensors")
    assert report.family == family
    dtype = torch.float16 if "half" in kind else torch.float32
    expected = parameters(networks)
    if family == "raw":
        expected = {
            **expected,
            **{f"unet.{k.removeprefix(RAW)}": t for k, t in small_state.items() if k.startswith(RAW)},
        }
    assert same(parameters(loaded), {name: p.to(dtype).float() for name, p in expected.items()})


def test_a_dtype_of_none_keeps_the_files(small_state, small_config, tmp_path):
    save_file({k: t.bfloat16() if k.startswith(VAE) else t for k, t in small_state.items()}, tmp_path / "a.safetensors")
    loaded, _ = load(small_config, tmp_path / "a.safetensors", None)
    assert {part: next(net.parameters()).dtype for part, net in loaded.items()} == {
        "unet": torch.float32,
        "vae": torch.bfloat16,
        "text": torch.float32,
    }


@pytest.fixture(scope="module")
def four_channels(tmp_path_factory):
    """The small model's config with Stable Diffusion's four input channels."""
    path = tmp_path_factory.mktemp("config") / "four.yaml"
    path.write_text((DATA / "small.yaml").read_text().replace("in_channels: 8", "in_channels: 4"))
    return load_config(path)


def test_stable_diffusion(small_state, small_config, four_channels, tmp_path):
    first = [RAW + "input_blocks.0.0.weight", EMA + "diffusion_modelinput_blocks00weight"]
    save_file({**small_state, **{k: small_state[k][:, :4].clone() for k in first}}, tmp_path / "a.safetensors")
    loaded, _ = load(four_channels, tmp_path / "a.safetensors")
    assert loaded["unet"](torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 77, 64)).shape == (1, 4, 8, 8)
    with pytest.raises(CheckpointError, match="is 32x4x3x3 and should be 32x8x3x3"):
        load(small_config, tmp_path / "a.safetensors")


def test_missing_misshapen_and_unknown_tensors_are_named(small_state, small_config, tmp_path):
    state = dict(small_state)
    gone = [key for key in state if key.startswith(VAE + "decoder.up.0")]
    for key in gone:
        del state[key]
    key = TEXT + "text_model.final_layer_norm.bias"
    state[key] = state[key][:-1].clone()
    whole = TEXT + "text_model.final_layer_norm.weight"
    state[whole] = state[whole].long()
    state["lora_unet.alpha"] = torch.zeros(1)
    save_file(state, tmp_path / "a.safetensors")
    networks = meta_networks(small_config)
    with pytest.raises(CheckpointError) as caught:
        reading.load(networks, tmp_path / "a.safetensors", "cpu", None)
    message = str(caught.value)
    assert f"{len(gone)} missing ({sorted(gone)[0]}, " in message and "..." in message
    assert f"2 misshapen ({key} is 63 and should be 64, {whole} holds torch.int64" in message
    assert "1 unknown (lora_unet.alpha)" in message
    assert message.isprintable()
    assert all(p.is_meta for network in networks.values() for p in network.parameters())  # nothing was half loaded


def test_networks_that_no_file_can_fill(small_config, small_ckpt):
    one, other = (torch.nn.ModuleDict({"bc": torch.nn.Identity()}) for _ in range(2))
    one.bc.weight = other.weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(CheckpointError, match="share a name"):
        reading.key_map({"unet": torch.nn.ModuleDict({"a": one, "abc": other})}, [EMA + "diffusion_modelx"])
    networks = meta_networks(small_config)
    networks["text"].register_buffer("table", torch.ones(1, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match="a buffer table that this package does not know"):
        reading.load(networks, small_ckpt, "cpu", None)


def test_a_partial_average_is_not_filled_up_with_raw_weights(small_state, small_config, tmp_path):
    key = EMA + "diffusion_modelout2bias"
    save_file(without(small_state, key), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 missing \({re.escape(key)}\)"):
        load(small_config, tmp_path / "a.safetensors")


def test_diffusers_layout_is_recognised(tmp_path):
    for key in ("down_blocks.0.attentions.0.norm.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"):
        save_file({key: torch.zeros(3)}, tmp_path / "a.safetensors")
        entries = reading.index(tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="diffusers"):
            reading.refuse(tmp_path / "a.safetensors", entries)
    assert "no key starts with" in reading.explain_unknown({})


# what is refused


def call(module, name, argument):
    """Pickle opcodes that call module.name(argument)."""
    return f"c{module}\n{name}\n".encode() + text(argument) + b"\x85R"


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def value(opcodes):
    """What adds {"x": ...} to the dict on the stack."""
    return text("x") + opcodes + b"s"


def attacks(marker):
    """(name, opcodes with a dict on the stack) of attempts to make a reader create a file."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    yield "posix.system", value(call("posix", "system", shell))
    yield "os.system", value(call("os", "system", shell))
    yield "nt.system", value(call("nt", "system", shell))
    yield "eval", value(call("builtins", "eval", code))
    yield "exec", value(call("builtins", "exec", code))
    yield "Python 2's eval", value(call("__builtin__", "eval", code))
    yield "Python 2's commands", value(call("commands", "getoutput", shell))
    yield "subprocess", value(call("subprocess", "getoutput", shell))
    yield "import", value(call("importlib", "import_module", "this"))
    yield "getattr", value(b"cbuiltins\ngetattr\ncos\n__dict__\n" + text("system") + b"\x86R")
    yield "a callback, called", value(call("pytorch_lightning.callbacks", "ModelCheckpoint", shell))
    yield "an attribute of a harmless name", value(call("numpy", "dtype.__reduce__", shell))
    yield "torch.load", value(call("torch", "load", str(marker)))
    yield "nested", value(b"](K\x01}" + value(call("posix", "system", shell)) + b"e")
    yield "as a key", call("builtins", "eval", code) + b"K\x01s"
    yield "as a state", value(b"ca\nB\n)\x81" + call("posix", "system", shell) + b"b")
    rebuild = b"ctorch._tensor\n_rebuild_from_type_v2\n("
    yield (
        "through a tensor's rebuilding",
        value(rebuild + b"csubprocess\ngetoutput\nca\nB\n" + text(shell) + b"\x85NtR"),
    )
    yield "oldest opcodes", value(b"(" + text(shell) + b"iposix\nsystem\n")
    yield "old opcodes", value(b"(cposix\nsystem\n" + text(shell) + b"o")
    yield "new opcodes", value(b"\x8c\x05posix\x8c\x06system\x93" + text(shell) + b"\x85R")


@pytest.fixture
def marker(tmp_path):
    yield (path := tmp_path / "ran")
    assert not path.exists()


@pytest.mark.parametrize("name", [name for name, _ in attacks("")])
def test_nothing_in_a_pickle_is_run(marker, tmp_path, name):
    path = with_opcodes(tmp_path / "a.ckpt", dict(attacks(marker))[name])
    assert "refused" in refusal(path) and "run" in refusal(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"data/0") + 1])  # broken off
    assert "cut short" in refusal(path)
    path.write_bytes(b"\x80\x02}" + dict(attacks(marker))[name] + b".")
    assert "bare pickle" in refusal(path)


def test_what_pytorch_would_call_takes_no_memory(tmp_path):
    opcodes = value(b"c__builtin__\nbytearray\n" + b"\x8a\x05\x00\xe4\x0bT\x02" + b"\x85R")  # 10 GB
    assert "bytearray called" in refusal(with_opcodes(tmp_path / "a.ckpt", opcodes))
    numbers = torch.frombuffer(bytearray(b"c__builtin__\nbytearray\n"), dtype=torch.uint8)
    torch.save({"x": numbers}, tmp_path / "b.ckpt")
    assert torch.equal(read(tmp_path / "b.ckpt")["x"], numbers)  # which may say that


def test_a_tensor_beyond_all_memory_is_said_in_a_line(tmp_path):
    logged, handler, log = [], logging.Handler(), logging.getLogger("torch._subclasses.fake_tensor")
    handler.emit = logged.append
    log.addHandler(handler)
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(3, 5)}, path)
    most = b"J\xff\xff\xff\x7f"
    assert "refused" in refusal(
        rezip(path, tmp_path / "b", lambda n, d: d.replace(b"K\x03K\x05\x86", 3 * most + b"\x87"))
    )
    log.removeHandler(handler)
    assert not logged and not log.disabled


def test_an_object_of_a_dangerous_class_is_inert(marker, tmp_path):
    opcodes = value(b"csubprocess\nPopen\n" + text(f"touch {marker}") + b"\x85\x81}" + value(b"K\x01") + b"b")
    assert read(with_opcodes(tmp_path / "a.ckpt", opcodes)).keys() == {"a"}


def test_the_attacks_are_real(tmp_path):
    """A reader that trusts runs them."""
    pickle.loads(b"\x80\x02}" + dict(attacks(tmp_path / "ran"))["exec"] + b".")
    assert (tmp_path / "ran").exists()


def test_a_pickle_that_is_no_dict(tmp_path):
    for obj in (
        [torch.ones(2)],
        torch.ones(2),
        {"state_dict": [torch.ones(2)]},
        {1: torch.ones(2)},
        {},
        torch.nn.Linear(1, 1),
    ):
        torch.save(obj, tmp_path / "a.ckpt")
        assert "holds no state_dict of tensors" in refusal(tmp_path / "a.ckpt")


def test_tensors_without_plain_bytes(tmp_path):
    for tensor, why in ((torch.eye(2).to_sparse(), ""), (torch.empty(2, device="meta"), "a has no record of its own")):
        torch.save({"a": tensor}, tmp_path / "a.ckpt")
        assert "refused" in (said := refusal(tmp_path / "a.ckpt")) and why in said


def test_zip_files_by_other_tools(tensors, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(tensors, path)
    plain = {key: t.detach() for key, t in tensors.items()}
    assert same(read(rezip(path, tmp_path / "b", lambda n, d: None if "format_version" in n else d)), plain)
    assert "compressed" in refusal(rezip(path, tmp_path / "c", compression=zipfile.ZIP_DEFLATED))
    assert "big-endian" in refusal(rezip(path, tmp_path / "d", lambda n, d: b"big" if "byteorder" in n else d))

    def short(name, data):
        return None if "format_version" in name else data[:8] if name.endswith("data/0") else data

    assert "whole reaches beyond its record" in refusal(rezip(path, tmp_path / "e", short))
    assert "refused" in refusal(rezip(path, tmp_path / "f", lambda n, d: None if n.endswith("data/1") else d))
    (tmp_path / "note.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "g", "w") as z:
        z.write(tmp_path / "note.txt", "note.txt")
    assert "refused" in refusal(tmp_path / "g")
    with zipfile.ZipFile(rezip(path, tmp_path / "h"), "a") as z:
        z.writestr("a/constants.pkl", b"")
    assert "torchscript" in refusal(tmp_path / "h")
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02")  # the last of the table of contents, whose record would then take 4 GB
    path.write_bytes(whole[: entry + 24] + b"\xfe\xff\xff\xff" + whole[entry + 28 :])
    assert "compressed" in refusal(path)
    path.write_bytes(whole[: entry + 10] + b"\x08" + whole[entry + 11 :])  # or it would be deflated to the same length
    assert "compressed" in refusal(path)


def test_records_in_another_order_are_not_taken_for_each_other(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({name: torch.full((4,), float(i)) for i, name in enumerate("abc")}, path)
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b"/data/1", b"/data/X").replace(b"/data/2", b"/data/1").replace(b"/data/X", b"/data/2")
    )
    assert torch.load(path)["b"].tolist() == [2.0] * 4  # by its name
    assert "in another order than PyTorch's" in refusal(path)


def test_what_pytorch_warns_of_is_not_told(tmp_path):
    made = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    torch.save({"a": made}, tmp_path / "a.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "b.ckpt")
    rezip(tmp_path / "b.ckpt", tmp_path / "c", lambda n, d: d.replace(b"\x80\x02", b"\x80\x63", 1))  # protocol 99
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "refused" in refusal(tmp_path / "a.ckpt")
        assert read(tmp_path / "c").keys() == {"a"}


def test_formats_that_are_not_read(tensors, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(path)
    torch.save(tensors, path, pickle_protocol=4)
    assert "refused" in refusal(path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "(0 bytes) is neither"),
        (b"x", "(1 bytes) is neither"),
        (os.urandom(2000).replace(b"{", b"x"), "(2000 bytes) is neither"),
        (bytes(2000), "(2000 bytes) is neither"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "git lfs pull"),
        (b"PK\x03\x04" + bytes(500), "cut short"),
        (b"PK\x05\x06" + bytes(18), "refused"),
        (b"PK", "cut short"),
        (b"\x80\x02]q\x00.", "bare pickle"),
        ((2**60).to_bytes(8, "little") + b"{", "no .safetensors"),
        ((99_000_000).to_bytes(8, "little") + b"{", "cut short"),
        ((9).to_bytes(8, "little") + b'{"a": nul', "cut short"),
        ((200_005).to_bytes(8, "little") + b'{"a":' + b"[" * 200_000, "cut short"),
        ((7).to_bytes(8, "little") + b'{"\xff":1}', "cut short"),
    ],
)
def test_garbage(tmp_path, content, says):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert says in refusal(path)


@pytest.mark.parametrize(
    "record",
    [
        3,
        {},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]},  # a dtype that no weights have
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2] + [1] * 100, "data_offsets": [0, 8]},
    ],
)
def test_impossible_headers(tmp_path, record):
    header = json.dumps({"a": record}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refusal(tmp_path / "a.safetensors")


def test_names_that_would_paint_the_terminal(tmp_path):
    for key in ("a\x1b[2Jb", "a\nb", "x" * 1000):
        save_file({key: torch.ones(1)}, tmp_path / "a.safetensors")
        assert "not a weight file" in refusal(tmp_path / "a.safetensors")
    refusal(with_opcodes(tmp_path / "b.ckpt", value(call("a\x1b[2J", "b\x07", "c"))))


def test_not_a_file(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    assert "emilie download" in refusal(tmp_path / "nothing.ckpt")
    assert "emilie download" in refusal(tmp_path / "no folder" / "nothing.ckpt")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"x")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    message = refusal(path)
    monkeypatch.undo()
    assert "cannot be read: Permission denied" in message
    save_file({"a": torch.ones(1)}, path)
    monkeypatch.setattr(reading, "safe_open", denied)  # what the library reports of a disk, too
    assert "cannot be read: Permission denied" in refusal(path)


# what breaks off


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.5, 0.97])
def test_a_ckpt_that_breaks_off(small_ckpt, tmp_path, share):
    size = small_ckpt.stat().st_size
    with open(small_ckpt, "rb") as f:
        (tmp_path / "a.ckpt").write_bytes(f.read(int(size * share)))
    assert "cut short" in refusal(tmp_path / "a.ckpt")


@pytest.mark.parametrize("cut", [1, 10, 30, 100])
def test_a_ckpt_without_its_end(tensors, tmp_path, cut):
    torch.save(tensors, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[:-cut])
    assert "cut short" in refusal(tmp_path / "a.ckpt")


def test_a_ckpt_that_promises_more_than_it_has(tmp_path):
    """Its table of contents gives a record, and its pickle a tensor, more bytes than the file has."""
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.0")
    short = rezip(tmp_path / "a.0", tmp_path / "a.1", lambda n, d: d[:8] if n.endswith("data/0") else d)
    data = bytearray(short.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))  # in the table of contents
    data[entry + 20 : entry + 28] = struct.pack("<2L", 4 * 10**6, 4 * 10**6)
    (tmp_path / "a.ckpt").write_bytes(data)
    assert "refused" in refusal(tmp_path / "a.ckpt")


def test_a_ckpt_whose_middle_is_gone(tensors, tmp_path):
    """Its table of contents is there, and promises more than the file has."""
    torch.save(tensors, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    for cut in (8, 64, 2000):
        (tmp_path / "a.ckpt").write_bytes(whole[:3000] + whole[3000 + cut :])
        refusal(tmp_path / "a.ckpt")


def test_truncated_safetensors(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path)
    whole = path.read_bytes()
    for cut in (9, 20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "cut short" in refusal(path)
    for cut in range(1, 9):
        path.write_bytes(whole[:cut])
        assert "neither" in refusal(path)


# writing


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    writing.write_tensors({"a": torch.ones(2)}, path, {"made": "once"})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        writing.write_tensors({"a": torch.zeros(200)}, path, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert reading.metadata(path) == {"made": "once"}
