"""What is measured, one thing a function: whether two compute the same, seconds, FLOPs, kernels, memory."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoint.networks import build
from ..config import Config
from ..errors import EmilieError
from ..text import LENGTH
from .against import Backend, builders, noise_like

# Relative L2 error between implementations; bfloat16 has three bits fewer than float16, so 8 times its rounding. Where
# these come from: diffusers keeps its latents in half precision, which over the check's steps is 0.005 and 0.04.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.6e-1}
SIGMA = 1.6  # of the step that is timed alone, about the schedule's middle
CHECK_STEPS = 4  # timesteps 999, 666, 333, 0: whole, where interpolating sigma or log sigma is the same
KINDS = {  # of a kernel, or on a CPU of an operator, by the first pattern that its name in small letters matches
    "attention": "attention|flash|fmha|sdpa",
    "convolutions": "conv|cudnn|fprop|winograd|nchw|nhwc",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitk|matmul|::(add|b|baddb)?mm|triton_tem",
    "norms": "norm|moments|welford|fusedparams|triton_(red|per)",
}


class Inputs:
    """One batch: pictures and token ids for an edit, and latents for its parts; numbers are random, and always these.

    The latents are unit normal: an untrained network's outputs then stay finite in half precision too.
    """

    def __init__(self, backend: Backend, resolution: int, batch: int):
        editor, generator = backend.editor, torch.Generator().manual_seed(0)
        pixels = 2 * torch.rand((batch, 3, resolution, resolution), generator=generator) - 1
        self.pixels = pixels.to(editor.device, editor.dtype)
        ids = torch.randint(60, (batch + 1, LENGTH), generator=generator)  # every vocabulary has these
        self.token_ids = ids.to(editor.device)
        shape = backend.encode(self.pixels).shape
        self.noise, z_img = (torch.randn(shape, generator=generator).to(editor.device) for _ in range(2))
        self.given = (z_img, *backend.text(self.token_ids).split([batch, 1]))  # z_img, cond, uncond
        self.x = self.noise * (SIGMA**2 + 1) ** 0.5


def outputs(backend: Backend, inputs: Inputs, whole: bool = True) -> dict[str, Tensor]:
    """What each part makes of the same input; of a step the guided noise prediction. whole: of an edit's other parts
    too."""
    out = {"step": inputs.x - backend.step(inputs.x, SIGMA, inputs.given)}
    if whole:
        out["encode"], out["text"] = backend.encode(inputs.pixels), backend.text(inputs.token_ids)
        out["sample"] = backend.sample(inputs.given, inputs.noise, CHECK_STEPS, noise_like(inputs.noise, seed=1))
        out["decode"] = backend.decode(inputs.noise)
    return {key: value.float() for key, value in out.items()}


def check(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 error of each part. Raises EmilieError where one exceeds what rounding in dtype explains."""
    errors = {key: ((found[key] - y).norm() / y.norm()).item() for key, y in expected.items()}
    for key, error in errors.items():
        if not error < LIMITS[dtype]:
            raise EmilieError(
                f"{name} does not compute what the others do: {key} is off by {error:.2g} of its norm, and only "
                f"{LIMITS[dtype]:g} is rounding in {dtype}; it is not timed".replace("torch.", "")
            )
    return errors


def step_seconds(backend: Backend, inputs: Inputs) -> float:
    """Of one guided step, after a first one that warms up: the median of as many as take 0.3 s, at least one."""
    given = {"step": lambda: backend.step(inputs.x, SIGMA, inputs.given)}
    timer = Timer("step()", globals=given, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median


def wait_for(backend: Backend) -> None:
    if backend.editor.device.type == "cuda":
        torch.cuda.synchronize()


def edit_seconds(backend: Backend, inputs: Inputs, steps: int) -> dict[str, float]:
    """Of each stage of an edit of the batch, and of the whole."""
    marks = []

    def mark() -> None:
        wait_for(backend)
        marks.append(time.perf_counter())

    mark()
    z_img = backend.encode(inputs.pixels)
    mark()
    cond, uncond = backend.text(inputs.token_ids).split([len(z_img), 1])
    mark()
    z = backend.sample((z_img, cond, uncond), inputs.noise, steps)
    mark()
    backend.decode(z)
    mark()
    stages = dict(zip(("encode", "text", "sample", "decode"), (b - a for a, b in pairwise(marks))))
    return stages | {"edit": marks[-1] - marks[0]}


def flops(config: Config, resolution: int, batch: int) -> dict[str, int]:
    """FLOPs of the plain networks for a batch of edits: "encode", "text", "step" (one guided UNet call), "decode".

    Counted on the meta device: nothing is computed, and attention, which the counter does not know in the CPU's fused
    form, is made of matrix products there.
    """
    counted = {}

    def count(part: str, run, *args) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            out = run(*args)
        counted[part] = counter.get_total_flops()
        return out

    with torch.device("meta"), torch.no_grad():
        networks, n = build(config), 3 * batch  # rows of the three branches
        z = count("encode", networks["vae"].encode, torch.empty(batch, 3, resolution, resolution))
        context = count("text", networks["text"], torch.zeros(batch + 1, LENGTH, dtype=torch.long))
        stacked = torch.cat([z, z], dim=1).repeat(3, 1, 1, 1)
        count("step", networks["unet"], stacked, torch.zeros(n), context[:1].expand(n, -1, -1))
        count("decode", networks["vae"].decode, z)
    return counted


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, the best of a few: what this machine gives at this moment."""
    slow = device.type == "cpu" and dtype != torch.float32  # half precision can be 100 times slower on a CPU
    size = size or (8192 if device.type == "cuda" else 512 if slow else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=0.1).times)


def profile(backend: Backend, inputs: Inputs, steps: int = 3) -> dict[str, float]:
    """Where the seconds of a step go: its kernels (on a CPU its operators) by kind, and the gaps between them.

    The step is timed without the profiler, under which launches take longer and kernels do not.
    """
    cuda = backend.editor.device.type == "cuda"
    activities = [getattr(torch.profiler.ProfilerActivity, name) for name in (("CPU", "CUDA") if cuda else ("CPU",))]
    seconds = step_seconds(backend, inputs)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            backend.step(inputs.x, SIGMA, inputs.given)
        wait_for(backend)
    spent, number = dict.fromkeys([*KINDS, "the rest"], 0.0), 0
    for event in profiler.events():
        if event.device_type.name == ("CUDA" if cuda else "CPU") and not event.is_user_annotation:
            microseconds = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            spent[kind_of(event.name)] += microseconds / 1e6 / steps
            number += 1
    return {"step": seconds, "kernels": number / steps, **spent, "gaps": max(0.0, seconds - sum(spent.values()))}


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "the rest")


def machine(editor) -> dict:
    """What measures, in JSON's types."""
    cuda, cpu = editor.device.type == "cuda", platform.processor()
    with suppress(OSError, TypeError):  # on Linux that is no name
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    loaded = {name: sys.modules.get(name) for name in ("torch", "diffusers")}
    versions = {name: module.__version__ for name, module in loaded.items() if module}
    return {
        "name": torch.cuda.get_device_name(editor.device) if cuda else cpu,
        "cuda": cuda,
        "threads": torch.get_num_threads(),
        "dtype": str(editor.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), **versions},
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "command": ["emilie", *sys.argv[1:]],
    }


def measure_in_subprocess(setting: Namespace, name: str, tried: str | None = None) -> dict:
    """What `alone` tells of a backend, in a process that does nothing else. tried: its EMILIE_TRY, see `faster.tries`.
    Raises EmilieError."""
    code = "import json, sys; from emilie_min.speed import measure; measure.alone(*json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", code, json.dumps([vars(setting), name, tried is not None])]
    env = os.environ | ({} if tried is None else {"EMILIE_TRY": tried})
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EmilieError(f"measuring {name} in a process of its own failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def alone(setting: dict, name: str, timed: bool = False) -> None:
    """Print, as JSON, this process's peak once loaded, after a guided step and after a short edit, in bytes.

    "loaded", "step", "edit": resident; on CUDA also "step_cuda", "edit_cuda", [allocated, reserved] on the device by a
    second run: CUDA graphs' memory shows in the latter alone. "ready_s": until all has run once, compiled if need be.
    timed: also "seconds", of a step and of the stages of a short edit.
    """
    setting = Namespace(**setting)
    if setting.threads:
        torch.set_num_threads(setting.threads)
    backend = builders(setting)[name]()
    peaks, started = {"loaded": peak_rss()}, time.perf_counter()
    inputs = Inputs(backend, setting.resolution, setting.batch[0])
    peaks["ready_s"] = time.perf_counter() - started
    forget_peak()  # random weights are drawn in float32
    parts = {"step": lambda: backend.step(inputs.x, SIGMA, inputs.given)}
    if not setting.unet_only:
        parts["edit"] = lambda: edit_seconds(backend, inputs, 2)
    for part, run in parts.items():
        started = time.perf_counter()
        run()
        wait_for(backend)
        peaks["ready_s"] += time.perf_counter() - started
        peaks[part] = peak_rss()
        if backend.editor.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peaks[f"{part}_cuda"] = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    if timed:
        peaks["seconds"] = {"step": step_seconds(backend, inputs)} | edit_seconds(backend, inputs, 2)
    print(json.dumps(peaks))


def forget_peak() -> None:
    """Begin `peak_rss` anew from what is resident now, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The most bytes that this process had resident, 0 on Windows. On Linux not `ru_maxrss`, its parent's at first."""
    try:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        try:
            import resource
        except ImportError:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
