"""A run of `emilie speed`: what is measured, in which order, within how many minutes.

What is known is saved after each piece, so that a run that is cut off leaves it behind.
"""

import math
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from ..canvas.canvas import check_can_edit
from ..errors import EmilieError, explain_oom
from . import measure
from .against import builders
from .report import PARTS, size

TRIES = (  # of `faster.tries`, each alone; the first changes nothing
    "", "conv_1x1_as_mm=1", "coordinate_descent_tuning=1", "pad_heads", "vae", "cudnn_benchmark", "epilogue_fusion=0",
    "loop_reindexing_after_fusion=0", "static", "whole",
)  # fmt: skip
SHORT = 20  # steps of an edit where many sizes are measured
CUDA_ONLY = "it needs a CUDA card"


class TimeUp(BaseException):
    """The minutes are over. Not an Exception, so that nothing on the way takes it for a failure of its own."""


def run(setting: Namespace, started: float, save: Callable[[dict], None] = lambda result: None) -> dict:
    """All that `emilie speed` reports, in JSON's types, every repeat's seconds as they were.

    setting: its parsed options; started: when, by time.monotonic, from which --minutes count; save: gets the result so
    far after each piece. Raises EmilieError; with --full only for what nothing can be measured without.
    """
    threads, deadline = torch.get_num_threads(), started + 60 * (setting.minutes or math.inf)
    with tempfile.TemporaryDirectory() as cold, torch.no_grad():
        try:
            with patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cold} if setting.full else {}):
                with stopping_at(deadline):
                    done = Run(setting, deadline, save)
                done.all()
        except TimeUp:
            raise EmilieError(f"--minutes {setting.minutes:g} were over before there were weights: give more") from None
        finally:
            torch.set_num_threads(threads)
    return done.result


@contextmanager
def stopping_at(deadline: float) -> Iterator[None]:
    """Raises TimeUp in the block when time.monotonic says so, in the middle of whatever runs, where alarms exist."""
    if deadline == math.inf or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Run:
    """What was built, and what was found out so far, in `result`; its public methods are the parts of a run."""

    def __init__(self, setting: Namespace, deadline: float, save: Callable[[dict], None]):
        self.setting, self.deadline, self.save, self.absent = setting, deadline, save, {}
        self.result = {"setting": vars(setting), "left_out": {}, "runs": [], "equality": {}, "profile": {}}
        self.result |= {"memory": {}, "tries": {}}
        setting.config = setting.config or ("ip2p" if setting.weights == "random" else None)
        setting.steps = setting.steps or (100 if setting.full else 20)
        setting.parts = setting.parts or list(PARTS if setting.full else ("times", "memory"))
        if setting.full:
            setting.compile, setting.low_memory, setting.against = True, True, "diffusers"
        try:
            self.made = builders(setting)
        except EmilieError as error:
            if not setting.full:
                raise
            setting.against, self.absent["diffusers"] = None, str(error)
            self.made = builders(setting)
        self.editor = next(iter(self.made.values()))().editor
        check_can_edit(self.editor)
        self.cuda, self.multiple = self.editor.device.type == "cuda", self.editor.config.sampling.multiple
        if setting.resolution % self.multiple:
            raise EmilieError(f"--resolution {setting.resolution}: this model needs a multiple of {self.multiple} px")
        if setting.threads and self.editor.device.type != "cpu":
            raise EmilieError(f"--threads is for the CPU, and this runs on {self.editor.device}")
        if setting.threads:
            torch.set_num_threads(setting.threads)
        setting.batch = setting.batch or ([1, 2, 4, 8] if self.cuda and not setting.full else [1])
        self.base = setting.resolution, setting.batch[0]
        if setting.full and not self.cuda and self.made.pop("diffusers, compiled", None):
            self.absent["diffusers, compiled"] = CUDA_ONLY
        self.result["machine"] = measure.machine(self.editor)

    def all(self) -> None:
        """Every part that was asked for, until the time is up. Raises EmilieError."""
        parts = list(self.setting.parts)
        try:
            with stopping_at(self.deadline):
                for what, why in self.absent.items():
                    self._leave_out(what, why)
                while parts:
                    getattr(self, parts[0])()
                    self._say(f"{parts.pop(0)}: done")
        except TimeUp:
            self.deadline = math.inf
            for i, part in enumerate(parts):
                self._leave_out(part if i else f"{part}, the rest", f"--minutes {self.setting.minutes:g} were over")

    def times(self) -> None:
        for batch in self.setting.batch:
            self._turns(self.made, self.setting.resolution, batch, self.setting.steps, self.setting.repeats)

    def memory(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
        for name in self.made:
            if self.cuda or name != "diffusers, compiled":  # on a CPU the compiler's own memory would show
                with self._may_fail(f"{name}, memory"):
                    self.result["memory"][name] = measure.measure_in_subprocess(self.setting, name)
                    self._say(f"{name}: memory, in a process of its own")

    def equality(self) -> None:
        """What needs no compiler against the first: in the dtype that is timed, then in bfloat16."""
        own = self.result["machine"]["dtype"]
        self._ready(self.result["equality"].setdefault(own, {}), self._uncompiled(), *self.base, self.made)
        if not self.cuda or own == "bfloat16":
            return self._leave_out("equality in bfloat16 too", CUDA_ONLY)
        made, rows = builders(Namespace(**vars(self.setting) | {"dtype": "bfloat16"})), {}
        self.result["equality"]["bfloat16"] = rows
        self._ready(rows, self._uncompiled(), *self.base, made)

    def eager(self) -> None:
        """A first look, before anything compiles."""
        self._turns(self._uncompiled(), *self.base, self.setting.steps, 1)

    def profile(self) -> None:
        inputs = None
        for name in self.made:
            with self._may_fail(f"{name}, profile"):
                backend = self.made[name]()
                inputs = inputs or measure.Inputs(backend, *self.base)
                self.result["profile"][name] = measure.profile(backend, inputs)
                self._say(f"{name}: profile of a step")

    def sizes(self, names: list[str] | None = None) -> None:
        """768 and 1024 px, and batches of 4 and 8; with another --resolution in proportion."""
        side, steps = self.setting.resolution, min(self.setting.steps, SHORT)
        for wanted in ((side * 3 // 2 // self.multiple * self.multiple, 1), (2 * side, 1), (side, 4), (side, 8)):
            self._turns(names or self._uncompiled(), *wanted, steps, 1)

    def compiled_sizes(self) -> None:
        if not self.cuda:
            return self._leave_out("compiled_sizes", CUDA_ONLY)
        plain = self._uncompiled()
        self.sizes([*plain[:1], *(name for name in self.made if name not in plain)])

    def tries(self) -> None:
        """What may make the compiled way faster, each in a process of its own."""
        if not self.cuda:
            return self._leave_out("tries", CUDA_ONLY)
        for tried in TRIES:
            with self._may_fail(f"try {tried}"):
                self.result["tries"][tried] = measure.measure_in_subprocess(self.setting, "emilie, compiled", tried)
                self._say(f"{tried or 'as it is'}: tried")

    def _say(self, line: str) -> None:
        """Save, and tell how far it is."""
        self.save(self.result)
        print(line, file=sys.stderr, flush=True)
        if time.monotonic() > self.deadline:
            raise TimeUp

    def _leave_out(self, what: str, why: str) -> None:
        self.result["left_out"][what] = why
        self._say(f"left out: {what}: {why}")

    @contextmanager
    def _may_fail(self, what: str) -> Iterator[None]:
        """With --full what fails is left out, and the run goes on. Raises EmilieError otherwise."""
        try:
            with explain_oom(f"for {what}: lower --resolution or --batch"):
                yield
        except Exception as error:
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if self.setting.full:
                return self._leave_out(what, why)
            if isinstance(error, RuntimeError) and "compiled" in what:
                raise EmilieError(f"{what}: torch.compile failed: {why}") from error
            raise

    def _uncompiled(self) -> list[str]:
        return [name for name in self.made if not name.endswith("compiled")]

    def _ready(self, rows: dict, names, resolution: int, batch: int, made: dict) -> tuple[dict, measure.Inputs]:
        """The backends that compute what the first does, warmed up; each one's row gets "errors" and "ready_s"."""
        inputs, expected, fit = None, None, {}
        for name in names:
            with self._may_fail(f"{name}, {resolution} px, batch {batch}"):
                backend = made[name]()
                inputs = inputs or measure.Inputs(backend, resolution, batch)
                began = time.perf_counter()
                found = measure.outputs(backend, inputs, not self.setting.unet_only)
                expected = expected or found
                rows[name] = {"errors": measure.check(name, found, expected, backend.rounding), "repeats": []}
                rows[name]["ready_s"] = time.perf_counter() - began
                fit[name] = backend
                self._say(f"{name}, {resolution} px, batch {batch}: ready after {rows[name]['ready_s']:.1f} s")
        return fit, inputs

    def _turns(self, names, resolution: int, batch: int, steps: int, repeats: int) -> None:
        """Steps and edits of these backends, each repeat of all in turn, once all were seen to compute the same."""
        rows, device, dtype = {}, self.editor.device, self.editor.dtype
        run = {"resolution": resolution, "batch": batch, "steps": steps, "ceiling": [], "backends": rows}
        run["flops"] = measure.flops(self.editor.config, resolution, batch)
        self.result["runs"].append(run)
        fit, inputs = self._ready(rows, names, resolution, batch, self.made)
        if (resolution, batch) == self.base:  # what fails here is not tried again elsewhere
            self.made = {name: make for name, make in self.made.items() if name in fit or name not in names}
        for i in range(repeats):
            run["ceiling"].append(measure.matmul_flops(device, dtype))
            for name, backend in fit.items():
                with self._may_fail(f"{name}, {resolution} px, batch {batch}"):
                    seconds = {"step": measure.step_seconds(backend, inputs)}
                    if not self.setting.unet_only:
                        seconds |= measure.edit_seconds(backend, inputs, steps)
                    rows[name]["repeats"].append(seconds)
            self._say(f"{resolution} px, batch {batch}: repeat {i + 1} of {repeats}")
        first = self.result["runs"][0]  # a first look is over when more is known
        if first is not run and size(first) == size(run) and first["backends"].keys() <= rows.keys():
            self.result["runs"].remove(first)
