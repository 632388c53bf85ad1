"""Guidance reused from step to step: one branch runs instead of three, off by default."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..emilie import Editor
from ..sampling import Scale

EVERY = 4  # of the steps after that part, at which guidance is found anew


class ReusedGuidance:
    """`Editor.branches` of one edit, of which the branches without an instruction run at some steps only.

    Guidance is made of differences, such as cond - img_cond and img_cond - uncond. As noise, which is denoised's
    difference divided by sigma, they change little from step to step. For the first `full` steps and then at every
    `EVERY`-th all branches run; at the others those with an instruction alone, and the rest stand off their mean as
    they did last.
    """

    def __init__(self, branches: Callable[..., list[Tensor]], null: Tensor, full: int):
        self.branches, self.null, self.full = branches, null, full
        self.calls, self.kept = 0, list[Tensor]()

    def __call__(self, x: list[Tensor], sigma: Scale, seen: list[Tensor], told: list[Tensor]) -> list[Tensor]:
        asked = [text is not self.null for text in told]
        since = self.calls - self.full
        self.calls += 1
        if all(asked) or not any(asked):
            return self.branches(x, sigma, seen, told)
        if since < 0 or since % EVERY == EVERY - 1 or not self.kept:
            denoised = self.branches(x, sigma, seen, told)
            middle = mean([y for y, it in zip(denoised, asked) if it])
            self.kept = [(y - middle) / sigma for y, it in zip(denoised, asked) if not it]
            return denoised
        x, seen, told = ([y for y, it in zip(all_of_them, asked) if it] for all_of_them in (x, seen, told))
        live = self.branches(x, sigma, seen, told)
        middle, found, kept = mean(live), iter(live), iter(self.kept)
        return [next(found) if it else middle + sigma * next(kept) for it in asked]


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def reuse_guidance(editor: Editor, null: Tensor, full: int) -> Editor:
    """The editor for one edit that finds guidance anew at its first `full` steps and then at every `EVERY`-th.

    null: the null text's context, the same tensor that the branches without an instruction are told.
    """
    reusing = copy.copy(editor)
    reusing.branches = ReusedGuidance(editor.branches, null, full)  # type: ignore[method-assign]
    return reusing
