"""Pure loss functions: tensors in, named sums and detached metrics out. Knows only torch."""

from stepkd.losses.divergence import (
    balanced_kl,
    entropy,
    forward_kl,
    generalized_jsd,
    kl_estimate,
    nkd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    temperature_slope,
    tempered,
    top_k_buckets,
)
from stepkd.losses.dpo import dpo, visit_smoothing
from stepkd.losses.kto import (
    kto,
    kto_values,
    outcome_cross_entropy,
    ratio_rule,
    reference_point,
    step_kto,
    step_kto_counts,
)
from stepkd.losses.linear import (
    DEFAULT_CHUNK,
    VocabHead,
    chunked_head,
    cross_entropy,
    fused_sum,
    head_parameters,
    target_logps,
    token_logps,
)
from stepkd.losses.policy_gradient import clipped_loss, group_advantages, step_advantages, token_normalisation
from stepkd.losses.prm import (
    label_token_logps,
    likeliest,
    log_odds,
    multilevel_ranking,
    pqm,
    step_cross_entropy,
    step_decision_counts,
    step_decisions,
    step_regression,
    step_weights,
)
from stepkd.losses.prm_teacher import class_centroids, mcmi, subclass_directions, subclass_targets
from stepkd.losses.reduce import LossTerms, component_scales, segment_sum
