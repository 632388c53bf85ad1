"""Configs: the original's layout in, flat sections out, and what no model can have is refused in a line."""

import pytest
import yaml
from pseudo import DATA

from emilie_min import sampling
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.config import BUILT_IN, load_config
from emilie_min.errors import ConfigError

PARTS = {"unet": "unet_config", "vae": "first_stage_config", "text": "cond_stage_config"}


def setting(path, value):
    """One setting in the original's layout: "unet.speed", "vae.ddconfig.ch", "sampling.steps", "timesteps"."""
    first, _, rest = path.partition(".")
    if first in PARTS:
        path = f"model.params.{PARTS[first]}.params.{rest}"
    elif first not in ("sampling", "model", "data"):
        path = f"model.params.{path}"
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def merged(base, change):
    both = isinstance(base, dict) and isinstance(change, dict)
    return {**base, **{k: merged(base.get(k), v) for k, v in change.items()}} if both else change


def refusal(text, tmp_path):
    """What is said of a config, when it is read or at the latest when its networks are built: one line."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        meta_networks(load_config(path))
    message = str(caught.value)
    assert message.startswith(f"config {path}: ") and message.isprintable() and len(message) <= 500
    return message


def test_what_is_longer_than_any_config_is_not_read(tmp_path):
    assert "longer than 0.0625 MB" in refusal("#" * 2**16 + "\n", tmp_path)


def test_the_originals_file_is_read_flat():
    """tests/data/small.yaml has every key of the original's generate.yaml, its training's too."""
    c = load_config(DATA / "small.yaml")
    assert c.unet.model_channels == 32 and c.unet.channel_mult == [1, 2, 4, 4] and c.vae.ch == 32
    assert c.text.hidden_size == 64 and c.text.words is None and c.diffusion.scale_factor == 0.18215
    assert c.sampling.steps == 100


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_configs_build(name):
    assert meta_networks(load_config(name)).keys() == {"unet", "vae", "text"}


def test_what_the_original_says_of_its_training_is_ignored(tmp_path):
    text = (DATA / "small.yaml").read_text() + "data: {target: main.DataModule}\nlightning: {trainer: {gpus: 8}}\n"
    (tmp_path / "c.yaml").write_text(text)
    ours = load_config(tmp_path / "c.yaml")
    ours.name = str(DATA / "small.yaml")
    assert ours == load_config(DATA / "small.yaml")


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("unet.speed", 3, "speed"),
        ("unet.resolution", 3, "resolution"),  # known to another section
        ("model.speed", 1, "model.speed"),
        ("speed", {"deep": 1}, "speed"),
        ("sampling.speed", 1, "speed"),
        ("sampling", None, "mapping"),
        ("unet", 3, "params"),
        ("sampling.steps", "many", "steps"),
        ("sampling.multiple", 0, "multiple"),
        ("sampling.multiple", 6, "multiple"),
        ("unet.num_groups", 0, "num_groups"),
        ("unet.num_groups", 3, "unet: "),
        ("unet.num_heads", 5, "num_heads"),
        ("unet.channel_mult", [], "channel_mult"),
        ("unet.channel_mult", [1, 10**30], "channel_mult"),
        ("unet.model_channels", 4001, "even"),
        ("unet.channel_mult", 2, "channel_mult"),
        ("unet.num_res_blocks", 10**6, "num_res_blocks"),
        ("unet.in_channels", 9, "in_channels"),
        ("unet.out_channels", 5, "out_channels"),
        ("unet.context_dim", 97, "context_dim"),
        ("unet.transformer_depth", 2, "transformer_depth must be 1"),
        ("unet.legacy", True, "legacy must be false"),
        ("vae.ddconfig.ch", 10**30, "ch"),
        ("vae.ddconfig.num_groups", 3, "vae: "),
        ("vae.ddconfig.attn_resolutions", [16], "attn_resolutions"),
        ("text.text_config.hidden_act", "swish2", "hidden_act"),
        ("text.text_config.num_attention_heads", 5, "text: "),
        ("text.text_config.pad_token_id", 64, "vocab_size"),
        ("text.text_config.pad_token_id", -1, "pad_token_id"),
        ("text.text_config.max_position_embeddings", 76, "max_position_embeddings must be 77"),
        ("text.words", ["a"] * 65, "vocab_size"),
        ("text.words", ["a", {}], "words"),
        ("text.words", ["a", True], "words"),
        ("unet.channel_mult", [[1]], "channel_mult"),
        ("text.version", "${oc.env:HOME}", "interpolations"),
        ("scale_factor", "${oc.env:HOME}", "interpolations"),
        ("timesteps", 0, "timesteps"),
        ("timesteps", 1, "timesteps"),
        ("linear_start", -1, "linear_start"),
        ("scale_factor", 0, "scale_factor"),
        ("scale_factor", float("inf"), "scale_factor"),
        ("scale_factor", float("nan"), "scale_factor"),
    ],
)
def test_settings_that_no_model_can_have(tmp_path, path, value, word):
    from importlib.resources import files

    base = yaml.safe_load((files("emilie_min") / "configs" / "toy.yaml").read_text())
    assert word in refusal(yaml.safe_dump(merged(base, setting(path, value))), tmp_path)


def test_a_contradiction_is_not_blamed_on_the_last_key(tmp_path):
    text = (DATA / "small.yaml").read_text() + "sampling: {steps: 3}\n"
    assert "steps" not in refusal(text.replace("context_dim: 64", "context_dim: 32"), tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- 1", ""),
        ("3", ""),
        ("", "missing"),
        ("a: [", ""),
        ("a: {" * 3000, ""),
        ("x: !!python/object/apply:os.system [touch ran]", ""),
        ("a: &a [1]\nb: *a", "aliases"),
        ('"\x5cx1b[31m": 1', "?[31m"),
        ("sampling: {steps: 1, steps: 2}", "steps"),
        (f"sampling: {{steps: {'9' * 5000}}}", ""),
        ("1: {2: 3}", "1"),
        ("sampling: {3: 4}", "sampling.3"),
    ],
)
def test_files_that_are_no_config(tmp_path, monkeypatch, text, word):
    monkeypatch.chdir(tmp_path)
    assert word in refusal(text, tmp_path) and not (tmp_path / "ran").exists()


def test_names_that_are_no_file(tmp_path):
    (tmp_path / "latin1.yaml").write_bytes(b"a: \xff")
    for name in ("nonsense", tmp_path, "x" * 5000, "a\0b", tmp_path / "latin1.yaml"):
        with pytest.raises(ConfigError, match="ip2p") as caught:
            load_config(name)
        assert str(caught.value).isprintable()


def test_stable_diffusion_and_instructpix2pix_share_a_schedule():
    for name in ("ip2p", "sd15"):
        d = load_config(name).diffusion
        sigmas = sampling.get_sigmas(10, sampling.alphas_cumprod(d.linear_start, d.linear_end, d.timesteps))
        assert sigmas[0].item() == pytest.approx(14.6146, abs=1e-3)


def test_a_fault_of_the_file_has_its_line_and_a_list_is_one(tmp_path):
    small = (DATA / "small.yaml").read_text()
    assert "c.yaml: line 4: expected" in refusal("a: 1\nb: 2\nc: [1\nd: 2\n", tmp_path)
    for path in ("unet.channel_mult", "vae.ddconfig.ch_mult", "text.words"):
        wrong = yaml.safe_dump(merged(yaml.safe_load(small), setting(path, 4)))
        assert "must be a list" in refusal(wrong, tmp_path)
    wrong = yaml.safe_dump(merged(yaml.safe_load(small), setting("text.words", ["a", "red", "a"])))
    assert "words has 'a' twice" in refusal(wrong, tmp_path)
