"""What `emilie speed` measures: first whether all compute the same, then seconds, FLOPs, the ceiling and memory."""

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from ..canvas.canvas import check_can_edit
from ..checkpoint.networks import build
from ..config import Config
from ..errors import EmilieError, explain_oom
from ..sampling import noise_stream
from ..text import LENGTH
from .against import Entrant, builders

# Relative L2 error between implementations; bfloat16 has three bits fewer than float16, so 8 times its rounding. Where
# these come from: diffusers keeps its latents in half precision, which over the check's steps is 0.005 and 0.04.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.6e-1}
SIGMA = 1.6  # of the step that is timed alone, about the schedule's middle
CHECK_STEPS = 4  # timesteps 999, 666, 333, 0: whole, where interpolating sigma or log sigma is the same


@dataclass
class Setting:
    """What to measure, in JSON's types; None and empty: see `emilie speed --help`."""

    weights: str = "random"
    config: str | None = "ip2p"
    device: str | None = None
    dtype: str | None = None
    steps: int = 20
    batches: list[int] = field(default_factory=list)
    resolution: int = 512
    compile: bool = False
    low_memory: bool = False
    against: list[str] = field(default_factory=list)
    repeats: int = 3
    threads: int | None = None
    unet_only: bool = False


class Clock:
    """Seconds between its calls: on CUDA by events, which the device itself passes, else by the wall."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []
        if self.cuda:
            torch.cuda.synchronize()
        self()

    def __call__(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter())
        if self.cuda:
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in zip(self.marks, self.marks[1:])]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors alive on a device, and their peak: the same on every machine.

    Counts what operators return, each storage once while it lives; not what kernels use inside themselves.
    """

    def __init__(self, device: torch.device, networks: list[nn.Module]):
        super().__init__()
        self.type, self.live, self.peak, self.seen = device.type, 0, 0, WeakIdKeyDictionary()
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                self.count(tensor)

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.seen or storage.device.type != self.type:
            return
        self.seen[storage] = size = storage.nbytes()
        finalize(storage, self.free, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, out)
        return out


class Inputs:
    """One batch: pictures and token ids for an edit, and latents for its parts; numbers are random, and always these.

    The stages' own inputs are unit normal: an untrained network's outputs then stay finite in half precision too.
    """

    def __init__(self, entrant: Entrant, batch: int, resolution: int):
        config, device = entrant.config, entrant.device
        text, generator = config.text, torch.Generator().manual_seed(0)
        side = resolution // entrant.factor
        self.shape = (batch, config.diffusion.channels, side, side)
        self.pixels = 2 * torch.rand((batch, 3, resolution, resolution), generator=generator) - 1
        self.pixels = self.pixels.to(device, entrant.dtype)
        self.token_ids = torch.randint(text.vocab_size, (batch + 1, LENGTH), generator=generator).to(device)
        self.noise, self.z_img = (torch.randn(self.shape, generator=generator).to(device) for _ in range(2))
        context = torch.randn((batch + 1, LENGTH, text.hidden_size), generator=generator).to(device, entrant.dtype)
        self.cond, self.uncond = context.split([batch, 1])
        self.x = self.noise * (SIGMA**2 + 1) ** 0.5


def edit(entrant: Entrant, inputs: Inputs, steps: int, tick: Callable[[], None] = lambda: None) -> None:
    """An edit of the batch, with a tick after each stage: encode, text, denoise, decode."""
    z_img = entrant.encode(inputs.pixels)
    tick()
    cond, uncond = entrant.text(inputs.token_ids).split([len(z_img), 1])
    tick()
    z = entrant.denoise(z_img, cond, uncond, inputs.noise, steps)
    tick()
    entrant.decode(z)
    tick()


def outputs(entrant: Entrant, inputs: Inputs, whole: bool) -> dict[str, Tensor]:
    """What each part makes of the same input; of a step the guided noise prediction."""
    given = inputs.z_img, inputs.cond, inputs.uncond
    out = {"step": inputs.x - entrant.stepper(*given)(inputs.x, SIGMA)}
    if whole and entrant.whole:
        stream = noise_stream(inputs.shape, 0, "speed")
        out["encode"], out["text"] = entrant.encode(inputs.pixels), entrant.text(inputs.token_ids)
        out["denoise"] = entrant.denoise(*given, inputs.noise, CHECK_STEPS, stream)
        out["decode"] = entrant.decode(inputs.noise)
    return {key: value.float() for key, value in out.items()}


def check(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 error of each part. Raises EmilieError where one exceeds what rounding explains."""
    errors = {key: ((found[key] - y).norm() / y.norm()).item() for key, y in expected.items() if key in found}
    for key, error in errors.items():
        if not error < LIMITS[dtype]:
            raise EmilieError(
                f"{name} does not compute what emilie does: {key} is off by {error:.2g} of its norm, and only "
                f"{LIMITS[dtype]:g} is rounding in {dtype}; nothing was timed".replace("torch.", "")
            )
    return errors


def flops(config: Config, batch: int, resolution: int) -> dict[str, int]:
    """FLOPs of the plain networks for a batch of edits: "encode", "text", "step" (one guided UNet call), "decode".

    Counted on the meta device: nothing is computed, and attention, which the counter does not know in the CPU's fused
    form, is made of matrix products there.
    """
    counted = {}
    with torch.device("meta"), torch.no_grad():
        networks = build(config)
        side = resolution // networks["vae"].factor
        z = torch.empty(batch, config.diffusion.channels, side, side)
        stacked = torch.empty(3 * batch, config.unet.in_channels, side, side)
        context = torch.empty(3 * batch, LENGTH, config.unet.context_dim)
        parts = {
            "encode": lambda: networks["vae"].encode(torch.empty(batch, 3, resolution, resolution)),
            "text": lambda: networks["text"](torch.zeros(batch + 1, LENGTH, dtype=torch.long)),
            "step": lambda: networks["unet"](stacked, torch.zeros(3 * batch), context),
            "decode": lambda: networks["vae"].decode(z),
        }
        for key, run in parts.items():
            with FlopCounterMode(display=False) as counter:
                run()
            counted[key] = counter.get_total_flops()
    return counted


def ceiling(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, the best of five: what this machine gives at this moment."""
    slow = device.type == "cpu" and dtype != torch.float32  # half precision can be 100 times slower on a CPU
    size = size or (8192 if device.type == "cuda" else 512 if slow else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    clock = Clock(device)
    for _ in range(5):
        a @ b
        clock()
    return 2 * size**3 / min(clock.seconds())


def measure(setting: Setting, say: Callable[[str], None] = lambda line: None) -> dict:
    """All that `emilie speed` reports, in JSON's types, every repeat's seconds as they were. Raises EmilieError."""
    threads = torch.get_num_threads()
    try:
        with explain_oom(f"at {setting.resolution} px: lower --resolution or --batch"):
            result = timings(setting, say)
        if result["machine"]["cuda"]:
            torch.cuda.empty_cache()
        for name, entrant in result["entrants"].items():
            if result["machine"]["cuda"] or not entrant["compiled"]:  # on the CPU the compiler's own memory would show
                say(f"{name}: memory, in a process of its own")
                entrant["process"] = in_process(setting, name, result["runs"][0]["batch"])
        return result
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def timings(setting: Setting, say: Callable[[str], None]) -> dict:
    entrants = prepare(setting, builders(setting))
    ours, whole, runs = entrants["emilie"], not setting.unet_only, []
    cuda = ours.device.type == "cuda"
    live = {name: {} for name in entrants}
    for batch in setting.batches or ([1, 2, 4, 8] if cuda else [1]):
        inputs, rows, expected = Inputs(ours, batch, setting.resolution), {}, None
        steppers = {}
        for name, entrant in entrants.items():  # warm up, and check that all compute the same
            started = time.perf_counter()
            try:
                found = outputs(entrant, inputs, whole)
            except RuntimeError as error:
                if not entrant.compiled or isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise EmilieError(f"{name}: torch.compile failed: {str(error).strip().splitlines()[0]}") from error
            expected = expected or found
            rows[name] = {"errors": check(name, found, expected, entrant.rounding), "repeats": []}
            rows[name]["first_s"] = time.perf_counter() - started
            steppers[name] = entrant.stepper(inputs.z_img, inputs.cond, inputs.uncond)
            say(f"batch {batch}: {name}: ready after {rows[name]['first_s']:.1f} s")
            if not live[name] and not entrant.compiled:
                live[name] = live_bytes(entrant, inputs, whole)
        del expected, found
        runs.append({"batch": batch, "flops": flops(ours.config, batch, setting.resolution), "ceiling": []})
        runs[-1]["entrants"] = rows
        inner = 5 if cuda else 1  # one step is too short for events to time well
        for i in range(setting.repeats + 1):  # the first turn warms up what the check did not touch
            runs[-1]["ceiling"].append(ceiling(ours.device, ours.dtype))
            for name, entrant in entrants.items():
                clock = Clock(ours.device)
                for _ in range(inner):
                    steppers[name](inputs.x, SIGMA)
                clock()
                took = {"step": clock.seconds()[0] / inner}
                if whole and entrant.whole:
                    clock = Clock(ours.device)
                    edit(entrant, inputs, setting.steps if i else 2, clock)
                    took |= dict(zip(("encode", "text", "denoise", "decode"), clock.seconds()))
                    took["edit"] = sum(took.values()) - took["step"]
                if i:
                    rows[name]["repeats"].append(took)
            say(f"batch {batch}: repeat {i} of {setting.repeats}")
    made = {name: {"compiled": entrant.compiled, "live": live[name]} for name, entrant in entrants.items()}
    return {"machine": machine(ours), "setting": asdict(setting), "entrants": made, "runs": runs}


def prepare(setting: Setting, made: dict[str, Callable[[], Entrant]]) -> dict[str, Entrant]:
    """Entrants that can run the setting, ready. Raises EmilieError."""
    entrants = {}
    for name, make in made.items():
        entrants[name] = entrant = make()
        if name == "emilie":
            check_can_edit(entrant.editor)
            multiple = entrant.factor * 2**entrant.editor.unet.num_downsamples
            if setting.resolution % multiple:
                raise EmilieError(f"--resolution {setting.resolution}: this model needs a multiple of {multiple} px")
            if setting.threads and entrant.device.type != "cpu":
                raise EmilieError(f"--threads is for the CPU, and this runs on {entrant.device}")
            if setting.threads:
                torch.set_num_threads(setting.threads)
    return entrants


def live_bytes(entrant: Entrant, inputs: Inputs, whole: bool) -> dict[str, int]:
    """Peaks of live tensors: "step" with the UNet's weights, "edit" with all three networks'."""
    peaks = {}
    with LiveBytes(entrant.device, [entrant.unet]) as count:
        entrant.stepper(inputs.z_img, inputs.cond, inputs.uncond)(inputs.x, SIGMA)
    peaks["step"] = count.peak
    if whole and entrant.whole:
        with LiveBytes(entrant.device, entrant.networks) as count:
            edit(entrant, inputs, 2)
        peaks["edit"] = count.peak
    return peaks


def machine(entrant: Entrant) -> dict:
    cuda, cpu = entrant.device.type == "cuda", platform.processor()
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        pass
    versions = {name: sys.modules[name].__version__ for name in ("torch", "diffusers") if name in sys.modules}
    return {
        "name": torch.cuda.get_device_name(entrant.device) if cuda else cpu,
        "cuda": cuda,
        "threads": torch.get_num_threads(),
        "dtype": str(entrant.dtype).removeprefix("torch."),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32] if cuda else None,
        "versions": {"python": platform.python_version(), **versions},
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "command": ["emilie", *sys.argv[1:]],
    }


def in_process(setting: Setting, name: str, batch: int) -> dict[str, int]:
    """Bytes at the peak of a process that does nothing else: see `alone`. Raises EmilieError."""
    code = "import json, sys; from emilie_min import measure; measure.alone(*json.loads(sys.argv[1]))"
    given = json.dumps([asdict(setting), name, batch])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EmilieError(f"measuring the memory of {name} in a process of its own failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def alone(setting: dict, name: str, batch: int) -> None:
    """Print, as JSON, this process's peak once loaded, after a guided step and after a short edit.

    "loaded", "step", "edit": resident bytes; on CUDA also "step_cuda", "edit_cuda", [allocated, reserved] on the device
    by a second run: CUDA graphs' memory shows in the latter alone.
    """
    setting = Setting(**setting)
    if setting.threads:
        torch.set_num_threads(setting.threads)
    entrant = builders(setting)[name]()
    inputs, peaks = Inputs(entrant, batch, setting.resolution), {"loaded": peak_rss()}
    forget_peak()  # random weights are drawn in float32
    parts = {"step": lambda: entrant.stepper(inputs.z_img, inputs.cond, inputs.uncond)(inputs.x, SIGMA)}
    if entrant.whole and not setting.unet_only:
        parts["edit"] = lambda: edit(entrant, inputs, 2)
    for part, run in parts.items():
        run()
        peaks[part] = peak_rss()
        if entrant.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peaks[f"{part}_cuda"] = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    print(json.dumps(peaks))


def forget_peak() -> None:
    """Begin `peak_rss` anew from what is resident now, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The most bytes that this process had resident. On Linux not `ru_maxrss`, which starts at its parent's."""
    try:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
