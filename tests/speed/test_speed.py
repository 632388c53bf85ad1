"""`emilie speed`: what it counts is right, what computes something else is not timed, and what it reports."""

import json
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from pseudo import DATA
from torch import nn

from emilie_min.app.cli import main
from emilie_min.config import load_config
from emilie_min.errors import EmilieError
from emilie_min.speed import against, measure, report
from emilie_min.speed.against import builders
from emilie_min.speed.measure import LIMITS, Inputs, LiveBytes, Setting

SMALL = str(DATA / "small.yaml")
TINY = ["--config", "toy", "--resolution", "64", "--steps", "2", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "ceiling", partial(measure.ceiling, size=256))


def checkout(folder, forward="return super().forward(x, timesteps, context)"):
    """A folder that looks like the original's, whose network is ours under its signature."""
    inside = folder / "stable_diffusion" / "ldm" / "modules" / "diffusionmodules"
    inside.mkdir(parents=True)
    (inside / "openaimodel.py").write_text(f"""
from emilie_min import unet
from emilie_min.config import UNetConfig

class UNetModel(unet.UNetModel):
    def __init__(self, use_checkpoint, **params):
        fixed = ("image_size", "use_spatial_transformer", "transformer_depth", "legacy")
        params = {{key: value for key, value in params.items() if key not in fixed}}
        super().__init__(UNetConfig(**params, num_groups=32))

    def forward(self, x, timesteps, context):
        {forward}
""")
    return folder


def test_flops_of_a_small_network_by_hand(monkeypatch):
    b, heads, n, m, d = 2, 3, 10, 7, 8

    class Attention(nn.Module):
        factor = 1

        def forward(self, *_):
            q, k = torch.empty(b, heads, n, d), torch.empty(b, heads, m, d)
            return torch.nn.functional.scaled_dot_product_attention(q, k, k)

        encode = decode = forward

    monkeypatch.setattr(measure, "build", lambda config: dict.fromkeys(("unet", "vae", "text"), Attention()))
    counted = measure.flops(load_config("toy"), 1, 16)
    assert set(counted.values()) == {4 * b * heads * n * m * d}


def test_flops_of_the_released_network():
    counted = measure.flops(load_config("ip2p"), 1, 512)
    assert counted["step"] == 2_410_103_439_360  # three branches at 512 px: 803 GFLOP each, as is known of this UNet
    assert counted["text"] < counted["encode"] < counted["decode"]
    assert measure.flops(load_config("ip2p"), 2, 64)["step"] == 2 * measure.flops(load_config("ip2p"), 1, 64)["step"]


def test_live_bytes():
    device, layer = torch.device("cpu"), nn.Linear(256, 256, bias=False)
    x = torch.zeros(256, 256)
    with LiveBytes(device, [layer]) as count:
        assert count.live == layer.weight.nbytes
        y = x + 1
        y = y * 2  # while it is made, both live
        y.view(-1)  # no memory of its own
        del y
    assert count.peak == layer.weight.nbytes + 2 * x.nbytes
    assert count.live == layer.weight.nbytes


def test_the_fast_path_lives_in_less():
    inputs, peaks = None, []
    for make in builders(Setting(config=SMALL, device="cpu", compile=True, low_memory=True)).values():
        entrant = make()
        inputs = inputs or Inputs(entrant, 1, 256)
        peaks.append(measure.live_bytes(entrant, inputs, whole=False)["step"])
    plain, fast, lean = peaks
    assert fast < plain and lean < 0.7 * plain  # weights in half; activations stay


def test_ceiling_is_a_rate():
    assert 1e8 < measure.ceiling(torch.device("cpu"), torch.float32) < 1e15


def test_diffusers_computes_the_same_and_is_timed():
    pytest.importorskip("diffusers")
    result = measure.timings(
        Setting(config=SMALL, device="cpu", resolution=64, steps=2, repeats=1, against=["diffusers"]), lambda line: None
    )
    errors = result["runs"][0]["entrants"]["diffusers"]["errors"]
    assert errors.keys() == {"step", "encode", "text", "denoise", "decode"} and max(errors.values()) < 1e-4
    for entrant in result["runs"][0]["entrants"].values():
        assert all(took.keys() == set(report.PARTS) and min(took.values()) > 0 for took in entrant["repeats"])


def test_diffusers_that_computes_something_else_is_not_timed(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(against.Diffusers, "text", lambda self, ids: 1.01 * self.pipe.text_encoder(ids)[0])
    setting = Setting(config=SMALL, device="cpu", resolution=64, repeats=1, against=["diffusers"])
    with pytest.raises(EmilieError, match="does not compute what emilie does: text is off by 0.01.*nothing was timed"):
        measure.timings(setting, lambda line: None)


def test_without_diffusers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["speed", *TINY, "--against", "diffusers"]) == 2
    assert "pip install diffusers" in capsys.readouterr().err


def test_a_checkout_of_the_original(tmp_path):
    folder = checkout(tmp_path / "instruct-pix2pix")
    setting = Setting(config=SMALL, device="cpu", resolution=64, repeats=1, unet_only=True, against=[str(folder)])
    row = measure.timings(setting, lambda line: None)["runs"][0]["entrants"]["original in instruct-pix2pix"]
    assert row["errors"]["step"] < LIMITS[torch.float32] and len(row["repeats"]) == 1
    assert "ldm" not in sys.modules and not any("instruct-pix2pix" in path for path in sys.path)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("return 1.1 * super().forward(x, timesteps, context)", "does not compute what emilie does: step"),
        (None, "neither diffusers nor a checkout"),
    ],
)
def test_what_is_no_original(tmp_path, forward, said):
    folder = checkout(tmp_path / "other", forward) if forward else tmp_path
    setting = Setting(config=SMALL, device="cpu", resolution=64, unet_only=True, against=[str(folder)])
    with pytest.raises(EmilieError, match=said):
        measure.timings(setting, lambda line: None)


def test_an_original_that_does_not_fit(tmp_path):
    folder = checkout(tmp_path / "other")
    module = folder / "stable_diffusion/ldm/modules/diffusionmodules/openaimodel.py"
    module.write_text(module.read_text().replace("num_groups=32", "num_groups=32, wrong=1"))
    setting = Setting(config=SMALL, device="cpu", resolution=64, unet_only=True, against=[str(folder)])
    with pytest.raises(EmilieError, match="cannot be used: .*wrong"):
        measure.timings(setting, lambda line: None)


def test_the_command_reports_and_writes(tmp_path, capsys, monkeypatch):
    out, in_process = tmp_path / "there" / "speed", measure.in_process
    first_only = lambda setting, name, batch: in_process(setting, name, batch) if name == "emilie" else {}  # noqa: E731
    monkeypatch.setattr(measure, "in_process", first_only)  # each takes seconds to start
    assert main(["speed", *TINY, "--batch", "1,2", "--compile", "--low-memory", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "speed.md").read_text() in printed
    result = json.loads((out / "speed.json").read_text())
    assert list(result["entrants"]) == ["emilie", "emilie, fast", "emilie, low memory"]
    assert [run["batch"] for run in result["runs"]] == [1, 2]
    for title in ("Time as a multiple of another's", "Seconds", "GFLOP", "Memory, GB, at batch 1"):
        assert f"## {title}" in printed
    assert printed.index("multiple") < printed.index("## Seconds")  # on a CPU ratios come first
    for run in result["runs"]:
        fast, plain = (run["entrants"][name]["repeats"] for name in ("emilie, fast", "emilie"))
        ratio = f"{fast[0]['step'] / plain[0]['step']:.3g}"
        assert re.search(rf"\| emilie, fast / emilie \| {run['batch']} \| {re.escape(ratio)} \(", printed)
        assert plain[0]["edit"] == pytest.approx(sum(plain[0][part] for part in report.PARTS[1:-1]))
    process = result["entrants"]["emilie"]["process"]
    assert 1e8 < process["step"] <= process["edit"] < 2e10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "1,x"], "must be a whole number from 1 to 10000, not x"),
        (["--steps", "0"], "must be a whole number"),
        (["--resolution", "70"], "this model needs a multiple of"),
        (["--random", "--weights", "w.ckpt"], "exclude each other"),
        (["--against", "nothing-there"], "neither diffusers nor a checkout"),
        (["--out", __file__], "is a file: name a folder"),
        (["--config", "toy-t2i"], "takes 4 channels and editing needs 8"),
    ],
)
def test_bad_options_are_one_line(options, said, capsys):
    try:
        code = main(["speed", *TINY, *options])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_help_needs_no_torch():
    code = "import sys; from emilie_min.app.cli import main\ntry: main(['speed', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--against" in done.stdout
