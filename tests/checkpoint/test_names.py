"""Weight files as people have them: other names, diffusers' folder, two UNets, damage, other models."""

import copy
import json
import re
import shutil
import warnings

import pytest
import torch
from pseudo import DATA
from safetensors.torch import load_file, save_file

import emilie_min as emilie
from emilie_min import loading
from emilie_min.checkpoint import names, reading
from emilie_min.checkpoint.convert import convert
from emilie_min.checkpoint.info import info
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.checkpoint.reading import EMA, RAW, TEXT, VAE
from emilie_min.errors import CheckpointError

SMALL = str(DATA / "small.yaml")


@pytest.fixture(scope="module")
def state():
    return load_file(loading.shipped("toy.safetensors"))


def told(function, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **options)
    return result, [str(w.message) for w in caught]


def load(path, **options):
    return emilie.load(path, device="cpu", dtype="float32", **options)


def tensors(editor) -> dict:
    return {f"{part}.{k}": v for part in ("unet", "vae", "text") for k, v in getattr(editor, part).state_dict().items()}


def same(a, b) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- other names for the same numbers


def vae_attention(state, theirs, matrices):
    """The autoencoder's attention under a converter's names."""
    ours, out = {"q": theirs[0], "k": theirs[1], "v": theirs[2], "proj_out": theirs[3], "norm": theirs[4]}, {}
    for key, tensor in state.items():
        head, found, tail = key.partition(".mid.attn_1.")
        name, _, kind = tail.rpartition(".")
        if found:
            tensor = tensor[:, :, 0, 0] if matrices and tensor.ndim == 4 else tensor
            key = f"{head}.mid.attn_1.{ours[name]}.{kind}"
        out[key] = tensor.contiguous()
    return out


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize(
    "theirs",
    [
        ("to_q", "to_k", "to_v", "to_out.0", "norm"),
        ("query", "key", "value", "proj_attn", "group_norm"),
        tuple("qkv") + ("proj_out", "norm"),
    ],
)
@pytest.mark.parametrize("matrices", [True, False])
def test_attention_of_the_autoencoder(state, tmp_path, theirs, matrices, suffix):
    path = tmp_path / f"a.{suffix}"
    renamed = vae_attention(state, theirs, matrices)
    save_file(renamed, path) if suffix == "safetensors" else torch.save(renamed, path)
    editor, notes = told(load, path)
    assert not notes and same(editor, load(None))


def test_matrices_for_all_1x1_convolutions(state, tmp_path):
    flat = {k: t[:, :, 0, 0].contiguous() if t.shape[2:] == (1, 1) else t for k, t in state.items()}
    assert sum(t.shape != state[k].shape for k, t in flat.items()) > 10
    save_file(flat, tmp_path / "a.safetensors")
    assert same(load(tmp_path / "a.safetensors"), load(None))
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "float32")
    assert same(load(tmp_path / "b.safetensors"), load(None))


@pytest.mark.parametrize("prefix", ["model.", "module.", "state_dict."])
def test_tensors_behind_a_prefix(state, tmp_path, prefix):
    save_file({prefix + key: tensor for key, tensor in state.items()}, tmp_path / "a.safetensors")
    editor, notes = told(load, tmp_path / "a.safetensors")
    assert len(notes) == 1 and prefix in notes[0] and same(editor, load(None))


@pytest.mark.parametrize("name", ["model", "module", "weights"])
def test_tensors_under_another_name(state, tmp_path, name):
    torch.save({"step": 3, "optimizer": {"x": torch.ones(2)}, name: state}, tmp_path / "a.ckpt")
    editor, notes = told(load, tmp_path / "a.ckpt")
    assert len(notes) == 1 and repr(name) in notes[0] and same(editor, load(None))
    torch.save({"step": 3, name: {"x": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="no state_dict of tensors"):
        reading.index(tmp_path / "a.ckpt")


def test_one_tensor_under_two_names(state, tmp_path):
    key = VAE + "decoder.mid.attn_1.q.weight"
    save_file({**state, key.replace(".q.", ".to_q."): state[key].clone()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="the same tensor under two names"):
        reading.index(tmp_path / "a.safetensors")


def test_bystanders_are_left_out_with_a_note(state, tmp_path):
    strangers = {"epoch": torch.ones(1), "extra.weight": torch.ones(2, 2)}
    save_file({**state, **strangers}, tmp_path / "a.safetensors")
    editor, notes = told(load, tmp_path / "a.safetensors")
    assert len(notes) == 1 and "2 tensors" in notes[0] and "epoch, extra.weight" in notes[0]
    assert same(editor, load(None))


def test_strangers_inside_a_network_are_none(state, tmp_path):
    save_file({**state, RAW + "input_blocks.9.0.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="1 unknown"):
        load(tmp_path / "a.safetensors")


def test_clips_other_half_needs_no_word(state, tmp_path):
    save_file({**state, TEXT + "logit_scale": torch.ones(1)}, tmp_path / "a.safetensors")
    assert not told(load, tmp_path / "a.safetensors")[1]


# ---- two UNets


def with_average(state, of, by):
    """A file with an average beside raw weights, both from `state`."""
    averages = {
        EMA + ("diffusion_model." + k.removeprefix(RAW)).replace(".", ""): t.clone()
        for k, t in state.items()
        if k.startswith(RAW)
    }
    raw = {
        k: t + by * t.std(correction=0) * torch.randn(t.shape) if k.startswith(RAW) and of(k) else t
        for k, t in state.items()
    }
    return {**raw, **averages}


@pytest.mark.parametrize(
    ("of", "by", "noted"),
    [
        (lambda k: True, 0.5, True),
        (lambda k: "attn2" in k, 1.0, True),
        (lambda k: True, 0.01, False),  # an average's lag
        (lambda k: True, 0.0, False),
    ],
)
def test_a_merge_beside_its_old_average(state, tmp_path, of, by, noted):
    torch.manual_seed(0)
    merged = with_average(state, of, by)
    path = tmp_path / "a.safetensors"
    save_file(merged, path)
    editor, notes = told(load, path)
    assert len(notes) == noted and all("--ema no" in n for n in notes) and editor.family == "EMA"
    assert same(editor, load(None))
    _, notes = told(convert, path, tmp_path / "c.safetensors", "float32")
    assert len(notes) == noted
    if not noted:
        return
    raw, notes = told(load, path, ema="no")
    assert not notes and raw.family == "raw"
    assert torch.equal(raw.unet.state_dict()["out.2.weight"], merged[RAW + "out.2.weight"])
    averaged, notes = told(load, path, ema="yes")
    assert not notes and same(averaged, editor)
    convert(path, tmp_path / "b.safetensors", "float32", ema="no")
    assert same(load(tmp_path / "b.safetensors"), raw)


def test_no_average_to_take(tmp_path):
    with pytest.raises(CheckpointError, match="no EMA"):
        load(None, ema="yes")
    with pytest.raises(CheckpointError, match="auto, yes, no"):
        load(None, ema="maybe")


# ---- damage


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", [RAW + "out.2.weight", VAE + "decoder.conv_in.bias", TEXT + "text_model.final_layer_norm.weight"]
)
def test_a_damaged_tensor_is_named_when_it_is_loaded(state, tmp_path, key, value):
    spoilt = state[key].clone()
    spoilt.view(-1)[-1] = value
    save_file({**state, key: spoilt}, tmp_path / "a.safetensors")
    for use in (load, lambda path: convert(path, tmp_path / "b.safetensors", "float32")):
        with pytest.raises(CheckpointError, match=re.escape(key)) as error:
            use(tmp_path / "a.safetensors")
        assert "damaged" in str(error.value) and "guidance" not in str(error.value) and "try" not in str(error.value)


def test_a_cast_that_overflows_is_no_damage(state, tmp_path):
    key = RAW + "out.2.weight"
    save_file({**state, key: torch.full(state[key].shape, 1e6)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="float16: try bfloat16 or float32"):
        emilie.load(tmp_path / "a.safetensors", device="cpu", dtype="float16")


# ---- other models

FIRST = RAW + "input_blocks.0.0.weight"
BASE = {FIRST: (320, 4, 3, 3), VAE + "x": (1,), TEXT + "x": (1,)}
OTHERS = [
    ({**BASE, "v_pred": ()}, "predicts v"),
    ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4), "lora_unet_down_blocks_0.alpha": ()}, "a LoRA"),
    ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 4)}, "a LoRA"),
    ({"lora_unet_x.hada_w1_a": (4, 4)}, "a LoRA"),
    ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "down_blocks.0.x": (1,)}, "a ControlNet"),
    ({"ip_adapter.1.to_k_ip.weight": (4, 4)}, "an IP-Adapter"),
    ({"down_blocks.0.motion_modules.0.x": (1,)}, "a motion module"),
    ({"emb_params": (4, 768)}, "textual inversion"),
    ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "textual inversion"),
    ({**BASE, FIRST: (320, 8, 3, 3), "conditioner.embedders.0.x": (1,)}, "an editor made from SDXL"),
    ({**BASE, "conditioner.embedders.0.x": (1,)}, "SDXL"),
    ({"model.diffusion_model.double_blocks.0.x": (1,)}, "transformer"),
    ({FIRST: (320, 4, 3, 3), VAE + "x": (1,), "cond_stage_model.model.x": (1,)}, "Stable Diffusion 2"),
    ({**BASE, TEXT + "text_model.embeddings.token_embedding.weight": (9, 1024)}, "Stable Diffusion 2"),
    ({**BASE, RAW + "add_embedding.linear_1.weight": (4, 4)}, "SDXL"),
    ({**BASE, FIRST: (320, 9, 3, 3)}, "inpainting"),
    ({**BASE, FIRST: (320, 5, 3, 3)}, "depth"),
    ({**BASE, FIRST: (320, 7, 3, 3)}, "upscaler"),
    ({FIRST: (320, 8, 3, 3), TEXT + "x": (1,)}, "without an autoencoder"),
    ({FIRST: (320, 8, 3, 3), VAE + "x": (1,)}, "without a text model"),
    ({**BASE, RAW + "out.2.weight.absmax": (1,)}, "quantized"),
    ({"down_blocks.0.resnets.0.norm1.weight": (1,)}, "diffusers' layout"),
    ({"decoder.up.0.block.0.norm1.weight": (1,)}, "an autoencoder alone"),
    ({"text_model.final_layer_norm.weight": (1,)}, "a text model alone"),
]


@pytest.mark.parametrize(("shapes", "what"), OTHERS, ids=[what for _, what in OTHERS])
def test_other_models_are_told_in_a_sentence(shapes, what, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    for use in (load, info, lambda path: convert(path, tmp_path / "b.safetensors")):
        try:
            message = str(use(path))
        except CheckpointError as error:
            message = str(error)
        assert what in message and "missing" not in message


def test_every_tell_tale_has_a_row():
    said = [names.tell_tale(shapes) for shapes, _ in OTHERS]
    assert {sentence for _, sentence in names.TELL_TALES} <= set(said)


@pytest.mark.parametrize("notes", [{"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "v_prediction"}])
def test_a_file_that_says_that_it_predicts_v(state, tmp_path, notes):
    save_file(state, tmp_path / "a.safetensors", notes)
    with pytest.raises(CheckpointError, match="predicts v"):
        load(tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors", {"modelspec.prediction_type": "epsilon"})
    load(tmp_path / "b.safetensors")


def test_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="GGUF"):
        load(tmp_path / "a.gguf")


# ---- diffusers' folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that diffusers wrote, of models of the small one's sizes, and those models."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel

    config = emilie.config.load_config("toy")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=8,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=96,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    sizes = {key: value for key, value in vars(config.text).items() if key not in ("words", "version")}
    text = CLIPTextModel(CLIPTextConfig(**sizes))
    parts = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text.eval()}
    path = tmp_path_factory.mktemp("diffusers") / "model"
    for name, part in parts.items():
        part.save_pretrained(path / name)
    return path, parts


def test_every_network_of_diffusers_folder_computes_the_same(folder):
    path, parts = folder
    editor, notes = told(load, path)
    assert not notes
    with torch.no_grad():
        x, t, context = torch.randn(2, 8, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 77, 96)
        torch.testing.assert_close(editor.unet(x, t, context), parts["unet"](x, t, context).sample)
        picture, z = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 16, 16)
        torch.testing.assert_close(editor.vae.encode(picture), parts["vae"].encode(picture).latent_dist.mean)
        torch.testing.assert_close(editor.vae.decode(z), parts["vae"].decode(z).sample)
        ids = editor.text.tokenize(["make it night"])
        torch.testing.assert_close(editor.text(ids), parts["text_encoder"](ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["float16", "bin", "bin in float16", "shards", "both"])
def test_diffusers_folder_in_every_form(folder, tmp_path, kind):
    path, parts = folder
    half = "16" in kind
    for name, part in parts.items():
        if "bin" in kind:
            target = (
                tmp_path / name / ("pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin")
            )
            target.parent.mkdir()
            torch.save({k: t.half() if half else t for k, t in part.state_dict().items()}, target)
        elif kind == "shards":
            part.save_pretrained(tmp_path / name, max_shard_size="100KB")
        else:
            variant = {"variant": "fp16"} if kind == "both" else {}
            copy.deepcopy(part).half().save_pretrained(tmp_path / name, **variant)
            if kind == "both":  # the full one is taken
                shutil.copytree(path / name, tmp_path / name, dirs_exist_ok=True)
    expected = tensors(load(path))
    expected = {k: t.half().float() for k, t in expected.items()} if half else expected
    got = tensors(load(tmp_path))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_a_single_file_made_of_the_folder_is_the_same(folder, tmp_path):
    path, _ = folder
    convert(path, tmp_path / "a.safetensors", "float32")
    assert same(load(tmp_path / "a.safetensors"), load(path))
    assert "diffusers' folder" in info(path) and "complete" in info(path)


def test_a_folder_is_read_strictly(folder, tmp_path):
    path, _ = folder
    for name, change, words in (
        ("a", lambda p: shutil.rmtree(p / "vae"), "without vae"),
        ("b", lambda p: next((p / "unet").glob("*.safetensors")).unlink(), "holds no diffusion_pytorch_model"),
        ("c", lambda p: rewrite(p, lambda s: s.pop("conv_out.bias")), r"1 missing .model.diffusion_model.out.2.bias"),
        ("d", lambda p: rewrite(p, lambda s: s.update({"conv_more.bias": torch.ones(1)})), "1 unknown"),
        ("e", lambda p: scheduled(p, "v_prediction"), "predicts v"),
    ):
        shutil.copytree(path, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / name)
    shutil.copytree(path, tmp_path / "good")
    scheduled(tmp_path / "good", "epsilon")
    load(tmp_path / "good")


def rewrite(path, change):
    file = next((path / "unet").glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file(state, file)


def scheduled(path, kind):
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": kind}))


def test_some_other_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path)
    for part, stems in names.FOLDER.items():
        (tmp_path / part).mkdir()
        save_file({"x": torch.ones(1)}, tmp_path / part / f"{stems[0]}.safetensors")
    assert "does not fit" in info(tmp_path)
    with pytest.raises(CheckpointError, match="--sha256 is of a file"):
        info(tmp_path, sha256=True)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="index.json cannot be read"):
        load(tmp_path)


def test_the_released_models_names_are_diffusers_names():
    """The table on the released model's sizes, of which diffusers' own names are listed."""
    config = emilie.config.load_config("ip2p")
    wanted, _ = reading.key_map(meta_networks(config), [TEXT + "text_model."])
    assert (
        names.unet_name("up_blocks.1.upsamplers.0.conv.weight", 2, {"1", "2", "3"}) == "output_blocks.5.2.conv.weight"
    )
    assert (
        names.unet_name("up_blocks.0.upsamplers.0.conv.weight", 2, {"1", "2", "3"}) == "output_blocks.2.1.conv.weight"
    )
    assert names.unet_name("down_blocks.2.downsamplers.0.conv.bias", 2, set()) == "input_blocks.9.0.op.bias"
    assert (
        names.vae_name("decoder.up_blocks.0.resnets.1.conv_shortcut.weight", 4)
        == "decoder.up.3.block.1.nin_shortcut.weight"
    )
    assert all(
        RAW + names.unet_name(k, 2, {"1"}) in wanted["unet"].values() for k in ("conv_in.bias", "conv_out.weight")
    )
