"""CUDA graphs without a card: the bookkeeping, against the stand-in of `card.py`."""

import copy
import threading
import warnings

import pytest
import torch
from card import Card
from pseudo import error

import emilie_min as emilie
from emilie_min import unet as layers
from emilie_min.emilie import Editor
from emilie_min.faster import graph as graphs_module
from emilie_min.faster.graph import KEEP, WARM_UP, GraphEditor, Graphs
from emilie_min.faster.tries import pad_heads
from emilie_min.sampling import get_sigmas, noise_stream
from emilie_min.toy import world

NIGHT, DAY = "make it night", "make it day"
LEFT, RIGHT = (0, 0, 30, 64), (34, 0, 64, 64)
CPU = torch.device("cpu")


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setattr(graphs_module, "cuda", card)
    monkeypatch.setattr(graphs_module, "LOCKS", {})
    return card


@pytest.fixture(scope="module")
def plain():
    return emilie.load(device="cpu")


@pytest.fixture
def graphed(card, plain):
    """The shipped model over weights of its own."""
    parts = {name: copy.deepcopy(getattr(plain, name)) for name in ("unet", "vae", "text")}
    return GraphEditor(plain.config, **parts)


def edited(editor, instruction=NIGHT, size=64, **settings):
    canvas = emilie.open(world.render(world.scene(3)).resize((size, size)), editor, seed=5, resolution=size)
    canvas.edit(instruction, **{"steps": 3} | settings)
    return canvas.latent


def captures(card):
    return card.log.count("capture")


@pytest.mark.parametrize(
    ("settings", "recordings"),
    [
        ({}, 1),
        ({"image_scale": 1.5, "mask": LEFT, "gate": "guidance"}, 1),  # a map as scale stays outside of the graph
        ({"mask": LEFT, "keep_background": True}, 1),
        ({"instruction": [(NIGHT, LEFT), (DAY, RIGHT)]}, 1),
        ({"reuse": 2, "steps": 4}, 2),
        ({"sampler": "dpmpp_2m"}, 1),
        ({"guidance_interval": (0.4, 4.0), "reuse": 2, "steps": 8}, 4),
    ],
    ids=str,
)
def test_replayed_edits_equal_plain_ones(card, plain, graphed, settings, recordings):
    for _ in range(2):
        assert error(edited(graphed, **settings), edited(plain, **settings)) <= 1e-5
        assert captures(card) == recordings  # at the first edit, and none at the second


def inputs(plain, rows=3, side=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    context = torch.randn(rows, 77, plain.config.unet.context_dim, generator=draw)
    return torch.randn(rows, 8, side, side, generator=draw), torch.full((rows,), 417.3), context


def call(module, *given):
    return module(*given)


@torch.no_grad()
def test_a_replay_runs_no_python_and_reads_what_is_given(card, plain):
    ran = []

    def run(unet, *given):
        ran.append(1)
        return unet(*given)

    graphs = Graphs(CPU)
    for seed in range(3):
        given = inputs(plain, seed=seed)
        assert torch.equal(graphs(run, plain.unet, *given), plain.unet(*given))
    assert len(ran) == WARM_UP + 1


@torch.no_grad()
def test_outputs_are_the_callers(card, plain):
    graphs, one, other = Graphs(CPU), inputs(plain, seed=1), inputs(plain, rows=1, seed=2)
    first = graphs(call, plain.unet, *one)
    kept = first.clone()
    graphs(call, plain.unet, *inputs(plain, seed=3))  # the same graph
    graphs(call, plain.unet, *other)  # another one, of the same memory
    assert torch.equal(first, kept)
    assert torch.equal(graphs(call, plain.unet, *one), kept)
    assert len(card.pools) == 1


@torch.no_grad()
def test_it_warms_up_on_a_side_stream_and_waits(card, plain):
    graphs = Graphs(CPU)
    for _ in range(2):
        graphs(call, plain.unet, *inputs(plain))
    first = ["side waits", "side", "back", "waits for side", "capture", "event"]
    assert card.log == [*first, "wait done", "event"]


@torch.no_grad()
def test_the_least_used_shape_is_dropped(card, plain, monkeypatch):
    monkeypatch.setattr(graphs_module, "KEEP", 2)
    graphs = Graphs(CPU)

    def recorded(rows):
        before = captures(card)
        graphs(call, plain.unet, *inputs(plain, rows=rows))
        return captures(card) > before

    assert [recorded(rows) for rows in (1, 2, 1, 3, 1, 2)] == [True, True, False, True, False, True]
    assert len(graphs.kept) == 2 and KEEP >= 4
    assert card.log[card.log.index("synchronize") + 1] != "event"  # waited for before it is dropped


@torch.no_grad()
@pytest.mark.parametrize("change", ["class", "instance", "layer", "weights", "attention"])
def test_a_changed_layer_takes_effect(card, plain, graphed, monkeypatch, change):
    unet, graphs, given = graphed.unet, graphed.graphs, inputs(plain)
    before = graphs(call, unet, *given)
    block = unet.middle_block[0]
    if change == "class":
        forward = layers.ResBlock.forward
        monkeypatch.setattr(layers.ResBlock, "forward", lambda self, x, emb: 0.5 * forward(self, x, emb))
    elif change == "instance":
        block.forward = lambda x, emb: x
    elif change == "layer":
        unet.middle_block[0] = copy.deepcopy(block)
        unet.middle_block[0].in_layers[2].weight.data *= 2
    elif change == "weights":
        block.in_layers[2].weight.data = 2 * block.in_layers[2].weight.data  # somewhere else
    else:
        monkeypatch.setattr(layers, "attention", lambda q, k, v: v.mean(2, keepdim=True).expand_as(q))
    changed = graphs(call, unet, *given)
    assert torch.equal(changed, unet(*given)) and not torch.equal(changed, before)
    assert captures(card) == 2


@torch.no_grad()
def test_weights_changed_in_place_need_no_other_graph(card, graphed, plain):
    given = inputs(plain)
    before = graphed.graphs(call, graphed.unet, *given)
    graphed.unet.middle_block[0].in_layers[2].weight.data.mul_(2)
    changed = graphed.graphs(call, graphed.unet, *given)
    assert torch.equal(changed, graphed.unet(*given)) and not torch.equal(changed, before)
    assert captures(card) == 1


@torch.no_grad()
def test_hooks_are_called(card, graphed, plain):
    given, rows = inputs(plain), []
    graphed.graphs(call, graphed.unet, *given)
    with graphed.unet.middle_block.register_forward_hook(lambda *_: rows.append(1)):
        graphed.graphs(call, graphed.unet, *given)
        assert rows == [1]
    graphed.graphs(call, graphed.unet, *given)
    assert rows == [1] and captures(card) == 1


def test_where_recording_fails_it_is_eager_with_one_warning(card, plain, graphed, monkeypatch):
    forward = layers.Upsample.forward
    monkeypatch.setattr(layers.Upsample, "forward", lambda self, x: forward(self, x) * (1 + 0 * x.sum().item()))
    with pytest.warns(UserWarning, match="no CUDA graph.*same result: operation not permitted") as seen:
        for rows in ({}, {"guidance_interval": (0.4, 4.0)}):
            assert error(edited(graphed, **rows), edited(plain, **rows)) <= 1e-5
    assert len(seen) == 1
    assert captures(card) == 2  # each shape is tried once
    monkeypatch.undo()


def test_out_of_memory_while_warming_up(card, plain, graphed, monkeypatch):
    edited(graphed)
    assert captures(card) == 1 and len(card.pools) == 1
    forward, calls = layers.UNetModel.forward, []

    def short(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, *given)

    monkeypatch.setattr(layers.UNetModel, "forward", short)
    with pytest.warns(UserWarning, match="memory is short"):
        edited(graphed)
    assert list(graphed.graphs.kept.values()) == [None]  # the others' memory was given back
    assert card.log.index("empty") > card.log.index("synchronize")
    monkeypatch.setattr(layers.UNetModel, "forward", forward)
    edited(graphed)
    assert len(card.pools) == 2  # a dropped pool's handle is not used again


@torch.no_grad()
def test_what_is_forgotten_is_recorded_anew_in_memory_of_its_own(card, plain):
    graphs = Graphs(CPU)
    for _ in range(2):
        graphs(call, plain.unet, *inputs(plain))
        graphs.clear()
        assert not graphs.kept and card.log[-2:] == ["synchronize", "empty"]
    assert captures(card) == 2 and len(card.pools) == 2  # a handle whose graphs are gone is not used again


@torch.no_grad()
def test_two_ways_to_call_a_network_are_two_graphs(card, plain):
    graphs, given = Graphs(CPU), inputs(plain)
    once = graphs(call, plain.unet, *given)
    assert torch.equal(graphs(lambda unet, *x: 2 * unet(*x), plain.unet, *given), 2 * once)


def test_the_networks_own_errors_are_raised_once(card, graphed, monkeypatch):
    calls = []

    def broken(self, x, emb):
        calls.append(1)
        raise RuntimeError("mat1 and mat2 do not fit")

    monkeypatch.setattr(layers.ResBlock, "forward", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="do not fit"):
            edited(graphed)
    assert len(calls) == 1 and not graphed.graphs.kept
    monkeypatch.undo()


def test_what_needs_room_gets_that_of_the_graphs(card, graphed):
    edited(graphed)
    tries = []

    def decode(z):
        tries.append(1)
        if graphed.graphs.kept:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return z

    assert graphed.graphs.with_room(decode, 5) == 5 and len(tries) == 2
    graphed.graphs.kept.clear()

    nevers = []

    def never(z):
        nevers.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for _ in range(2):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            graphed.graphs.with_room(never, 5)
    assert len(nevers) == 2  # without graphs there is nothing to be had by trying again


def test_a_call_from_another_thread_and_a_second_editor(card, plain, graphed):
    second = GraphEditor(plain.config, **{n: copy.deepcopy(getattr(plain, n)) for n in ("unet", "vae", "text")})
    assert graphed.graphs.lock is second.graphs.lock  # they are on one device
    expected, found = edited(plain), {}

    def work(name, editor):
        found[name] = [edited(editor) for _ in range(3)]

    threads = [
        threading.Thread(target=work, args=(i, editor)) for i, editor in enumerate((graphed, second, graphed, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found[i]) for i in range(4)] == [3] * 4
    assert all(error(latent, expected) <= 1e-5 for latents in found.values() for latent in latents)
    assert captures(card) == 2  # one for each editor, whoever comes first


def test_several_sizes_in_one_session(card, plain, graphed):
    for size in (64, 96, 64, 96):
        assert error(edited(graphed, size=size), edited(plain, size=size)) <= 1e-5
    assert captures(card) == 2


def test_an_editor_of_deep_features_shares_the_graphs(card, graphed):
    for _ in range(2):
        edited(graphed, reuse=2, steps=4)
        edited(graphed)
    assert captures(card) == 3


def test_noise_levels_of_rows_and_batches(card, plain, graphed):
    draw = torch.Generator().manual_seed(0)
    x, z_img = torch.randn(2, 3, 4, 16, 16, generator=draw)
    cond, uncond = plain.context([NIGHT, ""]).split(1)
    for levels in (2.0, torch.tensor([0.5, 2.0, 8.0])):
        given = (x, levels, z_img, cond, uncond, 3.0, 1.5)
        assert error(graphed.denoise(*given), plain.denoise(*given)) <= 1e-5
    assert captures(card) == 1


def test_the_methods_own_loop_takes_it(card, plain, graphed):
    z_img = torch.randn(1, 4, 16, 16)
    cond, null = plain.context([NIGHT, ""]).split(1)
    sigmas = get_sigmas(3, plain.alphas_cumprod)

    def sampled(editor):
        return editor.sample(z_img, cond, null, sigmas, z_img, noise_stream(tuple(z_img.shape), 1))

    assert error(sampled(graphed), sampled(plain)) <= 1e-5


@torch.no_grad()
def test_padded_heads_give_the_same(plain):
    unet, given = copy.deepcopy(plain.unet), inputs(plain)
    pad_heads(unet)
    assert error(unet(*given), plain.unet(*given)) <= 1e-5
    widths = {m.to_q.out_features // m.heads for m in unet.modules() if isinstance(m, layers.CrossAttention)}
    assert widths == {64}


def test_the_autoencoder_can_be_recorded_too(card, plain, monkeypatch):
    monkeypatch.setenv("EMILIE_TRY", "vae")
    graphed = GraphEditor(plain.config, plain.unet, plain.vae, plain.text)
    for _ in range(2):
        assert error(edited(graphed), edited(plain)) <= 1e-5
        picture = torch.rand(1, 3, 64, 64)
        assert error(graphed.decode(graphed.encode(picture)), plain.decode(plain.encode(picture))) <= 1e-5
    assert captures(card) == 3


def test_it_is_an_editor(graphed):
    assert isinstance(graphed, Editor) and not graphed.compiled
