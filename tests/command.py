"""The command line, run in the tests' own process."""

from emilie_min.app import cli

MODEL = ["--weights", "random", "--config", "toy", "--device", "cpu", "--steps", "1"]


def run(*args, capsys) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and stderr's lines without progress bars."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("emilie")]
