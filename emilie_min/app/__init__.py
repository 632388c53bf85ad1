"""The command `emilie` and the studio."""
