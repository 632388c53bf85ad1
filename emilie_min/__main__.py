"""python -m emilie_min"""

from .app.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
