"""Stand-in weights: the original checkpoint's keys and shapes, every tensor drawn from its own key.

The goldens in `data/` were computed on such weights, so the rule (that of the reference data's pseudo-checkpoints)
must be kept to the bit: NumPy's legacy generator, seeded with the CRC-32 of the key, then scaled by the kind of tensor.
EMA tensors are scaled like the parameter that they average and seeded with their own key, so the families disagree.
"""

import gzip
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
SHARP = ("to_q.weight", "to_k.weight", "q_proj.weight", "k_proj.weight")  # so that attention is not near uniform


def manifest(name: str) -> dict:
    """Of "manifest" (the released model) or "small_manifest": a "state_dict" of shapes and dtypes, and "ema_of"."""
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


def _drawn(key: str, shape: list[int], parameter: str, salt: str) -> Tensor:
    draw = np.random.RandomState(zlib.crc32(f"{salt}{key}".encode())).standard_normal(shape).astype(np.float32)
    if "embedding" in parameter:
        draw = draw * np.float32(0.5 if "token" in parameter else 0.2)
    elif len(shape) > 1:  # a matrix or a convolution, multiplied in float64 and rounded once
        draw = draw * np.float64((1.5 if parameter.endswith(SHARP) else 1.0) / math.sqrt(math.prod(shape[1:])))
    elif parameter.endswith("weight"):  # of a norm
        draw = np.float32(1) + np.float32(0.15) * draw
    else:
        draw = np.float32(0.05) * draw
    return torch.from_numpy(np.asarray(draw, np.float32))


def _tensor(key: str, shape: list[int], parameter: str, salt: str) -> Tensor:
    if key in ("betas", "alphas_cumprod"):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, shape[0], dtype=torch.float64).square()
        return (betas if key == "betas" else (1 - betas).cumprod(0)).float()
    if "." not in key:  # the schedule's other tables, which nothing reads
        return torch.zeros(shape)
    if key == "model_ema.num_updates":
        return torch.tensor(22000, dtype=torch.int32)
    if key == "model_ema.decay":
        return torch.tensor(0.9999)
    if key.endswith("position_ids"):
        return torch.arange(shape[-1]).view(shape)
    return _drawn(key, shape, parameter, salt)


def tensors(manifest: dict, salt: str = "", families: tuple[str, ...] = ()):
    """(key, tensor) one after the other; `families`: only keys with one of these prefixes."""
    for key, entry in manifest["state_dict"].items():
        if key.startswith(families or ""):
            yield key, _tensor(key, entry["shape"], manifest["ema_of"].get(key, key), salt)


def state_dict(manifest: dict, salt: str = "", families: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return dict(tensors(manifest, salt, families))


def write_ckpt(path: Path, state: dict[str, Tensor], **more) -> Path:
    """The layout of the trainer's files: the weights under "state_dict", beside its records."""
    torch.save(
        {"epoch": 3, "global_step": 22000, "pytorch-lightning_version": "1.4.2", "state_dict": state, **more}, path
    )
    return path


def error(out, reference):
    """||out - reference|| / ||reference||"""
    assert out.shape == reference.shape and out.isfinite().all()
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()
