"""Spoiled and hostile inputs, each made from a number, run against the command in a process of its own, and judged.

    python -m tests.fuzz --cases 1000 --seed 7          # at length; the suite runs ten of each kind
    python -m tests.fuzz --kinds masks --only 12        # one case again, kept to be looked at
    python -m tests.fuzz.kill --times 100               # kill -9 at random moments

`kinds` makes the cases, `judge` runs one and says where it fell short. What can be said of one function and all values
is hypothesis's, in test_properties.py. The cases here are not: one is a whole process and files, which hypothesis would
run hundreds of times to make smaller, and a number that makes the same bytes anywhere says all there is to say.
"""
