"""Pure loss functions: tensors in, named sums and detached metrics out. Knows only torch."""

from stepkd.losses.divergence import (
    balanced_kl,
    entropy,
    forward_kl,
    generalized_jsd,
    nkd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tempered,
    top_k_buckets,
    total_variation,
)
from stepkd.losses.dpo import dpo, visit_smoothing
from stepkd.losses.fused import fused_sum, head_parameters
from stepkd.losses.kl_estimators import kl_estimate
from stepkd.losses.kto import kto, kto_values, ratio_rule, reference_point, step_kto, step_kto_counts
from stepkd.losses.linear import DEFAULT_CHUNK, VocabHead, chunked_head
from stepkd.losses.policy_gradient import (
    clipped_loss,
    group_advantages,
    group_step_advantages,
    reward_to_go,
    scatter_step_rewards,
    segments_to_go,
    token_normalisation,
)
from stepkd.losses.pqm import pqm
from stepkd.losses.prm import label_token_logps, step_cross_entropy, step_weights
from stepkd.losses.reduce import LossTerms, component_scales, reduce, segment_sum
from stepkd.losses.token import cross_entropy, target_logps, token_logps
