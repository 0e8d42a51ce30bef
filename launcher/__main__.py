"""`python -m launcher` is the console script `launcher`."""

from launcher.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
