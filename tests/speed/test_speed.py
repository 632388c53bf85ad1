"""`emilie speed`: what it counts is right, what computes something else is not timed, and what it reports."""

import json
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest
import torch
from pseudo import DATA
from torch import nn

from emilie_min.app.cli import main
from emilie_min.config import load_config
from emilie_min.emilie import Editor
from emilie_min.errors import EmilieError
from emilie_min.loading import load
from emilie_min.speed import against, measure, report
from emilie_min.speed import run as running
from emilie_min.speed.against import WAYS, Backend, builders
from emilie_min.speed.cli import add_options
from emilie_min.speed.measure import flops
from emilie_min.speed.run import TRIES, Run, TimeUp, run

SMALL = ["--config", str(DATA / "small.yaml"), "--resolution", "64", "--steps", "2", "--repeats", "1"]
TINY = ["--config", "toy", "--resolution", "32", "--steps", "2", "--repeats", "1", "--device", "cpu"]
PROCESS = {"loaded": 5e8, "ready_s": 1.0, "step": 6e8, "edit": 7e8}  # what a process of its own takes seconds to tell


def setting(*options: str) -> Namespace:
    parser = ArgumentParser()
    add_options(parser)
    return parser.parse_args([*options, "--device", "cpu"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One call instead of as many as take 0.3 s, nothing counted, and no further processes."""
    monkeypatch.setattr(measure, "matmul_flops", lambda *_: 1e11)
    monkeypatch.setattr(measure, "flops", lambda config, side, batch: {"encode": 1e9, "step": 5e5 * side**2 * batch})
    monkeypatch.setattr(measure.Timer, "blocked_autorange", lambda timer, **_: Namespace(median=timer._timeit(1)))
    monkeypatch.setattr(measure, "measure_in_subprocess", lambda *_: PROCESS)


# ---- what is counted


def test_flops_of_a_small_network_by_hand(monkeypatch):
    b, n, m, d = 2, 10, 7, 8

    class Attention(nn.Module):
        def forward(self, *_):
            q, k = torch.empty(b, n, d), torch.empty(b, m, d)
            return nn.functional.scaled_dot_product_attention(q, k, k)

        encode = decode = forward

    monkeypatch.setattr(measure, "build", lambda config: dict.fromkeys(("unet", "vae", "text"), Attention()))
    counted = flops(load_config("toy"), 16, 1)
    assert set(counted.values()) == {4 * b * n * m * d} and len(counted) == 4


def test_flops_of_the_released_network():
    counted = flops(load_config("ip2p"), 512, 1)
    assert counted["step"] == 2_410_103_439_360  # three branches at 512 px: 803 GFLOP each, as is known of this UNet
    assert counted["text"] < counted["encode"] < counted["decode"]


def test_flops_grow_with_the_batch():
    config = load_config("toy")
    assert flops(config, 64, 2)["step"] == 2 * flops(config, 64, 1)["step"]


def test_the_ceiling_is_a_rate(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < measure.matmul_flops(torch.device("cpu"), torch.float32, size=256) < 1e15


def test_stages_sum_to_the_edit():
    backend = Backend(load("random", "toy", "cpu"), torch.float32)
    seconds = measure.edit_seconds(backend, measure.Inputs(backend, 64, 1), steps=2)
    assert list(seconds) == list(report.STAGES[1:]) and min(seconds.values()) > 0
    assert seconds.pop("edit") == pytest.approx(sum(seconds.values()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>", "convolutions"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128", "attention"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize96x64x32", "matrix products"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "norms"),
        ("triton_red_fused_native_group_norm_silu_3", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "the rest"),
        ("triton_poi_fused_cat_7", "the rest"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::addmm", "matrix products"),
        ("aten::add", "the rest"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert measure.kind_of(name) == kind


def test_the_profile_of_a_step_accounts_for_its_time(monkeypatch):
    backend = Backend(load("random", "toy", "cpu"), torch.float32)
    monkeypatch.setattr(measure, "step_seconds", lambda *_: 3600.0)
    found = measure.profile(backend, measure.Inputs(backend, 64, 1))
    kinds = {kind: found[kind] for kind in (*measure.KINDS, "the rest")}
    assert min(kinds.values()) > 0 and found["kernels"] > 100
    assert found["step"] == 3600 and found["gaps"] == pytest.approx(3600 - sum(kinds.values()))


def test_memory_in_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()
    chosen = run_setting(setting(*TINY))
    found = measure.measure_in_subprocess(chosen, f"emilie, {next(iter(WAYS))}")
    assert 1e8 < found["step"] <= found["edit"] < 2e10 and found["loaded"] > 1e8 and 0 < found["ready_s"] < 60
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\n  line\nEmilieError: no memory left\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EmilieError, match="process of its own failed: EmilieError: no memory left"):
        measure.measure_in_subprocess(chosen, f"emilie, {next(iter(WAYS))}")


def run_setting(chosen: Namespace) -> Namespace:
    """Its defaults filled in, as a run does it."""
    Run(chosen, time.monotonic(), lambda result: None)
    return chosen


def test_options_of_the_compiler_exist():
    from torch._inductor import config

    options = [tried.split("=") for tried in TRIES if "=" in tried]
    assert options and all(getattr(config, name) != bool(int(value)) for name, value in options)


# ---- what is compared


def test_all_ways_compute_the_same():
    made = builders(setting("--config", "toy", "--compile", "--low-memory"))
    assert list(made) == [f"emilie, {way}" for way in WAYS]
    first = made[f"emilie, {next(iter(WAYS))}"]()
    inputs = measure.Inputs(first, 64, 2)
    expected = measure.outputs(first, inputs)
    for name, make in made.items():
        backend = make()
        assert make() is backend
        errors = measure.check(name, measure.outputs(backend, inputs), expected, backend.rounding)
        assert errors.keys() == {"step", "encode", "text", "sample", "decode"}


def test_what_was_not_asked_for_is_not_built():
    assert not {"emilie, compiled", "emilie, low memory", "diffusers"} & set(builders(setting()))


def test_networks_are_looked_up_at_every_call():
    """In low memory they move, so the stick keeps hold of none."""
    editor = load("random", "toy", "cpu")
    backend = Backend(editor, torch.float32)
    inputs = measure.Inputs(backend, 64, 1)
    before = measure.outputs(backend, inputs)
    other = load(None, "toy", "cpu")
    editor.unet, editor.vae, editor.text = other.unet, other.vae, other.text
    for part, value in measure.outputs(backend, inputs).items():
        assert not torch.allclose(value, before[part]), part


def test_diffusers_computes_the_same_and_is_timed():
    pytest.importorskip("diffusers")
    result = run(setting(*SMALL, "--against", "diffusers", "--parts", "times"), time.monotonic())
    errors = result["runs"][0]["backends"]["diffusers"]["errors"]
    assert errors.keys() == {"step", "encode", "text", "sample", "decode"} and max(errors.values()) < 1e-4
    for row in result["runs"][0]["backends"].values():
        assert all(seconds.keys() == set(report.STAGES) and min(seconds.values()) > 0 for seconds in row["repeats"])


def test_what_computes_something_else_is_not_timed(monkeypatch):
    class Wrong(Editor):
        def denoise(self, *args):
            return 1.01 * super().denoise(*args)

    def open_editor(*args, low_memory=False, **options):
        editor = load(*args, **options)
        editor.__class__ = Wrong if low_memory else Editor
        return editor

    monkeypatch.setattr(against, "load", open_editor)
    with pytest.raises(EmilieError, match="low memory does not compute .* step is off by 0.0.*not timed"):
        run(setting(*TINY, "--low-memory"), time.monotonic())


def test_without_diffusers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["speed", *TINY, "--against", "diffusers"]) == 2
    assert "pip install diffusers" in capsys.readouterr().err


# ---- what is reported


def test_the_command_reports_and_writes(tmp_path, capsys):
    out = tmp_path / "there" / "speed"
    assert main(["speed", *TINY, "--batch", "1,2", "--compile", "--low-memory", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "speed.md").read_text() in printed
    result = json.loads((out / "speed.json").read_text())
    assert not result["left_out"] and [one["batch"] for one in result["runs"]] == [1, 2]
    assert list(result["memory"]) == list(result["runs"][0]["backends"]) == [f"emilie, {way}" for way in WAYS]
    for title in ("Time over another's", "Seconds, on ", "GFLOP", "Memory, GB"):
        assert f"## {title}" in printed
    assert printed.index("over another's") < printed.index("## Seconds")  # on a CPU ratios come first
    for one in result["runs"]:
        fast, plain = (one["backends"][name]["repeats"][0] for name in ("emilie, compiled", "emilie, eager"))
        ratio = re.escape(f"{fast['step'] / plain['step']:.3g}")
        assert re.search(rf"\| emilie, compiled / emilie, eager \| 32 \| {one['batch']} \| {ratio} \|", printed)
        share = f"{100 * one['flops']['step'] / plain['step'] / 1e11:.0f} %"
        assert re.search(rf"\| emilie, eager \| 32 \| {one['batch']} \| 2 \|.*\| {share} \|", printed)


def test_full_on_a_cpu(tmp_path, capsys, monkeypatch):
    """The whole of it with the small model: a rehearsal of what a card is asked."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["speed", "--full", "--minutes", "5", *TINY, "--out", str(tmp_path)]) == 0
    printed, err = capsys.readouterr()
    result = json.loads((tmp_path / "speed.json").read_text())
    card = {"equality in bfloat16 too", "compiled_sizes", "tries"}
    assert set(result["left_out"]) == card | {"diffusers"}
    assert all("CUDA" in result["left_out"][what] for what in card) and "pip install" in result["left_out"]["diffusers"]
    assert all(f"- left out: {what}" in printed and what in err for what in result["left_out"])
    assert all(f"{part}: done" in err for part in report.PARTS)
    sizes = [(one["resolution"], one["batch"]) for one in result["runs"]]
    assert sizes == [(32, 1), (48, 1), (64, 1), (32, 4), (32, 8)]
    assert [list(one["backends"]) for one in result["runs"]] == [
        [f"emilie, {way}" for way in WAYS if way != "compiled" or size == (32, 1)] for size in sizes
    ]
    assert all(len(row["repeats"]) == 1 for one in result["runs"] for row in one["backends"].values())
    assert list(result["profile"]) == list(result["memory"]) == [f"emilie, {way}" for way in WAYS]
    for title in ("Relative difference", "Seconds, on ", "Where a step's time goes", "Memory, GB"):
        assert f"## {title}" in printed


def test_what_a_card_alone_is_asked(monkeypatch):
    """With the CPU in its place."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    asked, dtypes = [], set()
    cuda = {"step_cuda": [2e9, 3e9], "seconds": {"step": 0.0087, "encode": 0.01, "decode": 0.02}}

    def open_editor(*args, **options):
        dtypes.add(args[3])
        return load(*args, **options)

    def process(chosen, name, tried=None):
        asked.append((name, tried))
        return PROCESS | cuda

    monkeypatch.setattr(measure, "measure_in_subprocess", process)
    monkeypatch.setattr(against, "load", open_editor)
    card = Run(setting("--full", *TINY), time.monotonic() + 300, lambda result: json.dumps(result))
    card.cuda = card.result["machine"]["cuda"] = True
    for part in ("equality", "compiled_sizes", "memory", "tries"):
        getattr(card, part)()
    assert not card.result["left_out"]
    assert dtypes == {None, "bfloat16"} and list(card.result["equality"]) == ["float32", "bfloat16"]
    assert all("emilie, low memory" in rows for rows in card.result["equality"].values())
    assert [list(one["backends"]) for one in card.result["runs"]] == 4 * [["emilie, eager", "emilie, compiled"]]
    assert asked == [(f"emilie, {way}", None) for way in WAYS] + [("emilie, compiled", tried) for tried in TRIES]
    text = report.markdown(card.result)
    assert text.index("## Seconds") < text.index("over another's")
    assert "| 2 (3) |" in text and "| conv_1x1_as_mm=1 | 1.0 | 8.7 | 10 | 20 |" in text


def test_with_full_what_fails_is_left_out(monkeypatch):
    """And the others go on."""
    monkeypatch.setitem(sys.modules, "diffusers", None)

    def open_editor(*args, low_memory=False, **options):
        if low_memory:
            raise RuntimeError("Expected all tensors to be on the same device")
        return load(*args, **options)

    monkeypatch.setattr(against, "load", open_editor)
    result = run(setting("--full", *TINY, "--parts", "times,profile"), time.monotonic())
    assert "same device" in result["left_out"]["emilie, low memory, 32 px, batch 1"]
    assert list(result["profile"]) == [f"emilie, {way}" for way in WAYS if way != "low memory"]
    assert all(row["repeats"] for row in result["runs"][0]["backends"].values())
    with pytest.raises(RuntimeError, match="same device"):
        run(setting("--low-memory", *TINY), time.monotonic())


def test_minutes_are_obeyed(tmp_path, capsys, monkeypatch):
    """In the middle of what would take hours; what was known by then is there."""
    monkeypatch.setattr(measure, "profile", lambda *_: time.sleep(60))
    started = time.monotonic()
    options = ["--minutes", "0.1", "--parts", "equality,profile,memory", "--out", str(tmp_path)]
    assert main(["speed", "--full", *TINY, *options]) == 0
    assert time.monotonic() - started < 20
    result = json.loads((tmp_path / "speed.json").read_text())
    assert "minutes 0.1" in result["left_out"]["profile, the rest"] and "minutes 0.1" in result["left_out"]["memory"]
    assert result["equality"]["float32"]["emilie, low memory"]["errors"]
    assert "- left out: memory: --minutes 0.1 were over" in capsys.readouterr().out


def test_a_run_that_is_killed_leaves_what_was_measured(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_in_subprocess", killed)
    assert main(["speed", *TINY, "--out", str(tmp_path)]) == 130
    (one,) = json.loads((tmp_path / "speed.json").read_text())["runs"]
    assert one["backends"]["emilie, eager"]["repeats"][0]["edit"] > 0
    assert "## Seconds" in (tmp_path / "speed.md").read_text()


def test_the_report_of_a_run_that_knows_nothing_yet():
    chosen = setting(*TINY)
    text = report.markdown(Run(chosen, time.monotonic(), lambda result: None).result)
    assert text.startswith("# emilie speed") and "##" not in text.removeprefix("#")


def test_what_a_run_says_of_itself_and_of_a_failed_compiler(monkeypatch):
    made = Run(setting(*TINY), time.monotonic(), lambda result: None)
    for what, error in (("emilie, compiled", EmilieError), ("emilie, eager", RuntimeError)):
        with pytest.raises(error, match="torch.compile failed: no C" if error is EmilieError else "^no C"):
            with made._may_fail(what):
                raise RuntimeError("no C compiler\nat all")
    made.deadline = 0
    with pytest.raises(TimeUp):
        made._say("on it goes")
    card = SimpleNamespace(**{name: getattr(made.editor, name) for name in ("unet", "config", "model")})
    card.device = torch.device("cuda")
    monkeypatch.setattr(running, "check_can_edit", lambda editor: None)
    monkeypatch.setattr(running, "builders", lambda setting: {"emilie": lambda: SimpleNamespace(editor=card)})
    with pytest.raises(EmilieError, match="--threads is for the CPU"):
        Run(setting(*TINY, "--threads", "1"), time.monotonic(), lambda result: None)


def test_the_most_memory_where_linux_does_not_tell_it(monkeypatch):
    def unread(path):
        raise FileNotFoundError(path)

    told = measure.peak_rss()
    monkeypatch.setattr(measure.Path, "read_text", unread)
    assert 0.5 < measure.peak_rss() / told < 2
    monkeypatch.setitem(sys.modules, "resource", None)
    assert measure.peak_rss() == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "1,x"], "must be a whole number from 1 to 10000, not x"),
        (["--steps", "0"], "must be a whole number"),
        (["--minutes", "-1"], "must be a positive number of minutes"),
        (["--minutes", "x"], "must be a positive number of minutes"),
        (["--minutes", "0.0"], "must be a positive number of minutes"),
        (["--minutes", "0.00001"], "were over before there were weights"),
        (["--parts", "times,lunch"], "must be of equality,"),
        (["--resolution", "70"], "this model needs a multiple of"),
        (["--random", "--weights", "w.ckpt"], "not allowed with"),
        (["--against", "nothing-there"], "choose from diffusers"),
        (["--out", __file__], "is a file: name a folder"),
        (["--config", "toy-t2i"], "takes 4 channels and editing needs 8"),
    ],
)
def test_bad_options_are_one_line(options, said, capsys):
    try:
        code = main(["speed", *TINY, *options])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err.replace("'", "")
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_help_needs_no_torch():
    code = "import sys; from emilie_min.app.cli import main\ntry: main(['speed', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--against" in done.stdout
