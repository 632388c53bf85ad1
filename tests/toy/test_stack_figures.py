"""The stack against replaying: the committed figures follow from the committed outcomes, and what is right is known."""

import json
from pathlib import Path

from emilie_min.toy import stack, world

BENCH = Path(__file__).resolve().parents[2] / "notebooks" / "bench"


def test_the_figures_follow_from_the_chains():
    done = json.loads((BENCH / "stack.json").read_text(encoding="utf-8"))
    for found in done.values():
        again = stack.summary(found["rows"])
        assert again == {name: found[name] for name in again}
        assert found["hidden and shown again, the same bits"] == 1
    assert (BENCH / "stack.md").read_text(encoding="utf-8") == stack.table(done)


def test_without_an_edit_the_others_lead_elsewhere():
    seeds = range(40)
    for seed in seeds:
        first, steps = world.chain(seed, 3)
        scenes = [after for _, after, _ in steps]
        right = world.without(first, scenes, 0)
        if right is None:
            continue
        taken, now = world.parts(first, scenes[0]), scenes[-1]
        assert world.put(right, taken) == now and not world.parts(first, right).keys() & taken.keys()
    assert sum(world.without(*_of(seed)) is not None for seed in seeds) > 10


def _of(seed):
    first, steps = world.chain(seed, 3)
    return first, [after for _, after, _ in steps], 0
