"""Fixtures: the small model of the reference data: its config, stand-in weights, goldens and networks."""

import os
from pathlib import Path

import pytest
import torch
from pseudo import DATA, manifest, state_dict, write_ckpt
from safetensors.torch import load_file

import emilie_min as emilie
from emilie_min.checkpoint import reading
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.config import load_config
from emilie_min.emilie import Editor
from emilie_min.toy import world

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what writes gigabytes or takes minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="give --slow to run it"))
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")  # the longest first: no core waits in the end


@pytest.fixture(scope="session")
def goldens():
    """What the original code computed; data/goldens.json says what each tensor is."""
    return load_file(DATA / "goldens.safetensors")


@pytest.fixture(scope="session")
def small_config():
    return load_config(DATA / "small.yaml")


@pytest.fixture(scope="session")
def small_state():
    return state_dict(manifest("small_manifest"))


@pytest.fixture(scope="session")
def small_ckpt(small_state, tmp_path_factory):
    return write_ckpt(tmp_path_factory.mktemp("weights") / "small.ckpt", small_state)


@pytest.fixture(scope="session")
def networks(small_config, small_ckpt):
    """The small model's networks, EMA weights, float32; shared by all tests, so not to be changed."""
    networks = meta_networks(small_config)
    reading.load(networks, small_ckpt, "cpu", torch.float32)
    return networks


@pytest.fixture(scope="session")
def small(small_config, networks):
    """An `Editor` on the goldens' model."""
    return Editor(small_config, **networks)


@pytest.fixture(scope="session")
def shipped():
    """The small model that ships, as it loads on a CPU; shared, so not to be changed."""
    return emilie.load(device="cpu")


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    world.render(world.scene(3)).save("photo.png")
    return Path("photo.png")


@pytest.fixture(scope="session")
def editor():
    """The small model's editor with random weights; shared by all tests, so not to be changed."""
    return emilie.load("random", "toy", device="cpu")


@pytest.fixture(scope="session")
def picture():
    """A scene of the small world."""
    return world.render(world.scene(3))
