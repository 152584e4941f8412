"""Lightning modules: one thin class per method on one base."""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "base": "StepModule",
    "components": "Component CrossEntropy ForwardPass StepLoss",
    "distillation": "DistillationModule",
    "dpo": "DPOModule IPO PairLoss Sigmoid SigmoidByVisits",
    "fidelity": "FidelityConfig",
    "gkd": "Distillation GKDModule",
    "gkd_settings": (
        "BalancedKL Beside CrossEntropyConfig DivergenceConfig ForwardKL JSD LearnedTemperature Mixed NKD ReverseKL "
        "SkewForwardKL SkewReverseKL SourceConfig"
    ),
    "kdrl": "KDRLModule",
    "kdrl_settings": (
        "AsAdvantage Constant ExactKL KDConfig Linear PolicyLossConfig RolloutConfig SampleLogConfig SampledKL "
        "StepCreditConfig Switch"
    ),
    "kto": "ImplicitPRMModule KTOModule ReferencePointConfig StepKTOModule",
    "optim": "OptimizerConfig",
    "preference": "PreferenceModule ReferenceConfig",
    "prm": "PQM LanguageModelling MultilevelRanking PRMModule StepCrossEntropy StepDecisions StepRegression",
    "prm_teachers": "MCMI StepDistillation",
    "rewards": "RewardConfig",
    "sft": "SFTModule",
    "step_scores": "FocusConfig",
    "validation": "ValidationConfig",
}

__getattr__ = lazily(__name__, _HOMES)
