"""Lightning modules: one thin class per method on one base."""

from __future__ import annotations

from typing import Any

from stepkd.lazy import lazily

_HOMES = {
    "base": "StepModule",
    "components": "Component CrossEntropy ForwardPass",
    "distillation": "Distillation DistillationModule",
    "distillation_settings": (
        "BalancedKL Beside CrossEntropyConfig DivergenceConfig ForwardKL JSD Mixed NKD ReverseKL SkewForwardKL "
        "SkewReverseKL SourceConfig"
    ),
    "dpo": "DPOModule IPO PairLoss Sigmoid SigmoidByVisits",
    "fidelity": "FidelityConfig",
    "gkd": "GKDModule",
    "kdrl": "KDRLModule",
    "kto": "KTOModule ReferencePointConfig StepKTOModule",
    "optim": "OptimizerConfig",
    "preference": "PreferenceModule ReferenceConfig",
    "prm": "LanguageModelling PRMModule StepCrossEntropy StepLoss",
    "rewards": "RewardConfig",
    "settings": (
        "AsAdvantage Constant ExactKL KDConfig Linear PolicyLossConfig RolloutConfig SampleLogConfig SampledKL "
        "StepCreditConfig Switch"
    ),
    "sft": "SFTModule",
    "step_scores": "FocusConfig",
    "validation": "ValidationConfig",
}


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES, name)
