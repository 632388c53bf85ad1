"""A stand-in for `torch.cuda` on the CPU: a "graph" records a call's operators and replays them.

What it replays is what a graph would: the operators of the recording on the memory that they used, and no Python. Like
graphs of one memory pool, a replay spoils what the other recordings of its pool gave.
"""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def tensors(out):
    return [y for y in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(y, torch.Tensor)]


def memory(y):
    return y.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Card:
    """What `torch.cuda` is asked for, on the CPU, and a log of it."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self):
        self.log, self.pools, self.capturing = [], [], 0

    class CUDAGraph:
        def __init__(self):
            self.calls = []

        def replay(self):
            for other in self.pool:
                if other is not self:
                    other.spoil()
            for func, args, kwargs, out in self.calls:
                for y, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if y.data_ptr() != new.data_ptr():
                        y.copy_(new)

        def spoil(self):
            """What the graph made itself is lost; its inputs and the weights, and views of them, are not."""
            made = [y for *_, out in self.calls for y in tensors(out)]
            own = {id(y) for y in made}
            given = {memory(y) for _, args, _, _ in self.calls for y in tensors(args) if id(y) not in own}
            for y in made:
                if memory(y) not in given and y.is_floating_point():
                    y.fill_(float("nan"))

    @contextmanager
    def graph(self, graph, **options):
        inspect.signature(torch.cuda.graph).bind(graph, **options)
        assert options["capture_error_mode"] == "thread_local" and options["stream"] is not None
        assert self.capturing == 0, "two recordings at once"
        self.capturing += 1
        self.log.append("capture")
        try:
            with Recorder(graph.calls):
                yield
        finally:
            self.capturing -= 1
        graph.pool = options["pool"]
        graph.pool.append(graph)

    def graph_pool_handle(self):
        self.pools.append([])
        return self.pools[-1]

    def Stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("side waits"))

    def current_stream(self, device):
        return SimpleNamespace(
            wait_stream=lambda other: self.log.append("waits for side"),
            wait_event=lambda event: self.log.append(f"wait {event}"),
            record_event=lambda: self.log.append("event") or "done",
        )

    @contextmanager
    def stream(self, stream):
        self.log.append("side")
        yield
        self.log.append("back")

    @contextmanager
    def device(self, device):
        yield

    def current_device(self):
        return 0

    def synchronize(self, device):
        self.log.append("synchronize")

    def empty_cache(self):
        self.log.append("empty")
