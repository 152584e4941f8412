"""Claims: experiments in the tiny world whose verdict is a result.

A claim file (``recipes/claims/<name>.yaml``) names an experiment, its settings, seeds and statements. ``stepkd claims``
runs it, one row per arm and seed, and says for every statement: reproduced, not reproduced, or inconclusive.
``recipes/claims/README.md`` explains how to write one.
"""

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit

__all__ = ["ArmResult", "Experiment", "Report", "Unit"]
