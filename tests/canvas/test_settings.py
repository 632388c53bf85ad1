"""What an edit can be told, and what it cannot."""

import subprocess
import sys

import numpy as np
import pytest

from emilie_min.canvas.settings import CHOICES, Settings
from emilie_min.config import SamplingConfig
from emilie_min.errors import SamplingError


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: "wall"} for name in CHOICES),
        {"gate": None},
        {"gate": np.array(["anchor", "eq8"])},
        {"steps": 0},
        {"steps": 1001},
        {"steps": 2.5},
        {"reuse": 0},
        {"reuse": 1.5},
        {"reuse_guidance": 1.5},
        {"reuse_guidance": "often"},
        {"seed": 5.0},
        {"text_scale": float("nan")},
        {"image_scale": "much"},
        {"image_scale": 10**400},
        {"further": 3},
        {"further": ["fog"]},
        {"further": [(3, 1.0)]},
        {"further": [(" ", 1.0)]},
        {"further": [("fog", "much")]},
        {"guidance_interval": (5, 1)},
        {"guidance_interval": (-1, 2)},
        {"guidance_interval": 3},
        {"guidance_interval": (1, 2, 3)},
        {"guidance_interval": ("a", "b")},
        {"guidance_interval": (float("nan"), 2)},
    ],
    ids=str,
)
def test_what_no_edit_can_use_is_refused_by_its_name(wrong):
    (name,) = wrong
    with pytest.raises(SamplingError, match=name):
        Settings(**wrong)


def test_numbers_become_plain_ones():
    settings = Settings(
        steps=np.int64(3), seed=np.int32(-7), text_scale=np.float32(2), soft=1, guidance_interval=[0, 5]
    )
    values = settings.steps, settings.seed, settings.text_scale, settings.soft, settings.guidance_interval
    assert values == (3, -7, 2.0, True, (0.0, 5.0))
    assert [type(value) for value in values] == [int, int, float, bool, tuple]


def test_resolve_fills_in_what_was_not_said_and_no_more():
    defaults = SamplingConfig(steps=12, text_scale=1.5, image_scale=1.0)
    resolved = Settings(gate="eq8").resolve(defaults, seed=7)
    said = resolved.steps, resolved.text_scale, resolved.image_scale, resolved.seed, resolved.gate
    assert said == (12, 1.5, 1.0, 7, "eq8")
    own = Settings(steps=3, text_scale=0, image_scale=0.0, seed=0)
    assert own.resolve(defaults, seed=7) == own


def test_settings_are_read_without_pytorch():
    code = "import sys, emilie_min.canvas.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
