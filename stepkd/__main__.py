"""``python -m stepkd`` is the ``stepkd`` command."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.pop(0)  # Python puts the current folder first, where its files shadow packages; main() puts it last

from stepkd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
