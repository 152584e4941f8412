"""Claims: experiments in the tiny world whose verdict is a result.

A claim file (``recipes/claims/<name>.yaml``) names jobs, their settings, arms, seeds and statements. ``stepkd claims``
runs the jobs with the functions that users call, and says for every statement: reproduced, not reproduced, or
inconclusive. ``recipes/claims/README.md`` explains how to write one.
"""

from stepkd.claims.jobs import Measured

__all__ = ["Measured"]
