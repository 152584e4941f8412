"""Lightning modules: one thin class per method on one base."""

from stepkd.modules.base import Prepared, StepModule
from stepkd.modules.optim import OptimizerSpec
from stepkd.modules.sft import SFTModule
from stepkd.modules.validation import ValidationSpec

__all__ = ["OptimizerSpec", "Prepared", "SFTModule", "StepModule", "ValidationSpec"]
