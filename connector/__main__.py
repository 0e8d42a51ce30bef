"""`python -m connector` is the console script `connector`."""

from connector.app.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
