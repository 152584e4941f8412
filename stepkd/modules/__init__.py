"""Lightning modules: one thin class per method on one base."""

from stepkd.modules.base import Prepared, StepModule
from stepkd.modules.dpo import DPOModule
from stepkd.modules.fidelity import FidelitySpec
from stepkd.modules.gkd import GKDModule
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kto import KTOModule, ReferencePointSpec, StepKTOModule
from stepkd.modules.optim import OptimizerSpec
from stepkd.modules.preference import PreferenceModule, ReferenceSpec
from stepkd.modules.prm import PRMModule
from stepkd.modules.rewards import RewardSpec
from stepkd.modules.settings import (
    DivergenceSpec,
    KDSpec,
    MixSpec,
    PolicyLossSpec,
    RolloutSpec,
    SampleLogSpec,
    SourceSpec,
    StepCreditSpec,
)
from stepkd.modules.sft import SFTModule
from stepkd.modules.step_scores import FocusSpec
from stepkd.modules.validation import ValidationSpec

__all__ = [
    "DPOModule",
    "DivergenceSpec",
    "FidelitySpec",
    "FocusSpec",
    "GKDModule",
    "KDRLModule",
    "KDSpec",
    "KTOModule",
    "MixSpec",
    "OptimizerSpec",
    "PRMModule",
    "PolicyLossSpec",
    "PreferenceModule",
    "Prepared",
    "ReferencePointSpec",
    "ReferenceSpec",
    "RewardSpec",
    "RolloutSpec",
    "SFTModule",
    "SampleLogSpec",
    "SourceSpec",
    "StepCreditSpec",
    "StepKTOModule",
    "StepModule",
    "ValidationSpec",
]
