"""The low-memory path against the plain one, and half precision that overflows."""

import copy
from types import SimpleNamespace
from weakref import finalize

import pytest
import torch
from pseudo import error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import emilie_min as emilie
from emilie_min import unet as layers
from emilie_min import vae
from emilie_min.checkpoint.networks import build
from emilie_min.config import load_config
from emilie_min.faster.deepcache import DeepCache
from emilie_min.faster.half import HalfAutoencoderKL
from emilie_min.faster.low_memory import LowMemoryEditor, layerwise_cast
from emilie_min.vae import AutoencoderKL

SINGLE = 1e-5  # relative error, float32
LEFT = (0, 0, 30, 64)


@pytest.fixture(scope="module")
def lean():
    return emilie.load(device="cpu", low_memory=True)


@pytest.mark.parametrize("sequential", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("settings", [{}, {"reuse": 2}, {"image_scale": 1.5, "mask": LEFT}], ids=str)
def test_low_memory_edits_equal_plain_ones(shipped, lean, edited, settings, sequential):
    lean = copy.copy(lean)
    lean.sequential = sequential
    # the shipped file is float16
    assert error(edited(lean, steps=5, **settings), edited(shipped, steps=5, **settings)) <= SINGLE


@pytest.mark.parametrize(("sequential", "rows"), [(False, [3] * 2), (True, [1] * 6)])
def test_it_holds_half_and_on_a_gpu_runs_one_branch_at_a_time(shipped, lean, edited, sequential, rows):
    lean, seen = copy.copy(lean), []
    lean.sequential = sequential
    hook = lean.unet.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[0], inputs[0].dtype)))
    try:
        edited(lean, steps=2)
    finally:
        hook.remove()
    assert seen == [(row, torch.float32) for row in rows]
    held, whole = (sum(p.nbytes for n in (e.unet, e.vae, e.text) for p in n.parameters()) for e in (lean, shipped))
    assert held * 2 == whole


def test_networks_take_turns_on_a_device(monkeypatch):
    """Each is brought there when it is used, after the others have left; `to` is watched, as no device is at hand."""
    editor, moves = emilie.load("random", "toy", device="cpu", low_memory=True), []
    networks = {"unet": editor.unet, "vae": editor.vae, "text": editor.text}
    for name, network in networks.items():
        monkeypatch.setattr(network, "to", lambda device, name=name: moves.append((name, str(device))))
    editor.device = torch.device("meta")  # any device that is not the CPU
    for name, network in networks.items():
        moves.clear()
        editor.bring(network)
        assert sorted(moves) == sorted((other, "meta" if other == name else "cpu") for other in networks)
        assert moves.index((name, "meta")) >= 0


@pytest.mark.parametrize(
    ("part", "use"),
    [
        ("vae", lambda e, z: e.encode(torch.zeros(1, 3, 64, 64))),
        ("vae", lambda e, z: e.decode(z)),
        ("text", lambda e, z: e.context(["make it night"])),
        ("unet", lambda e, z: e.branches([z], 1.0, [z], [torch.zeros(1, 77, e.config.unet.context_dim)])),
    ],
)
def test_whatever_an_editor_does_brings_its_network(lean, part, use):
    assert isinstance(lean, LowMemoryEditor)
    lean, brought = copy.copy(lean), []
    lean.bring = brought.append
    use(lean, torch.zeros(1, 4, 16, 16))
    assert brought == [getattr(lean, part)]


def test_a_network_comes_when_the_others_have_left_and_nothing_moves_needlessly(networks, small_config, monkeypatch):
    """`Module.to` by a stand-in that moves names about; the card is "meta"."""
    networks = copy.deepcopy(networks)
    editor = LowMemoryEditor(small_config, **networks, device=torch.device("meta"))
    where: dict[str, str] = {}
    moves: list[str] = []
    asked: list[torch.nn.Module] = []
    names = {id(network): name for name, network in networks.items()}

    def to(network, device):
        asked.append(network)
        if where.get(names[id(network)], "cpu") != torch.device(device).type:
            where[names[id(network)]] = torch.device(device).type
            moves.append(names[id(network)])
        assert list(where.values()).count("meta") <= 1, "two networks on the card"

    monkeypatch.setattr(torch.nn.Module, "to", to)
    for name, network in networks.items():
        monkeypatch.setattr(
            network,
            "parameters",
            lambda name=name: iter([SimpleNamespace(device=torch.device(where.get(name, "cpu")))]),
        )
    edit = ("vae", "vae", "text", "unet", "unet", "unet", "vae")  # the factor f, the text, the steps, the picture
    counts = []
    for _ in range(3):
        before = len(moves)
        for name in edit:
            editor.bring(networks[name])
            assert where[name] == "meta"
        counts.append(len(moves) - before)
    assert counts[1] == counts[2] <= counts[0] + 1
    assert counts[1] == 6  # three networks come, and three leave
    before = len(asked)
    editor.bring(networks["vae"])
    assert len(asked) == before  # it is there
    editor.unet = DeepCache(networks["unet"], 2)  # type: ignore[assignment]
    editor.bring(editor.network)
    assert where == {"vae": "cpu", "text": "cpu", "unet": "meta"}


@pytest.mark.parametrize("fused", [True, False])
def test_an_edit_of_512_px_fits_4_gb_in_float16(monkeypatch, fused):
    """By count: a network's weights and what a step, encoding or decoding keeps alive beside them.

    On the meta device attention writes its whole matrix, 8 heads of 4096 x 4096; fused attention does not.
    """
    if fused:
        for module in (layers, vae):
            monkeypatch.setattr(module, "attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        networks = build(load_config("ip2p"))
        weights = {name: sum(p.numel() * 2 for p in network.parameters()) for name, network in networks.items()}
        parts = {
            "unet": lambda: networks["unet"](torch.empty(1, 8, 64, 64), torch.empty(1), torch.empty(1, 77, 768)),
            "vae": lambda: networks["vae"].decode(torch.empty(1, 4, 64, 64)),
            "vae encoder": lambda: networks["vae"].encode(torch.empty(1, 3, 512, 512)),
        }
        peaks = {}
        for part, run in parts.items():
            with torch.no_grad(), Live(networks) as live:
                run()
            peaks[part] = weights[part.split()[0]] + live.peak // 2  # counted in float32
    assert max(peaks.values()) == peaks["unet"] < (1.9e9 if fused else 2.9e9)
    assert sum(weights.values()) < 2.2e9  # so three at once would fit as well; a 4 GB card holds more than ours


class Live(TorchDispatchMode):
    """The most bytes that lived at once of what operators returned, each storage once."""

    def __init__(self, networks):
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()
        for network in networks.values():
            for parameter in network.parameters():
                self.seen[parameter.untyped_storage()] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for y in out if isinstance(out, (tuple, list)) else [out]:
            storage = y.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = size = storage.nbytes()
                finalize(storage, self.free, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def free(self, size):
        self.now -= size


def test_a_layer_that_fails_is_held_in_half_again():
    layer = torch.nn.Linear(4, 4)
    layerwise_cast(layer)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))
    assert layer.weight.dtype == torch.float16
    assert layer(torch.zeros(1, 4)).dtype == torch.float32
    assert layer.weight.dtype == torch.float16


@pytest.fixture
def half():
    return emilie.load("random", "toy", device="cpu", dtype="bfloat16")


def test_an_overflowing_decode_is_done_again_in_float32(half, monkeypatch):
    decode = AutoencoderKL.decode

    def overflows(self, z):
        return decode(self, z) * (float("inf") if z.dtype == torch.bfloat16 else 1)

    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert isinstance(half.vae, HalfAutoencoderKL) and half.decode(z).isfinite().all()
    monkeypatch.setattr(AutoencoderKL, "decode", overflows)
    with pytest.warns(UserWarning, match="again in float32"):
        image = half.decode(z)
    assert image.isfinite().all() and next(half.vae.parameters()).dtype == torch.bfloat16


def test_the_decoder_returns_to_half_precision_when_that_fails(half, monkeypatch):
    def overflows(self, z):
        if z.dtype == torch.float32:
            raise RuntimeError("can't allocate memory")
        return torch.full((1, 3, 64, 64), float("inf"))

    monkeypatch.setattr(AutoencoderKL, "decode", overflows)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError):
        half.decode(torch.zeros(1, 4, 16, 16))
    assert next(half.vae.parameters()).dtype == torch.bfloat16
