"""One file per command of the ``stepkd`` command line that is not a Trainer entry point.

Each has a docstring (its help text), ``add_arguments(parser)`` and ``run(arguments) -> exit code``.
"""
