"""A toy world in which the right answer to every instruction is known exactly."""
