"""GracoNet: what its public code computes on stand-in weights, both formulas to the integer, and its weight files."""

import argparse
import gzip
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pseudo import DATA, _drawn, error
from safetensors.torch import save_file

from emilie_min.errors import CheckpointError, ImageError
from emilie_min.insert import graconet

ABOUT = json.loads(gzip.decompress((DATA / "graconet.json.gz").read_bytes()))
SMALL = {"widths": [4, 4, 8, 8], "heads": 2, "dim": 4, "grids": [2], "latent": 6, "hidden": 8, "size": 32}


@pytest.fixture(scope="module")
def golden():
    """Of the second sample, a wide inset on a high base; of nodes and features only every few."""
    with np.load(DATA / "graconet.npz") as file:
        return {key: torch.from_numpy(value) for key, value in file.items()}


@pytest.fixture(scope="module")
def net():
    state = {
        key: torch.tensor(1000) if e["dtype"] == "int64" else _drawn(key, e["shape"], e["like"], "") * e["gain"]
        for key, e in ABOUT["state_dict"].items()
    }
    with torch.device("meta"):
        net = graconet.GracoNet()
    net.load_state_dict(state, strict=True, assign=True)
    return net


def picture(tensor):
    return Image.fromarray(tensor.numpy())


def test_every_place_agrees_with_the_public_code(net, golden):
    out, hooks = {}, []
    parts = {"shared": "shared_net", "inset": "fg_head", "base": "bg_head", "att": "att", "raw": "regress_net"}
    for name, part in parts.items():
        keep = partial(lambda name, _, __, y: out.update({name: y}), name)
        hooks.append(getattr(net, part).register_forward_hook(keep))
    with torch.no_grad():
        trans = net(*(golden[key].numpy() for key in ("base256", "inset256", "mask256")), golden["latent"])
    for hook in hooks:
        hook.remove()
    (completed, weights), few = out["att"], (slice(None, None, 32), slice(None, None, 2), slice(None, None, 2))
    found = {
        "shared.base": out["shared"][0][few],
        "shared.inset": out["shared"][1][few],
        "nodes.base": out["base"][0, :, ::4],
        "nodes.inset": out["inset"][0],
        "attention": weights[0, :, 0],
        "completed": completed[0],
        "raw": out["raw"][0],
        "trans": trans,
    }
    assert {key: error(value, golden[key]) for key, value in found.items() if error(value, golden[key]) > 1e-5} == {}
    size, inset = picture(golden["base"]).size, picture(golden["inset"]).size
    assert [list(graconet.box(t, size, inset)) for t in trans] == golden["box"].tolist()


def test_pictures_are_prepared_and_put_together_as_there(golden):
    base, inset, mask = (picture(golden[key]) for key in ("base", "inset", "mask"))
    for found, key in zip(graconet.prepare(base, inset, mask), ("base256", "inset256", "mask256")):
        assert np.abs(found.astype(int) - golden[key].numpy()).max() <= 1  # by Pillow's version, see `prepare`
    box = tuple(golden["box"][0].tolist())
    assert np.array_equal(graconet.placed(mask, box, base.size), golden["placed_mask"])
    assert np.array_equal(graconet.paste(base, inset, mask, box), golden["composite"])


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_what_is_too_thin_for_the_letterbox(size):
    with pytest.raises(ImageError, match="too thin"):
        graconet.prepare(Image.new("RGB", (64, 64)), Image.new("RGB", size), Image.new("L", size))


def test_both_formulas_to_the_integer():
    for (*sizes,), trans, want in ABOUT["boxes"]:
        base, inset = tuple(sizes[:2]), tuple(sizes[2:])
        if want is not None:
            assert list(graconet.box(trans, base, inset)) == want
            continue
        with pytest.warns(UserWarning, match="passes the edge"):  # where the original raises
            x, y, w, h = graconet.box(trans, base, inset)
        assert x + w == base[0] or y + h == base[1]
    for (bw, bh, w, h), want in ABOUT["letterboxes"]:
        make = partial(graconet.prepare, Image.new("RGB", (bw, bh)), Image.new("RGB", (w, h)))
        if want is None:
            with pytest.raises(ImageError, match="too thin"):
                make(Image.new("L", (w, h), 255))
        else:
            x0, y0, x1, y1 = Image.fromarray(make(Image.new("L", (w, h), 255))[2]).getbbox()
            assert [x0, y0, x1 - x0, y1 - y0] == want


def test_proposals_follow_from_the_seed_and_their_number():
    torch.manual_seed(0)
    net = graconet.GracoNet(**SMALL)
    base, inset = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (9, 20), "blue")
    boxes = net.propose(base, inset, Image.new("L", inset.size, 255), 4, seed=3)
    assert boxes[:2] == net.propose(base, inset, Image.new("L", inset.size, 255), 2, seed=3)
    assert all(0 <= x < x + w <= 60 and 0 <= y < y + h <= 40 for x, y, w, h in boxes)


def training_file(path, generator):
    """What GracoNet's training script writes."""
    parts = {"generator": generator, "discriminator": {"model.0.weight": torch.ones(3)}}
    records = {"opt": argparse.Namespace(d_model=512), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    torch.save({"epoch": 11, "model": parts, **records}, path)
    return path


def test_the_training_scripts_file_loads_strictly_and_safely(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = graconet.GracoNet(**SMALL)
    monkeypatch.setattr(graconet, "GracoNet", lambda **sizes: type(net)(**SMALL))  # the released one has 40 M numbers
    state, others = net.state_dict(), {"vae_enc.fc2.weight": torch.ones(2), "latent_head.layers.0.x": torch.ones(2)}
    loaded = graconet.load(training_file(tmp_path / "11.pth", state | others))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), loaded.state_dict().values()))
    for wrong, why in (
        ({**state, "extra": torch.ones(1)}, "unknown .*generator.extra"),
        ({k: v for k, v in state.items() if k != "att.att.W_O.bias"}, "missing .*W_O.bias"),
        ({**state, "regress_net.regressor.6.bias": torch.ones(4)}, "is 4 and should be 3"),
        ({**state, "regress_net.regressor.6.bias": torch.full((3,), torch.nan)}, "not finite"),
    ):
        with pytest.raises(CheckpointError, match=why):
            graconet.load(training_file(tmp_path / "wrong.pth", wrong))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (("features.0.weight", "classifier.6.weight"), "an image classifier"),
        (("lora_up.weight",), "a LoRA"),
        (("some.weight",), "a file of 1 tensors, such as some.weight"),
    ],
)
def test_another_models_file_is_told_apart(tmp_path, keys, what):
    save_file({key: torch.ones(2) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"is not GracoNet's: it is {what}"):
        graconet.load(tmp_path / "other.safetensors")


def test_the_editors_weights_are_told_apart(small_ckpt):
    with pytest.raises(CheckpointError, match="is not GracoNet's: it is "):
        graconet.load(small_ckpt)


def test_sizes_that_no_network_has_are_refused(tmp_path):
    save_file({"shared_net.0.weight": torch.ones(2)}, tmp_path / "x.safetensors", {"config": '{"width": 3}'})
    with pytest.raises(CheckpointError, match="no network has the sizes"):
        graconet.load(tmp_path / "x.safetensors")
