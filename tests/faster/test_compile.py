"""The compiled path without a card: blocks compiled by kind, and what is told and kept."""

import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from card import Card
from pseudo import error
from torch import nn

import emilie_min as emilie
from emilie_min import loading
from emilie_min.emilie import Editor
from emilie_min.errors import EmilieError
from emilie_min.faster import compile as compile_module
from emilie_min.faster import graph as graphs_module
from emilie_min.faster.compile import BLOCKS, LIMIT, CompiledEditor, compile_blocks
from emilie_min.faster.fast import FastEditor
from emilie_min.faster.graph import GraphEditor, Graphs
from emilie_min.faster.low_memory import LowMemoryEditor
from emilie_min.faster.tries import inductor_options, tried
from emilie_min.loading import editor_class


@pytest.fixture
def counted(monkeypatch):
    """A backend that runs what was traced, and how often it was asked to; compiling starts from nothing."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield backend, graphs
    torch._dynamo.reset()


def features(rows, height, width, unet, seed=0):
    """What a middle block is given."""
    channels, dim = unet.middle_block[0].emb_layers[1].in_features, unet.middle_block[1]
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim.proj_in.in_channels, height, width, generator=draw)
    context = torch.randn(rows, 77, dim.transformer_blocks[0].attn2.to_k.in_features, generator=draw)
    return x, torch.randn(rows, channels, generator=draw), context


@torch.no_grad()
def test_blocks_are_compiled_by_kind_and_for_any_size_after_the_first(networks, counted):
    backend, graphs = counted
    plain, middle = networks["unet"].middle_block, copy.deepcopy(networks["unet"].middle_block)
    compile_blocks(middle, backend=backend)
    compiled = []
    for seed, size in enumerate([(3, 4, 4), (3, 4, 4), (3, 4, 6), (3, 6, 6), (3, 8, 4), (3, 6, 8)]):
        given = features(*size, networks["unet"], seed)
        assert error(middle(*given), plain(*given)) <= 1e-6
        compiled.append(len(graphs))
    assert compiled[0] == 2  # three blocks, of two kinds
    assert compiled == [2, 2, 4, compiled[3], compiled[3], compiled[3]] and compiled[3] <= 6


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_network_of_compiled_blocks(networks, counted):
    backend, graphs = counted
    unet, dim = copy.deepcopy(networks["unet"]), networks["unet"].middle_block[1].transformer_blocks[0].attn2.to_k
    compile_blocks(unet, backend=backend)
    for rows in (3, 1):
        given = torch.randn(rows, 8, 16, 16), torch.full((rows,), 417.3), torch.randn(rows, 77, dim.in_features)
        assert error(unet(*given), networks["unet"](*given)) <= 1e-6
    assert len(graphs) < 2 * sum(isinstance(m, BLOCKS) for m in unet.modules())


@torch.no_grad()
def test_a_changed_layer_is_compiled(networks, counted, monkeypatch):
    backend, graphs = counted
    block, middle = type(networks["unet"].middle_block[0]), copy.deepcopy(networks["unet"].middle_block)
    forward, given = block.forward, features(1, 4, 4, networks["unet"])
    before = middle(*given)
    monkeypatch.setattr(block, "forward", lambda self, x, emb: 0.5 * forward(self, x, emb))
    compile_blocks(middle, backend=backend)
    assert error(middle(*given), networks["unet"].middle_block(*given)) <= 1e-6 < error(middle(*given), before)
    assert graphs


class Called(NamedTuple):
    run: Callable
    unet: nn.Module

    def replay(self, given):
        return self.run(self.unet, *given)


@pytest.fixture
def make(monkeypatch, tmp_path, shipped):
    """A compiled editor over the stand-in for a card, by a given backend."""
    card = Card()  # its recorder would keep PyTorch from compiling, so a recording is a call here
    monkeypatch.setattr(graphs_module, "cuda", card)
    monkeypatch.setattr(Graphs, "record", lambda self, run, unet, given: Called(run, unet))
    monkeypatch.setattr(graphs_module, "LOCKS", {})
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(compile_module, "CACHE", tmp_path / "compiled")
    torch._dynamo.reset()

    def made(backend):
        asked = {}

        def compiled(unet, **options):
            asked.update(options)
            compile_blocks(unet.middle_block, backend=backend)

        monkeypatch.setattr(compile_module, "compile_blocks", compiled)
        parts = {name: copy.deepcopy(getattr(shipped, name)) for name in ("unet", "vae", "text")}
        with pytest.warns(UserWarning, match=f"compiles first.*{tmp_path}"):  # before it does
            editor = CompiledEditor(shipped.config, **parts)
        return editor, asked

    yield made
    torch._dynamo.reset()


def test_compiled_edits_are_recorded_and_equal_plain_ones(make, shipped, edited):
    editor, asked = make(lambda graph, inputs: graph.forward)
    assert asked == {"whole": False, "dynamic": None, "options": None}  # the default mode
    for settings in ({"steps": 3, "image_scale": 1.5}, {"steps": 4, "reuse": 2}):
        for _ in range(2):
            assert error(edited(editor, **settings), edited(shipped, **settings)) <= 1e-5
    assert len(editor.graphs.kept) == 3  # the first, and the second's calls with deep layers and without
    assert editor.compiled


def test_another_thread_may_compile_as_often(make, edited):
    """PyTorch's settings are each thread's own, and the studio edits in another than the one that loaded."""
    editor, _ = make(lambda graph, inputs: graph.forward)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(edited, editor, steps=1).result()
        assert pool.submit(lambda: torch._dynamo.config.recompile_limit).result() == LIMIT
        assert pool.submit(lambda: torch._dynamo.config.accumulated_recompile_limit).result() == LIMIT


def test_where_it_cannot_be_compiled(make, edited):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    editor, _ = make(backend)
    with pytest.raises(EmilieError, match="cannot be compiled here: .*without compile") as seen:
        edited(editor, steps=1)
    assert "\n" not in str(seen.value)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same_numbers(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    unet, d = copy.deepcopy(shipped.unet).to(memory_format=torch.channels_last), shipped.config
    compile_blocks(unet)
    given = torch.randn(3, 8, 16, 16), torch.full((3,), 417.3), torch.randn(3, 77, d.unet.context_dim)
    assert error(unet(*given), shipped.unet(*given)) <= 1e-5
    assert any(tmp_path.iterdir())
    torch._dynamo.reset()


def test_what_is_tried(monkeypatch):
    monkeypatch.setenv("EMILIE_TRY", "pad_heads, conv_1x1_as_mm=1,epilogue_fusion=0 ,")
    assert tried() == {"pad_heads"}
    assert inductor_options() == {"conv_1x1_as_mm": True, "epilogue_fusion": False}
    for wrong in ("pad_head", "no_such_option=1", "conv_1x1_as_mm=yes"):
        monkeypatch.setenv("EMILIE_TRY", wrong)
        with pytest.raises(EmilieError, match="EMILIE_TRY"):
            tried(), inductor_options()
    monkeypatch.delenv("EMILIE_TRY")
    assert tried() == set() and inductor_options() == {}


@pytest.mark.parametrize(
    ("device", "compile", "low_memory", "kind"),
    [
        ("cuda", False, False, GraphEditor),
        ("cuda", None, False, GraphEditor),
        ("cuda", True, False, CompiledEditor),
        ("cuda", False, True, LowMemoryEditor),
        ("cpu", False, False, Editor),
        ("cpu", None, False, FastEditor),
        ("cpu", True, False, FastEditor),
        ("cpu", None, True, LowMemoryEditor),
        ("meta", None, False, Editor),
    ],
)
def test_how_an_editor_computes_follows_from_the_device(device, compile, low_memory, kind):
    assert editor_class(torch.device(device), compile, low_memory) is kind


def test_plain_is_plain(monkeypatch):
    assert type(emilie.load(device="cpu", plain=True, compile=None)) is Editor
    for other in ("compile", "low_memory"):
        with pytest.raises(EmilieError, match="choose one"):
            emilie.load(device="cpu", plain=True, **{other: True})
    monkeypatch.setattr(loading, "pick_device", torch.device)
    with pytest.raises(EmilieError, match="CUDA and the CPU"):
        emilie.load("random", "toy", device="mps", compile=True)


def test_the_cache_is_the_users_own_if_he_has_one(make, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    make(lambda graph, inputs: graph.forward)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "own")
