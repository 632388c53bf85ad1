"""The networks against the original code's outputs, block by block, and against the released file's keys and shapes."""

import re
from pathlib import Path

import pytest
import torch
from pseudo import error, manifest

from emilie_min.checkpoint import networks as networks_module
from emilie_min.checkpoint import reading
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.config import load_config
from emilie_min.errors import CheckpointError, ImageError
from emilie_min.unet import SpatialTransformer, timestep_embedding
from emilie_min.unet import __doc__ as TRAPS

SINGLE = 1e-5  # relative error of one network's pass, float32


def entries(name="manifest", channels=None):
    """A checkpoint's index as its manifest tells it; `channels`: of another first convolution."""
    first = (
        reading.RAW + "input_blocks.0.0.weight",
        reading.EMA + "diffusion_modelinput_blocks00weight",
    )
    out = {}
    for key, entry in manifest(name)["state_dict"].items():
        shape = entry["shape"]
        if channels and key in first:
            shape = [shape[0], channels, *shape[2:]]
        out[key] = reading.Entry(getattr(torch, entry["dtype"]), tuple(shape))
    return out


@torch.no_grad()
@pytest.mark.parametrize("shape", ["sq", "rect"])
def test_unet(networks, goldens, shape):
    g = {name: goldens[f"unet.{shape}.{name}"] for name in ("x", "t", "context", "eps")}
    assert error(networks["unet"](g["x"], g["t"], g["context"]), g["eps"]) <= SINGLE


@torch.no_grad()
def test_unet_block_by_block(networks, goldens):
    unet, prefix, seen = networks["unet"], "unet.rect.act.", {}
    names = [key.removeprefix(prefix) for key in goldens if key.startswith(prefix)]
    assert len(names) == 26
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
        for name in names
    ]
    unet(goldens["unet.rect.x"], goldens["unet.rect.t"], goldens["unet.rect.context"])
    for hook in hooks:
        hook.remove()
    errors = {name: error(seen[name], goldens[prefix + name]) for name in names}
    assert max(errors.values()) <= SINGLE, errors


def test_group_norms_have_two_epsilons(networks):
    """1e-6 in the transformers and the whole autoencoder, 1e-5 elsewhere: at usual inputs the goldens hardly differ."""
    transformers = {f"{n}.norm" for n, m in networks["unet"].named_modules() if isinstance(m, SpatialTransformer)}
    seen = {"unet": [], "vae": []}
    for part in seen:
        for name, layer in networks[part].named_modules():
            if isinstance(layer, torch.nn.GroupNorm):
                seen[part].append(layer.eps)
                assert layer.eps == (1e-6 if part == "vae" or name in transformers else 1e-5), name
            if isinstance(layer, torch.nn.LayerNorm):
                assert layer.eps == 1e-5, name
    assert seen["unet"].count(1e-5) == 45 and seen["unet"].count(1e-6) == 16 and len(seen["vae"]) > 40


@torch.no_grad()
def test_the_two_downsamplings_pad_differently(networks):
    x = torch.zeros(1, 128, 8, 8)
    x[..., 0, :] = x[..., :, 0] = 1  # what a kernel sees of it depends on where the padding is
    for part, layer, pad in (
        ("unet", networks["unet"].input_blocks[9][0], (1, 1, 1, 1)),
        ("vae", networks["vae"].encoder.down[2].downsample, (0, 1, 0, 1)),
    ):
        (conv,) = layer.children()
        expected = torch.nn.functional.conv2d(torch.nn.functional.pad(x, pad), conv.weight, conv.bias, stride=2)
        assert error(layer(x), expected) <= SINGLE, part


def test_timestep_embedding():
    whole, between = timestep_embedding(torch.tensor([3.0, 3.5]), 64)
    assert not torch.equal(whole, between)
    assert between[0] == torch.tensor(3.5).cos() and between[32] == torch.tensor(3.5).sin()  # cosines first


@torch.no_grad()
def test_raw_weights_are_another_model(networks, goldens, small_config, small_ckpt):
    """The averaged weights give the golden, the raw ones the original's raw output, and the two are far apart."""
    raw = {key: entry for key, entry in reading.index(small_ckpt).items() if not key.startswith(reading.EMA)}
    unaveraged = meta_networks(small_config)
    assert reading.load(unaveraged, small_ckpt, "cpu", torch.float32, raw).family == "raw"
    inputs = [goldens[f"unet.sq.{name}"] for name in ("x", "t", "context")]
    assert error(unaveraged["unet"](*inputs), goldens["unet.sq.eps_raw_weights"]) <= SINGLE
    assert error(networks["unet"](*inputs), goldens["unet.sq.eps"]) <= SINGLE
    assert error(networks["unet"](*inputs), goldens["unet.sq.eps_raw_weights"]) > 0.1


@torch.no_grad()
def test_text(networks, goldens):
    assert error(networks["text"](goldens["text.input_ids"]), goldens["text.last_hidden_state"]) <= SINGLE


@torch.no_grad()
@pytest.mark.parametrize("shape", ["sq", "rect"])
def test_autoencoder(networks, goldens, small_config, shape):
    vae, image, z = networks["vae"], goldens[f"vae.{shape}.image"], goldens[f"vae.{shape}.z"]
    assert error(torch.cat(vae.moments(image), dim=1), goldens[f"vae.{shape}.moments"]) <= SINGLE
    assert error(vae.encode(image), goldens[f"vae.{shape}.mode"]) <= SINGLE
    assert error(vae.decode(z / small_config.diffusion.scale_factor), goldens[f"vae.{shape}.decoded"]) <= SINGLE


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(8, 24), (16, 8)])
def test_other_rectangles(networks, goldens, height, width):
    """Sides need not be equal, or powers of two; a batch gives what its members give alone."""
    x = torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(0))
    t, context = torch.tensor([999.0, 3.5]), goldens["unet.sq.context"]
    together = networks["unet"](x, t, context)
    assert together.shape == (2, 4, height, width)
    alone = torch.cat([networks["unet"](x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(2)])
    assert error(together, alone) <= SINGLE
    image = networks["vae"].decode(x[:1, :4])
    assert image.shape == (1, 3, 8 * height, 8 * width)
    assert networks["vae"].encode(image).shape == (1, 4, height, width)


@pytest.mark.parametrize("height, width", [(12, 16), (16, 12), (4, 8), (15, 17)])
def test_latents_that_cannot_be_halved(networks, height, width):
    with pytest.raises(ImageError, match=rf"latent of {height}x{width} .* multiples of 8"):
        networks["unet"](torch.zeros(1, 8, height, width), torch.zeros(1), torch.zeros(1, 77, 64))


@pytest.mark.parametrize("height, width", [(64, 60), (60, 64), (4, 4)])
def test_images_that_cannot_be_encoded(networks, height, width):
    with pytest.raises(ImageError, match=rf"image of {width}x{height} px .* multiples of 8"):
        networks["vae"].encode(torch.zeros(1, 3, height, width))


@torch.no_grad()
@pytest.mark.parametrize("dtype, close", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_half_precision(networks, goldens, small_config, small_ckpt, dtype, close):
    nets = meta_networks(small_config)
    reading.load(nets, small_ckpt, "cpu", dtype)
    assert all(p.dtype == dtype for net in nets.values() for p in net.parameters())
    x, t, context = (goldens[f"unet.sq.{name}"] for name in ("x", "t", "context"))
    image, z = goldens["vae.sq.image"][..., :32, :32], goldens["vae.sq.mode"][..., :4, :4]  # small: CPUs are slow at it
    pairs = [
        (nets["unet"](x.to(dtype), t, context.to(dtype)), goldens["unet.sq.eps"]),
        (nets["text"](goldens["text.input_ids"]), goldens["text.last_hidden_state"]),
        (nets["vae"].encode(image.to(dtype)), networks["vae"].encode(image)),
        (nets["vae"].decode(z.to(dtype)), networks["vae"].decode(z)),
    ]
    for out, reference in pairs:
        assert out.dtype == dtype and error(out, reference) <= close


def test_the_released_files_keys_and_shapes():
    """All 1831 tensors of the released checkpoint are a parameter of the full-size networks or named as unused."""
    released, networks = entries(), meta_networks(load_config("ip2p"))
    assert len(released) == 1831
    wanted, report = reading.check(networks, released, "released")
    assert report.family == "EMA"
    assert {part: len(names) for part, names in wanted.items()} == {"unet": 686, "vae": 248, "text": 196}
    assert sum(report.dropped.values()) == 1831 - 686 - 248 - 196
    assert sorted(report.dropped.values()) == [1, 2, 12, 686]
    assert reading.detect_config(released) == "ip2p"
    raw_only = {key: entry for key, entry in released.items() if not key.startswith(reading.EMA)}
    wanted, report = reading.check(networks, raw_only, "pruned")
    assert report.family == "raw" and set(wanted["unet"].values()) <= raw_only.keys()


def test_ema_names_have_lost_their_dots():
    """EMA names lose their dots; the manifest of the original says which parameter each one follows."""
    ema_of, networks = manifest("manifest")["ema_of"], meta_networks(load_config("ip2p"))
    keys, _ = reading.key_map(networks, ema_of)
    assert {key: reading.RAW + name for name, key in keys["unet"].items()} == ema_of


def test_stable_diffusions_keys_and_shapes():
    networks = meta_networks(load_config("sd15"))
    four = entries(channels=4)
    assert reading.detect_config(four) == "sd15"
    reading.check(networks, four, "sd15")
    with pytest.raises(CheckpointError, match="320x8x3x3 and should be 320x4x3x3"):
        reading.check(networks, entries(), "ip2p as sd15")
    assert reading.detect_config(entries(channels=9)) is None  # an inpainting model


def test_the_small_model_has_the_same_keys(small_config):
    small, networks = entries("small_manifest"), meta_networks(small_config)
    _, report = reading.check(networks, small, "small")
    assert report.family == "EMA"
    assert reading.detect_config(small) is None  # so that it needs --config


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_lacks_is_no_fault_of_the_config(error, small_config, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(networks_module, "AutoencoderKL", full)
    with pytest.raises(type(error)):
        meta_networks(small_config)


def test_networks_keep_no_gradient_and_no_dropout(networks):
    for network in networks.values():
        assert not network.training
        assert not any(p.requires_grad or p.is_meta for p in network.parameters())
        assert not any(buffer.is_meta for buffer in network.buffers())


def test_every_trap_names_a_test_that_there_is():
    named, rooms = re.findall(r"\btest_\w+", TRAPS), [Path(__file__).parents[1] / room for room in ("method", "canvas")]
    there = "".join(path.read_text() for room in rooms for path in room.glob("test_*.py"))
    assert len(named) > 12 and [name for name in named if f"def {name}(" not in there] == []
