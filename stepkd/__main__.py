"""``python -m stepkd`` is the ``stepkd`` command."""

from stepkd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
