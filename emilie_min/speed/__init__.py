"""`emilie speed`: the measuring stick."""
