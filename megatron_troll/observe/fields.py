"""Every field of metrics.jsonl, in one table. docs/metrics.md is made from it:

python -m megatron_troll.observe.fields > docs/metrics.md
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from megatron_troll.objectives.energy import EDGES
from megatron_troll.objectives.responses import DECILES
from megatron_troll.observe.metrics import REDUCTIONS


@dataclass(frozen=True)
class Field:
    """`unit` is empty for a plain number. `token` fields are reduced over the step's tokens that carry
    loss: the name alone is their mean, `name/p99` and so on their other reductions."""

    name: str
    unit: str
    meaning: str
    token: bool = False


FREQUENCIES = (
    *(f"that make up {edge:g} of the rollout batch or more" for edge in EDGES[:1]),
    *(f"between {low:g} and {high:g} of it" for high, low in pairwise(EDGES)),
    f"below {EDGES[-1]:g} of it",
)

RUN = (
    Field("step", "rollout batches", "rollout batches trained on; 0 is the evaluation before training"),
    Field("success", "", "mean reward of everything sampled for the batch, as sampled"),
    Field("reward_std", "", "standard deviation of those rewards"),
    Field("held_out_success", "share", "mean reward on held-out prompts; on evaluation steps only"),
    Field(
        "frac_zero_std_groups",
        "share",
        "prompts trained on whose samples all got the same reward: no gradient from them",
    ),
    Field("refill_rounds", "", "times that new prompts were drawn for such ones (rollout.refill)"),
    Field("dropped_groups", "share", "prompts sampled that are not trained on"),
    Field("sampled_responses", "", "responses sampled for the batch, dropped ones included"),
    Field("response_length", "tokens", "mean length of the responses sampled, stop token included"),
    Field("truncated", "share", "responses cut at rollout.sampling.max_tokens"),
    Field("servers", "servers", "that were given the weights (rollout.engine=sglang)"),
    Field("reward_timeouts", "answers", "earned 0 because their verifier ran out of time; absent where none"),
    Field("reward_crashes", "answers", "earned 0 because their verifier was killed; absent where none"),
    Field("loss", "", "mean over the step's optimizer updates of -sum(weight * J)"),
    Field("grad_norm", "", "global gradient norm before clipping, mean over the updates"),
    Field("lr", "", "learning rate of the last update"),
    Field("skipped_updates", "updates", "updates left out because of NaN or Inf"),
    Field("staleness", "rollout batches", "trained on between the sampling of this batch and its own turn"),
    Field(
        "version_age", "rollout batches", "trained on since the weights that drew a token, mean over tokens"
    ),
    Field("mixed_versions", "share", "responses whose tokens come from more than one version of the weights"),
    Field(
        "critic_explained_variance",
        "",
        "1 - var(target - value) / var(target) over the batch's tokens before the critic's updates",
    ),
    Field("critic_loss", "", "weighted mean of (value - target)^2 / 2 over the updates"),
    Field("critic_grad_norm", "", "its gradient norm before clipping, mean over the updates"),
    Field("critic_skipped", "updates", "updates of the critic left out because of NaN or Inf"),
)

TOKEN = (
    Field("objective", "", "J of a token: what is maximised", True),
    Field(
        "entropy",
        "nats",
        "entropy over the full vocabulary of the new policy, or of the old one where the objective forms no "
        "row of the new one (trust_region troll with support: old)",
        True,
    ),
    Field("approx_kl", "nats", "k3 estimate of KL(old || new), new after projection", True),
    Field(
        "rollout_trainer_kl", "nats", "k3 estimate of KL(rollout engine || old policy of the trainer)", True
    ),
    Field("rollout_trainer_gap", "nats", "|log-prob of the rollout engine - that of the old policy|", True),
    Field("true_kl", "nats", "KL(new || old) over the full vocabulary, at 16 positions a micro-batch", True),
    Field("ratio", "", "new over old probability of the sampled token, as the objective uses it", True),
    Field("clipped", "share", "tokens whose ratio is beyond the bound of the trust region", True),
    Field("clipped_above", "share", "the same, positive advantage; dfpo: of responses", True),
    Field("clipped_below", "share", "the same, negative advantage; dfpo: of responses", True),
)

# ALGORITHMS 4
ENERGY = (
    Field("energy", "", "size of the gradient at the logits through the sampled token's log-prob", True),
    *(
        Field(
            f"energy_bucket_{i}",
            "",
            f"the same of tokens {words}, 0 for the rest; over energy: their share of the gradient",
            True,
        )
        for i, words in enumerate(FREQUENCIES)
    ),
    *(Field(f"tokens_bucket_{i}", "share", f"tokens {words}", True) for i, words in enumerate(FREQUENCIES)),
)

# ALGORITHMS 1.9
TROLL = (
    Field("kl_before", "nats", "KL(new || old) of the sparse distributions before projection", True),
    Field("kl_before_projected", "nats", "the same, over the projected tokens", True),
    Field("kl_after", "nats", "KL(projected || old); at most the bound", True),
    Field("projected", "share", "tokens whose policy was projected: kl_before exceeds the bound", True),
    Field("sparse_kl", "nats", "kl_before at the positions of true_kl", True),
    Field(
        "outside_mass",
        "share",
        "probability that has left the old support since it was recorded, at the positions of true_kl; "
        "above 0.01 the sparse KL misses much of the change",
        True,
    ),
    Field("regression_kl", "nats", "KL(new || projected), which the regression term reduces", True),
    Field("eta", "", "multiplier of the projection, (1 - tau) / tau", True),
    Field("tau", "", "weight of the new policy in the projected one; 1 where nothing was projected", True),
    Field("passes", "", "passes of the solver over the support", True),
    Field("unsolved", "share", "tokens where the solver reached its cap; the bound holds there too", True),
    Field("kept_old", "tokens", "tokens in the old policy's support", True),
    Field("kept_new", "tokens", "tokens in the new policy's support", True),
    Field("covered_old", "share", "probability mass of the old support under the old policy", True),
    Field("covered_new", "share", "probability mass of the new support under the new policy", True),
    Field("k_bound_old", "share", "positions where k, not delta, ended the old support", True),
    Field("k_bound_new", "share", "positions where k, not delta, ended the new support", True),
    Field("sampled_outside_old", "share", "sampled tokens outside the old top-k prefix", True),
    Field("sampled_outside_new", "share", "sampled tokens outside the new top-k prefix", True),
    Field("sampled_impossible", "share", "sampled tokens to which the new policy gives no probability", True),
    Field("support_jaccard", "", "tokens in both supports over tokens in either", True),
    Field("bound", "nats", "radius of the KL ball; one number unless it is CPPO's budget", True),
    Field(
        "kept_below_default",
        "share",
        "positions where the old policy keeps a token that is less likely than a default one: raise delta or "
        "lower p_d",
        True,
    ),
    Field("one_token_support", "share", "positions with a single kept token, which give no gradient", True),
)

# ALGORITHMS 2, 6.1, 6.2, 6.4
MASKS = (
    Field(
        "divergence", "", "divergence of the policy behind a token from the new one, as the method says", True
    ),
    Field("masked", "share", "tokens without gradient because of their divergence or their response's", True),
    *(
        Field(f"masked_decile_{i}", "share", f"the same, in tenth {i} of the responses", True)
        for i in range(DECILES)
    ),
    Field("masked_by_weight", "share", "cppo: tokens masked for their own weighted divergence", True),
    Field("masked_by_budget", "share", "cppo: tokens masked for what those before them spent", True),
    Field("threshold", "", "cppo: what a token's weighted divergence may be; below 0 when overspent", True),
    Field("delta_b", "", "cppo: budget that each token adds", True),
    Field("budget_exhausted", "share", "cppo: responses whose threshold fell to 0", True),
    Field("response_divergence", "", "cppo: weighted mean divergence of a response, over responses", True),
    Field("responses_masked", "share", "trm: responses without gradient", True),
    Field("prefix_minimum", "", "minpro: the smallest ratio before a token", True),
)

# ALGORITHMS 4
SEQUENCES = (
    Field("sequence_ratio", "", "dfpo: geometric mean of a response's ratios, over responses", True),
    Field("weight_change", "", "dfpo: weight after the transform over the one before", True),
    Field("weight_at_zero", "share", "dfpo: responses whose weight is 0", True),
    Field("weight_variance", "", "dfpo: variance of the weights in a group", True),
    Field("group_multiplier", "", "dfpo: nu, how far the exact projection moves a group", True),
    Field("group_imbalance_before", "", "dfpo: |sum A s| of a group, before the transform", True),
    Field("group_imbalance", "", "dfpo: the same after it; 0 is exact cancellation", True),
    Field("group_imbalance_relative", "", "dfpo: |sum A s| over sum |A s| after it", True),
    Field("asymmetry_before", "", "dfpo: variance of A s in a group, before the transform", True),
    Field("asymmetry", "", "dfpo: the same after it", True),
)

# ALGORITHMS 3
REFERENCE = (
    Field("reference_kl", "nats", "estimate of KL(new || reference), before objective.kl.beta", True),
    Field("reference_kl_ratio", "", "new over old probability of the sampled token, as its weight", True),
    Field("reference_kl_clamped", "share", "k1, k2, k3: tokens whose log-ratio is beyond 20", True),
    Field("reference_kl_mass", "share", "tike: probability of the tokens summed over", True),
    Field("reference_kl_negative", "share", "tike: positions where the truncated sum is below 0", True),
    Field("reference_kl_sampled_outside", "share", "tike: sampled tokens that are not summed over", True),
    Field(
        "reference_kl_floored", "share", "tike: positions where the reference was raised to the floor", True
    ),
)

# ALGORITHMS 5, 6.5
CORRECTION = (
    Field("correction_weight", "", "weight of the score for a rollout policy that is not the old one", True),
    Field("correction_weight_squared", "", "its square", True),
    Field(
        "effective_sample_size",
        "share",
        "correction_weight^2 over correction_weight_squared: tokens of equal weight that would tell as much",
    ),
    Field("tis_truncated", "share", "tis: tokens whose weight was cut at the cap", True),
    Field("icepop_left_out", "share", "icepop: tokens whose ratio is outside [alpha, beta]", True),
    Field("jackpot_accept_prob", "share", "probability that the sampled token is accepted", True),
    Field("jackpot_accepted", "share", "tokens that were accepted", True),
    Field("jackpot_response_acceptance", "share", "accepted tokens of a response, over responses", True),
    Field(
        "jackpot_z_approx", "", "acceptance rate of the position, summed over the stored tokens alone", True
    ),
    Field("jackpot_z", "", "the same after calibration, as it weighs the position", True),
    Field("jackpot_kappa", "", "calibration over the step: mean accept_prob over mean z_approx", True),
    Field("jackpot_kappa_clamped", "share", "updates whose kappa was clamped to [0.5, 4]", True),
    Field("jackpot_z_accept_correlation", "", "correlation of z_approx and accept_prob over the step", True),
    Field("jackpot_weight_truncated", "share", "tokens whose weight was cut at c1", True),
    Field("jackpot_back_truncated", "share", "tokens whose old-over-target ratio was cut at c2", True),
    Field("jackpot_kl_rollout", "nats", "KL(target || rollout) over the stored tokens", True),
    Field("jackpot_kl_post", "nats", "KL(target || law of accepted tokens) over the stored tokens", True),
)

# models.rollout; ALGORITHMS 5
ROLLOUT_MODEL = (
    Field(
        "distill_kl",
        "nats",
        "KL(policy || rollout model) on the policy's kept tokens and the rest, the policy after its updates",
        True,
    ),
    Field("distill_covered", "share", "probability of the policy's kept tokens", True),
    Field("distill_weight", "", "weight of that KL in the rollout model's loss"),
    Field("rollout_model_loss", "", "its loss, mean over the updates"),
    Field("rollout_model_grad_norm", "", "its gradient norm before clipping, mean over the updates"),
    Field("rollout_model_lr", "", "its learning rate after the batch"),
    Field("rollout_model_skipped", "updates", "its updates that were left out because of NaN or Inf"),
    Field("rollout_model_clipped", "share", "tokens whose ratio to what drew them was clipped"),
    Field("rollout_model_approx_kl", "nats", "estimate of KL(what drew || rollout model) from these tokens"),
    Field("rollout_model_entropy", "nats", "its entropy over the vocabulary"),
)

EXPERTS = (
    Field("expert_load_max", "", "tokens of the busiest expert over the mean; 1 is even"),
    Field("expert_entropy", "", "entropy of an expert drawn by its tokens over that of an even draw"),
    Field(
        "replay_changed",
        "share",
        "train.replay: choices that the router would have made otherwise; over all layers",
    ),
)

SPEED = (
    Field(
        "tokens_per_s",
        "tokens/s",
        "tokens generated and trained on, over the whole step's seconds; dropped responses are not counted",
    ),
    Field("mfu", "share", "model FLOP/s over the devices' dense bf16 peak; absent where the peak is unknown"),
    Field(
        "seconds", "s", "wall time of the step, its evaluation and the checkpoint of the step before included"
    ),
)

PHASES = (
    Field("generation", "s", "sampling the rollout batch"),
    Field("sync", "s", "giving the engine the new weights"),
    Field("reward", "s", "verifying the answers"),
    Field("old_policy", "s", "no-gradient forward that records the old policy (objective.old=trainer)"),
    Field("reference", "s", "forward of the frozen reference model"),
    Field("critic", "s", "the critic's values and its updates"),
    Field("rollout_model", "s", "the rollout model's updates, and the policy's forward that they learn from"),
    Field("forward_backward", "s", "forward and backward of every update"),
    Field("optimizer", "s", "gradient reduction, clipping and the optimizer's steps"),
    Field("evaluation", "s", "sampling and verifying held-out prompts"),
    Field("checkpoint", "s", "saving the step before, as far as training waits for it"),
)

# rollout.engine=sglang
ENGINE = (
    Field(
        "engine_kl",
        "nats",
        "KL(engine || trainer) at temperature 1 on fixed prompts after a sync, of the server that is "
        "furthest off; what lies outside of its top 64 tokens is compared as one",
        True,
    ),
)

PARTS = {
    "With SGLang servers (rollout.engine: sglang)": ENGINE,
    "With observe.energy": ENERGY,
    "With the TROLL trust region": TROLL,
    "With a mask or a prefix weight": MASKS,
    "With ratio dfpo": SEQUENCES,
    "With a reference model": REFERENCE,
    "With a correction for the rollout policy": CORRECTION,
    "With a rollout model (models.rollout)": ROLLOUT_MODEL,
}
PER_TOKEN = (*TOKEN, *(field for fields in PARTS.values() for field in fields))


def names(fields: Iterable[Field]) -> set[str]:
    return {field.name for field in fields}


def markdown() -> str:
    """The text of docs/metrics.md."""
    return "\n".join(
        [
            "# The fields of metrics.jsonl",
            "",
            "One JSON object a step. A field that does not apply to the configured objective, or to this",
            "step, is absent; a NaN or infinite value is `null`. TensorBoard and W&B get the same names.",
            "Made from `megatron_troll/observe/fields.py`; do not edit.",
            "",
            "## The step",
            *_table(RUN),
            "",
            "## Over the tokens that carry loss",
            "",
            "The name alone is the mean over every token of the step, on all ranks. Others that the",
            "objective asks for carry their reduction: "
            + ", ".join(f"`name/{r}`" for r in REDUCTIONS if r != "mean")
            + ".",
            "Quantiles are exact up to 65,536 tokens a rank, from every n-th token beyond.",
            "A token to which a field does not apply is left out of its reductions.",
            *_table(TOKEN),
            "",
            *(line for heading, fields in PARTS.items() for line in (f"### {heading}", *_table(fields), "")),
            "## Experts",
            "",
            "Of the policy's training forwards, over every rank. The name alone is the least even layer;",
            "`name/layer_N` is layer N, counted from 0.",
            *_table(EXPERTS),
            "",
            "## Speed",
            *_table(SPEED),
            *_table([Field(f"seconds/{f.name}", f.unit, f.meaning) for f in PHASES]),
            "",
        ]
    )


def _table(fields: Iterable[Field]) -> list[str]:
    head = ["", "| field | unit | meaning |", "|---|---|---|"]
    cells = ((f"`{f.name}`", f.unit, f.meaning.replace("|", r"\|")) for f in fields)
    return [*head, *(f"| {' | '.join(row)} |" for row in cells)]


if __name__ == "__main__":
    sys.stdout.write(markdown())
