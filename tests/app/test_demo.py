"""`emilie demo` with the weights that ship, to the bit.

After a change of weights: run it, look at its pictures, and renew PIXELS, which the failing test tells, and
notebooks/demo.png, which is the strip.
"""

import hashlib
from pathlib import Path

import numpy as np
from command import run
from PIL import Image

PIXELS = "01f18adbbdb98873f783df566bfc52dab617c3cec883fbad3e0e032e0e973b93"  # of the five pictures
STRIP = Path(__file__).parents[2] / "notebooks" / "demo.png"


def test_the_demo_to_the_bit(tmp_path, capsys):
    code, out, err = run("demo", "--device", "cpu", "--out", tmp_path / "demo", capsys=capsys)
    names = ["0_input.png", "1.png", "2.png", "3.png", "4.png", "strip.png"]
    assert code == 0 and not err and sorted(path.name for path in (tmp_path / "demo").iterdir()) == names
    assert all(name in out for name in names) and "4 of 4 pictures" in out
    *pictures, strip = (Image.open(tmp_path / "demo" / name) for name in names)
    assert hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest() == PIXELS
    assert np.array_equal(strip, Image.open(STRIP))
