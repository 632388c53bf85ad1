"""`emilie check`: all is well with the model that ships, and each check fails on what it is there for."""

import copy
import json
from pathlib import Path

import pytest
import torch
from command import run
from safetensors.torch import load_file, save_file

import emilie_min as emilie
from emilie_min import loading
from emilie_min.app import check
from emilie_min.app.check import GREEN, RED, YELLOW, Subject
from emilie_min.checkpoint import convert, download, reading
from emilie_min.faster.fast import FastEditor

SHIPPED = loading.shipped("toy.safetensors")
PARTS = ("unet", "vae", "text")


@pytest.fixture
def subject(shipped) -> Subject:
    """The shipped model's networks, copied, so that they can be broken."""
    parts = {name: copy.deepcopy(getattr(shipped, name)) for name in PARTS}
    return Subject(emilie.Editor(shipped.config, **parts, model="m", family="raw"), SHIPPED, 64)


def found(name: str, subject: Subject) -> check.Finding:
    return check.attempt(lambda: check.CHECKS[name](subject))


def test_whatever_goes_wrong_in_a_check_is_red():
    for wrong, told in ((emilie.EmilieError("no"), "no"), (IndexError("\x1bno"), "failed: IndexError: ?no")):
        assert check.attempt(lambda wrong=wrong: fail(wrong)) == check.Finding(RED, told)


def fail(error: Exception):
    raise error


def test_all_is_well_with_what_ships(capsys):
    code, out, err = run("check", "--weights", SHIPPED, "--device", "cpu", capsys=capsys)
    assert code == 0 and not err
    first = [line.split()[0] for line in out.splitlines()]
    assert first.count("green") == len(check.CHECKS) + 2 and first[-1] == "green:" and YELLOW not in first


def test_as_json(capsys):
    code, out, _ = run("check", "--weights", "random", "--device", "cpu", "--json", capsys=capsys)
    told = json.loads(out)
    by_name = {each["check"]: each["status"] for each in told["checks"]}
    assert code == 1 and told["status"] == RED and list(by_name) == ["one kernel", "weights", *check.CHECKS]
    red = {name for name, status in by_name.items() if status == RED}
    assert red == {"weights", "autoencoder", "noise", "a short edit"}  # what asks for training
    assert all(each["found"] and each["seconds"] >= 0 for each in told["checks"])


def zero(network, names) -> None:
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if names in name:
                tensor.zero_()


def swap(network, one: str, other: str) -> None:
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        a, b = parameters[one], parameters[other]
        a[:], b[:] = b.clone(), a.clone()


def scale(network) -> None:
    for parameter in network.parameters():
        parameter.data *= 2


def exchanged(subject: Subject) -> None:
    weight = subject.editor.unet.input_blocks[0][0].weight.data
    weight[:] = weight.flip(1).clone()


def of_another_training(subject: Subject) -> None:
    """The text-to-image model's UNet, but for its first layer, which sees no picture."""
    key = "model.diffusion_model."
    other = {k.removeprefix(key): v.float() for k, v in load_file(loading.shipped("toy-t2i.safetensors")).items()}
    for name, parameter in subject.editor.unet.named_parameters():
        if name in other and other[name].shape == parameter.shape:
            parameter.data = other[name]


def shuffled_text(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in subject.editor.text.parameters():
        parameter.data = parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(parameter)


def no_picture(subject: Subject) -> None:
    with torch.no_grad():
        subject.editor.unet.input_blocks[0][0].weight[:, 4:] = 0


def no_text(subject: Subject) -> None:
    zero(subject.editor.unet, "attn2.to_out")


def other_words(subject: Subject) -> None:
    words = subject.editor.text.config.words
    config = copy.deepcopy(subject.editor.text.config)
    config.words = words[1:] + words[:1]
    subject.editor.text.tokenizer.config = config


def overflowing(subject: Subject) -> None:
    editor = subject.editor
    for part in PARTS:
        getattr(editor, part).half()
    editor.dtype = torch.float16
    with torch.no_grad():
        editor.vae.decoder.norm_out.weight.fill_(6e4)


BROKEN = {  # what is done to good weights, and the checks that turn
    "a UNet of zeros": (lambda s: zero(s.editor.unet, ""), {"noise", "guidance"}),
    "a UNet without its last layer": (lambda s: zero(s.editor.unet, "out.2"), {"numbers", "noise", "guidance"}),
    "a UNet without a block": (lambda s: zero(s.editor.unet, "middle_block.1."), {"numbers"}),
    "a UNet twice as large": (lambda s: scale(s.editor.unet), {"noise"}),
    "a UNet whose channels are exchanged": (exchanged, {"noise"}),
    "a UNet of another training": (of_another_training, {"noise"}),
    "a decoder of zeros": (lambda s: zero(s.editor.vae, "decoder."), {"numbers", "autoencoder"}),
    "a text model that is shuffled": (shuffled_text, {"noise"}),
    "a UNet's tensors exchanged": (
        lambda s: swap(s.editor.unet, "input_blocks.1.0.in_layers.2.weight", "input_blocks.1.0.out_layers.3.weight"),
        {"noise"},
    ),
    "a UNet that hears no text": (no_text, {"guidance"}),
    "a UNet that sees no picture": (no_picture, {"guidance"}),
    "an autoencoder without a layer": (lambda s: zero(s.editor.vae, "decoder.norm_out"), {"autoencoder"}),
    "an encoder of zeros": (lambda s: zero(s.editor.vae, "encoder.conv_out.weight"), {"autoencoder"}),
    "a decoder of another scale": (lambda s: setattr(s.editor, "scale_factor", 4.0), {"autoencoder"}),
    "a text model of zeros": (lambda s: zero(s.editor.text, "final_layer_norm"), {"text"}),
    "another tokenizer": (other_words, {"text"}),
    "half precision that overflows": (overflowing, {"half precision", "autoencoder"}),
    "not a number": (lambda s: s.editor.unet.out[2].bias.data.fill_(float("nan")), {"numbers", "noise"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_red(name, subject):
    breaks, checks = BROKEN[name]
    assert {each for each in checks if found(each, subject).status != GREEN} == set()
    breaks(subject)
    findings = {each: found(each, subject) for each in checks}
    assert {each for each, finding in findings.items() if finding.status == RED} == checks, findings
    assert all(len(finding.found.splitlines()) == 1 for finding in findings.values())


@pytest.mark.parametrize("part", PARTS)
def test_which_network_is_another_is_said(part, subject):
    """Of the small model by what ships; of a converted file by what `convert` noted."""
    subject.path = Path("other.safetensors")
    assert check.which(subject).status == GREEN
    next(getattr(subject.editor, part).parameters()).data.view(-1)[0] += 1
    finding = check.which(subject)
    assert finding.status == YELLOW and [name for name in check.PARTS.values() if name in finding.found] == [
        check.PARTS[part]
    ]


def test_a_converted_file_that_changed_is_red(subject, tmp_path):
    path = tmp_path / "w.safetensors"
    convert.convert(SHIPPED, path)
    notes = reading.metadata(path)
    assert check.changed_since(path, notes) == [] == check.changed_since(SHIPPED, {})
    for part, prefix in convert.PREFIXES.items():
        state = load_file(path)
        next(tensor for key, tensor in state.items() if key.startswith(prefix)).view(-1)[0] += 1
        save_file(state, tmp_path / "changed.safetensors", notes)
        assert check.changed_since(tmp_path / "changed.safetensors", notes) == [check.PARTS[part]]
    subject.kind, subject.path = "ip2p", tmp_path / "changed.safetensors"
    finding = check.which(subject)
    assert finding.status == RED and "the text model changed since" in finding.found


def test_an_outside_that_moves_is_red(subject, monkeypatch):
    real = emilie.canvas.canvas.Canvas.steps

    def leaks(self, *args, **more):
        yield from real(self, *args, **more)
        self.states[-1].latent[..., -1] += 1e-6

    monkeypatch.setattr(emilie.canvas.canvas.Canvas, "steps", leaks)
    finding = found("a short edit", subject)
    assert finding.status == RED and "the latent moved" in finding.found


def test_an_edit_that_changes_nothing_is_told(subject):
    subject.editor.config = copy.deepcopy(subject.editor.config)
    subject.text = "make it day"  # which it is
    subject.editor.config.sampling.text_scale = 0.0
    assert found("a short edit", subject).status == YELLOW


def test_a_fast_path_that_computes_something_else_is_red(subject, monkeypatch):
    e = subject.editor
    subject.editor = FastEditor(e.config, e.unet, e.vae, e.text, model="m", family="raw")
    assert found("fast and plain", subject).status == GREEN
    real = FastEditor.denoise
    monkeypatch.setattr(FastEditor, "denoise", lambda self, *args: real(self, *args) * 1.001)
    finding = found("fast and plain", subject)
    assert finding.status == RED and "--plain" in finding.remedy


def test_half_precision_that_is_coarse_is_told(subject):
    for part in PARTS:
        getattr(subject.editor, part).half()
    subject.editor.dtype = torch.float16
    assert found("half precision", subject).status == GREEN
    real = subject.editor.decode
    subject.editor.decode = lambda z: real(z) + 3 / 127.5
    assert found("half precision", subject).status == YELLOW


def test_memory_and_time_that_are_short_are_told(subject, monkeypatch):
    monkeypatch.setattr(check, "available_memory", lambda: 10**6)
    assert "--low-memory" in found("memory", subject).remedy
    monkeypatch.setattr(check, "LONG", 0.0)
    assert "--steps 2" in found("time", subject).remedy


def test_a_card_that_the_build_does_not_know_is_told(monkeypatch):
    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    assert check.kernel("cpu", None).status == GREEN
    monkeypatch.setattr(check.F, "conv2d", no_kernel)
    finding = check.kernel("cpu", None)
    assert finding.status == RED and "no kernel image" in finding.found and "pytorch.org" in finding.remedy


def test_a_kernel_that_computes_something_else_is_red(monkeypatch):
    real, calls = check.attention, []
    monkeypatch.setattr(check, "attention", lambda *qkv: real(*qkv) * (1 + 0.1 * (calls.append(0) or len(calls))))
    assert check.kernel("cpu", None).status == RED


def test_which_weights_they_are(shipped, tmp_path, monkeypatch):
    state, path = load_file(SHIPPED), tmp_path / "w.safetensors"
    subject = Subject(shipped, path, 64)
    subject.kind = "ip2p"
    released = next(iter(download.RELEASED))
    for notes, status in (
        ({"sha256": released}, GREEN),
        ({"sha256": "0" * 64}, YELLOW),
        ({"source": "other.ckpt"}, YELLOW),
        ({}, YELLOW),
    ):
        save_file(state, path, notes)
        assert check.which(subject).status == status
    monkeypatch.setitem(download.RELEASED, check.hash_file(path), "this")
    assert check.which(subject).status == GREEN


@pytest.mark.parametrize("fault", ["cut", "missing", "foreign", "a text-to-image model"])
def test_weights_that_do_not_load_are_red(fault, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    if fault == "cut":
        path.write_bytes(SHIPPED.read_bytes()[:-1000])
    elif fault == "missing":
        save_file({k: v for k, v in load_file(SHIPPED).items() if "middle" not in k}, path)
    elif fault == "foreign":
        save_file({"a": torch.zeros(3)}, path)
    else:
        path = Path(loading.shipped("toy-t2i.safetensors"))
    code, out, err = run("check", "--weights", path, "--device", "cpu", capsys=capsys)
    lines = [line.split()[0] for line in out.splitlines() if line.split()[0] in (GREEN, YELLOW, RED)]
    assert code == 1 and lines == [GREEN, RED] and not err  # and nothing more is tried
