"""What `load` refuses; what it reads of files has tests of its own in `tests/checkpoint`."""

import pytest
import torch
from safetensors.torch import save_file

import emilie_min as emilie
from emilie_min.errors import CheckpointError, ConfigError, EmilieError, TokenizerError


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ({"weights": "none.ckpt"}, CheckpointError, "none.ckpt"),
        ({"dtype": "int8"}, EmilieError, "dtype"),
        ({"device": "warp"}, EmilieError, "device warp"),
        ({"device": "meta"}, EmilieError, "device meta"),
        ({"config": "nonsense"}, ConfigError, "nonsense"),
        ({"tokenizer": "nowhere"}, TokenizerError, "nowhere"),
        ({"compile": True, "low_memory": True}, EmilieError, "choose one"),
    ],
    ids=str,
)
def test_what_load_cannot_use(args, error, match):
    with pytest.raises(error, match=match):
        emilie.load(**{"weights": "random", "config": "toy", "device": "cpu", **args})


@pytest.mark.parametrize(
    ("key", "why"),
    [("x", "no key starts with"), ("model.diffusion_model.input_blocks.0.0.weight", "no built-in config")],
)
def test_a_file_that_no_config_fits(key, why, tmp_path):
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "cond_stage_model.x": torch.zeros(1)}
    save_file({key: torch.zeros(7, 3, 3, 3), **others}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=why):
        emilie.load(tmp_path / "a.safetensors", device="cpu")


def test_random_weights_are_the_same_every_time_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    a, b = (emilie.load("random", "toy", device="cpu").unet.state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_a_dtype_is_that_of_every_network(dtype):
    editor, wanted = emilie.load("random", "toy", device="cpu", dtype=dtype), getattr(torch, str(dtype).split(".")[-1])
    parameters = [p for network in (editor.unet, editor.vae, editor.text) for p in network.parameters()]
    assert editor.dtype == wanted and all(p.dtype == wanted and not p.requires_grad for p in parameters)
    assert editor.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32  # latents stay float32
