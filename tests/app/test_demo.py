"""`emilie demo` with the weights that ship, to the bit.

After a change of weights: run it, look at its pictures, and renew PIXELS, which the failing test tells, and
notebooks/demo.png, which is the strip.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from command import run
from PIL import Image

PIXELS = "79cdab3b9c7bcf7884c3118bf30edfc201ebf43dc26949b90655722f2300cc9c"  # where MADE_ON computed them
MADE_ON = "AVX512"  # elsewhere rounding may move a value by a grey level
STRIP = Path(__file__).parents[2] / "notebooks" / "demo.png"


def test_the_demo_to_the_bit(tmp_path, capsys):
    code, out, err = run("demo", "--device", "cpu", "--out", tmp_path / "demo", capsys=capsys)
    names = ["0_input.png", "1.png", "2.png", "3.png", "4.png", "strip.png"]
    assert code == 0 and not err and sorted(path.name for path in (tmp_path / "demo").iterdir()) == names
    assert all(name in out for name in names) and "4 of 4 pictures" in out
    *pictures, strip = (Image.open(tmp_path / "demo" / name) for name in names)
    if torch.backends.cpu.get_cpu_capability() == MADE_ON:
        assert hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest() == PIXELS
    assert np.abs(np.asarray(strip, int) - np.asarray(Image.open(STRIP), int)).max() <= 1
