"""On CUDA the default, `load()`: the readable network, its calls captured as CUDA graphs and replayed.

Half of an eager step goes by with launching kernels one by one. A graph is the recording of one call's kernels, which
are launched together: at the first call of a new shape the network runs and is recorded, from then on it is replayed.
There is no second implementation: what is recorded is what `unet.py` does. A layer that is changed, swapped, hooked or
moved afterwards is seen too (see `network_state`). The weights lie channels last, as CUDA's convolutions want them.
"""

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, cuda, nn

from .. import unet as layers
from ..emilie import Editor
from ..errors import printable
from ..sampling import Denoise, Noise, Scale, Step
from ..vae import AutoencoderKL
from .deepcache import DeepCache
from .tries import pad_heads, tried

KEEP = 8  # graphs of an editor: one edit may need four, with and without guidance, with deep layers and without
WARM_UP = 3  # calls before the recording, in which cuDNN and cuBLAS choose their algorithms
LOCKS: dict[torch.device, threading.RLock] = {}  # a device records or replays one call at a time


class GraphEditor(Editor):
    """An `Editor` whose UNet is replayed from graphs, and whose steps never wait for the device in between."""

    compiled = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.graphs, self.vae_too = Graphs(self.device), "vae" in tried()
        if "pad_heads" in tried():
            pad_heads(self.unet)
        if "cudnn_benchmark" in tried():
            torch.backends.cudnn.benchmark = True

    def branches(
        self, x: Sequence[Tensor], sigma: Scale, seen: Sequence[Tensor], told: Sequence[Tensor]
    ) -> list[Tensor]:
        """As `Editor.branches`; behind `DeepCache` a call with its deep layers and one without are two graphs."""
        replayed: Any = copy.copy(self)
        if isinstance(self.unet, DeepCache):
            replayed.unet = copy.copy(self.unet)  # which shares the features that it keeps
            replayed.unet.call = self.graphs
        else:
            replayed.unet = partial(self.graphs, nn.Module.__call__, self.unet)
        return Editor.branches(replayed, x, sigma, seen, told)

    def steps(
        self, denoise: Denoise, sigmas: Tensor, noise_init: Tensor, noise_sampler: Noise, *args: Any, **kwargs: Any
    ) -> Iterator[Step]:
        """As `Editor.steps`; the noise is sent from pinned memory, so that the host runs ahead of the device."""

        def sent(*levels: float) -> Tensor:
            noise = noise_sampler(*levels)
            return noise.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else noise

        return super().steps(denoise, sigmas, noise_init, sent, *args, **kwargs)

    def encode(self, image: Tensor) -> Tensor:
        return self.graphs.with_room(Editor.encode, self.with_graphed_vae(), image)

    def decode(self, z: Tensor) -> Tensor:
        """As `Editor.decode`; the autoencoder's second try in float32 is never in a graph."""
        image = self.graphs.with_room(Editor.decode, self.with_graphed_vae(), z)
        return image if not self.vae_too or image.isfinite().all() else super().decode(z)

    def with_graphed_vae(self) -> Any:
        """This editor, or if that is tried one whose autoencoder is replayed from graphs."""
        if not self.vae_too:
            return self
        replayed: Any = copy.copy(self)
        replayed.vae = SimpleNamespace(
            encode=partial(self.graphs, AutoencoderKL.encode, self.vae),
            decode=partial(self.graphs, AutoencoderKL.decode, self.vae),
        )
        return replayed


@dataclass
class Recording:
    """A graph and the memory that it reads from and writes to."""

    graph: cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Tensor | tuple[Tensor, ...]

    def replay(self, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        for fixed, given in zip(self.inputs, inputs, strict=True):
            fixed.copy_(given)
        self.graph.replay()
        if isinstance(self.outputs, Tensor):
            return self.outputs.clone()  # the next replay of any graph may overwrite it: they share their memory
        return tuple(y.clone() for y in self.outputs)


class Graphs:
    """Calls of a network, recorded once for every shape and replayed; the `KEEP` used last are kept.

    A replay is right from any thread and stream: a lock and an event keep one after another. Where recording fails or
    memory is short the call runs eagerly, and one warning says so.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device.type, cuda.current_device() if device.index is None else device.index)
        self.lock = LOCKS.setdefault(self.device, threading.RLock())
        self.kept: OrderedDict[Hashable, Recording | None] = OrderedDict()  # None: to be run eagerly
        self.pool: Any = None  # the memory that all share, since no two run at once
        self.stream: cuda.Stream | None = None
        self.done: cuda.Event | None = None  # when the last replay's outputs were copied out
        self.warned = False

    def __call__(self, run: Callable, network: nn.Module, *inputs: Tensor) -> Any:
        """`run(network, *inputs)`, which takes and returns tensors of one device. What is returned is the caller's."""
        key = self.key(run, network, inputs)
        if key is not None:
            with self.lock, cuda.device(self.device):
                recording = self.recorded(key, run, network, inputs)
                if recording is not None:
                    stream = cuda.current_stream(self.device)
                    if self.done is not None:
                        stream.wait_event(self.done)
                    outputs = recording.replay(inputs)
                    self.done = stream.record_event()
                    return outputs
        return self.with_room(run, network, *inputs)

    def recorded(self, key: Hashable, run: Callable, network: nn.Module, inputs: Sequence[Tensor]) -> Recording | None:
        """The recording for a key, made now where there is none, in place of the one that was used least lately."""
        if key not in self.kept:
            if len(self.kept) >= KEEP:
                cuda.synchronize(self.device)  # it may still be running
                self.kept.popitem(last=False)
            self.kept[key] = self.record(run, network, inputs)
        self.kept.move_to_end(key)
        return self.kept[key]

    def key(self, run: Callable, network: nn.Module, inputs: Sequence[Tensor]) -> Hashable | None:
        """What a recording holds for: the inputs' shapes and the network as it is. None: it cannot be recorded."""
        state = network_state(network)
        mode = torch.is_inference_mode_enabled()
        return None if state is None else (run, state, mode, *((y.shape, y.dtype, y.device) for y in inputs))

    def record(self, run: Callable, network: nn.Module, inputs: Sequence[Tensor]) -> Recording | None:
        """A call as a graph, or None where that cannot be had. What the network itself raises is raised."""
        stream, warm, short, reason = cuda.current_stream(self.device), False, True, "memory is short"
        self.stream = cuda.Stream(self.device) if self.stream is None else self.stream
        self.pool = cuda.graph_pool_handle() if self.pool is None else self.pool
        try:
            fixed = [y.clone() for y in inputs]
            self.stream.wait_stream(stream)
            with cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    run(network, *fixed)
            stream.wait_stream(self.stream)
            warm, graph = True, cuda.CUDAGraph()
            with cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                outputs = run(network, *fixed)
            return Recording(graph, fixed, outputs)
        except RuntimeError as error:
            if not isinstance(error, cuda.OutOfMemoryError):
                if not warm:
                    raise
                short, reason = False, printable(str(error).strip().partition("\n")[0] or type(error).__name__)
            self.pool = None  # after a failure they are not to be trusted
        self.stream = None
        if short:
            self.drop()
        if not self.warned:
            warnings.warn(f"no CUDA graph, so slower steps and the same result: {reason}", stacklevel=2)
        self.warned = True
        return None

    def with_room(self, run: Callable, *args: Any) -> Any:
        """`run(*args)`; where memory is short once more, without the graphs."""
        try:
            return run(*args)
        except cuda.OutOfMemoryError:
            if not any(self.kept.values()):
                raise
        self.drop()
        return run(*args)

    def drop(self) -> None:
        """Give the recordings' memory back; what could not be recorded still runs eagerly."""
        with self.lock, cuda.device(self.device):
            cuda.synchronize(self.device)
            self.kept = OrderedDict((key, None) for key, recording in self.kept.items() if recording is None)
            self.pool = None  # a handle is good for as long as a graph holds it
            cuda.empty_cache()

    def clear(self) -> None:
        """Forget everything: the next call of each shape is recorded anew."""
        self.drop()
        self.kept.clear()


def network_state(network: nn.Module) -> Hashable | None:
    """What must be as it was for a recording, or a rewriting, of a network to stand for it: the code of every layer and
    where its weights lie. None where there are hooks, which those would pass over.

    Numbers that a layer keeps as plain attributes, and what weights hold, are not looked at.
    """
    if nn.modules.module._has_any_global_hook():
        return None
    found: list[Hashable] = [layers.attention]
    waiting: list[nn.Module] = [network]
    while waiting:
        module = waiting.pop()
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        found += (type(module).forward, module.__dict__.get("forward"), module._compiled_call_impl)
        found += [p.data_ptr() for p in module._parameters.values() if p is not None]
        waiting += [child for child in module._modules.values() if child is not None]
    return tuple(found)
