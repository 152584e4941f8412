"""Lightning modules: one thin class per method on one base."""

from __future__ import annotations

from typing import Any

from stepkd.lazy import lazily

_HOMES = {
    "base": "Prepared StepModule",
    "dpo": "DPOModule",
    "fidelity": "FidelitySpec",
    "gkd": "GKDModule",
    "kdrl": "KDRLModule",
    "kto": "KTOModule ReferencePointSpec StepKTOModule",
    "optim": "OptimizerSpec",
    "preference": "PreferenceModule ReferenceSpec",
    "prm": "PRMModule",
    "rewards": "RewardSpec",
    "settings": "DivergenceSpec KDSpec MixSpec PolicyLossSpec RolloutSpec SampleLogSpec SourceSpec StepCreditSpec",
    "sft": "SFTModule",
    "step_scores": "FocusSpec",
    "validation": "ValidationSpec",
}


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES, name)
