"""Lightning modules: one thin class per method on one base."""

from stepkd.modules.base import Prepared, StepModule
from stepkd.modules.optim import OptimizerSpec
from stepkd.modules.prm import PRMModule
from stepkd.modules.sft import SFTModule
from stepkd.modules.validation import ValidationSpec

__all__ = ["OptimizerSpec", "PRMModule", "Prepared", "SFTModule", "StepModule", "ValidationSpec"]
