"""stepkd: train small language models to reason with correct steps.

Process reward models, step-level preference training and on-policy distillation as thin Lightning modules over pure
loss functions. Here are the names that a script needs; each loads with its first use, so importing this package loads
nothing heavy. Everything else stands in the subpackages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepkd.lazy import lazily

__version__ = "0.2.0"

if TYPE_CHECKING:  # what type checkers and editors see of _HOMES
    from stepkd.data.config import DataConfig as DataConfig
    from stepkd.data.datamodule import StepData as StepData
    from stepkd.data.templates import PromptTemplate as PromptTemplate
    from stepkd.grading.judge import judge as judge
    from stepkd.grading.pool import Grader as Grader
    from stepkd.grading.pool import GradingConfig as GradingConfig
    from stepkd.models.checkpoint import export_model as export_model
    from stepkd.models.checkpoint import load_policy as load_policy
    from stepkd.models.spec import LoRAConfig as LoRAConfig
    from stepkd.models.spec import PolicyConfig as PolicyConfig
    from stepkd.modules.dpo import DPOModule as DPOModule
    from stepkd.modules.gkd import GKDModule as GKDModule
    from stepkd.modules.kdrl import KDRLModule as KDRLModule
    from stepkd.modules.kto import ImplicitPRMModule as ImplicitPRMModule
    from stepkd.modules.kto import KTOModule as KTOModule
    from stepkd.modules.kto import StepKTOModule as StepKTOModule
    from stepkd.modules.prm import PRMModule as PRMModule
    from stepkd.modules.sft import SFTModule as SFTModule
    from stepkd.sampling.engine import SamplingConfig as SamplingConfig
    from stepkd.sampling.transformers_engine import sample as sample
    from stepkd.scorers.load import load_scorer as load_scorer
    from stepkd.scorers.scorer import score_rows as score_rows

_HOMES = {
    "data": "DataConfig PromptTemplate StepData",
    "grading": "Grader GradingConfig",
    "grading.judge": "judge",
    "models": "LoRAConfig PolicyConfig",
    "models.checkpoint": "export_model load_policy",
    "modules": "DPOModule GKDModule ImplicitPRMModule KDRLModule KTOModule PRMModule SFTModule StepKTOModule",
    "sampling": "SamplingConfig",
    "sampling.transformers_engine": "sample",
    "scorers.load": "load_scorer",
    "scorers.scorer": "score_rows",
}

__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *" ".join(_HOMES.values()).split()})
