"""Every field of metrics.jsonl, in one table. docs/metrics.md is generated from it:

python -m megatron_troll.observe.fields > docs/metrics.md
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from megatron_troll.objectives.energy import EDGES
from megatron_troll.objectives.slots import DECILES
from megatron_troll.observe.metrics import REDUCTIONS


@dataclass(frozen=True)
class Field:
    """A field of metrics.jsonl. `unit` is empty for a plain number. `token` fields are reduced over the
    step's tokens that carry loss: the plain name is the mean, `name/p99` and so on are other reductions."""

    name: str
    unit: str
    meaning: str
    token: bool = False


FREQUENCIES = (
    *(f"whose share of the rollout batch is {edge:g} or more" for edge in EDGES[:1]),
    *(f"whose share is between {low:g} and {high:g}" for high, low in pairwise(EDGES)),
    f"whose share is below {EDGES[-1]:g}",
)

RUN = (
    Field("step", "rollout batches", "rollout batches trained on; 0 is the evaluation before training"),
    Field(
        "success",
        "",
        "mean reward over all responses sampled for the batch, dropped ones included; of a sum of rewards "
        "the mean of the part that is its success",
    ),
    Field("reward", "", "reward.name=sum or reward.overlong.soft: mean reward over all those responses"),
    Field("reward_std", "", "standard deviation of the rewards"),
    Field("asymmetry", "", "Asym: variance of weight x advantage over the answers to a prompt; not with gae"),
    Field("held_out_success", "share", "success on held-out prompts; on evaluation steps only"),
    Field(
        "frac_zero_std_groups",
        "share",
        "prompts trained on whose samples all got the same reward and so give no gradient",
    ),
    Field("level", "", "level of the curriculum of data.gym from which the step's prompts are"),
    Field("refill_rounds", "", "rounds of new prompts sampled to replace such prompts (rollout.refill)"),
    Field("dropped_groups", "share", "sampled prompts that are not trained on"),
    Field("sampled_responses", "", "responses sampled for the batch, dropped ones included"),
    Field("response_length", "tokens", "mean length of the sampled responses, stop token included"),
    Field("truncated", "share", "responses cut at rollout.sampling.max_tokens"),
    Field("servers", "servers", "servers that received the weights (rollout.engine=sglang)"),
    Field("reward_timeouts", "answers", "answers whose verifier timed out (reward 0); absent if none"),
    Field("reward_crashes", "answers", "answers whose verifier was killed (reward 0); absent if none"),
    Field("reward_errors", "answers", "answers on which the verifier raised (reward 0); absent if none"),
    Field("unclosed_reasoning", "answers", "answers of unclosed reasoning (reward 0); absent if none"),
    Field("loss", "", "mean over the step's optimizer updates of -sum(weight * J)"),
    Field("grad_norm", "", "global gradient norm before clipping, mean over the updates"),
    Field("lr", "", "learning rate of the last update"),
    Field("skipped_updates", "updates", "updates skipped because of NaN or Inf"),
    Field("spared_tokens", "share", "repeated prompt tokens that were not read again (train.share_prefixes)"),
    Field("masked_updates", "updates", "updates not taken, because no token of them carries loss"),
    Field("staleness", "rollout batches", "batches trained on between sampling and training this one"),
    Field(
        "version_age",
        "rollout batches",
        "batches trained on since the weights that sampled a token, mean over tokens",
    ),
    Field("mixed_versions", "share", "responses whose tokens come from more than one version of the weights"),
    Field(
        "critic_explained_variance",
        "",
        "1 - var(target - value) / var(target) over the batch's tokens before the critic's updates",
    ),
    Field("critic_loss", "", "weighted mean of (value - target)^2 / 2 over the updates"),
    Field("critic_grad_norm", "", "the critic's gradient norm before clipping, mean over the updates"),
    Field("critic_skipped", "updates", "updates of the critic skipped because of NaN or Inf"),
)

# reward.name=sum, reward.overlong.soft
PARTS_OF_REWARDS = (
    Field("reward/PART", "", "mean of a part (overlong: of the soft penalty), unweighted, where it judged"),
)

# data.sources
SOURCES = (
    Field("success/SOURCE", "", "success over the responses to prompts of this source"),
    Field("held_out_success/SOURCE", "share", "success on the held-out prompts of this source"),
    Field("level/SOURCE", "", "level of the source's curriculum from which the step's prompts are"),
)

TOKEN = (
    Field("objective", "", "J of a token, which training maximises", True),
    Field(
        "entropy",
        "nats",
        "entropy over the full vocabulary of the new policy, or of the old one if the objective never forms "
        "a full row of the new one (trust_region troll with support: old)",
        True,
    ),
    Field("approx_kl", "nats", "k3 estimate of KL(old || new), new after projection", True),
    Field(
        "rollout_trainer_kl", "nats", "k3 estimate of KL(rollout engine || old policy of the trainer)", True
    ),
    Field("rollout_trainer_gap", "nats", "|log-prob of the rollout engine - that of the old policy|", True),
    Field("true_kl", "nats", "KL(new || old) over the full vocabulary at 16 positions per micro-batch", True),
    Field("ratio", "", "new over old probability of the sampled token, as the objective uses it", True),
    Field("clipped", "share", "tokens whose ratio is beyond the bound of the trust region", True),
    Field("clipped_above", "share", "clipped tokens with positive advantage; dfpo: responses", True),
    Field("clipped_below", "share", "clipped tokens with negative advantage; dfpo: responses", True),
)

# ALGORITHMS 4
ENERGY = (
    Field("energy", "", "norm of the gradient at the logits through the sampled token's log-prob", True),
    *(
        Field(
            f"energy_bucket_{i}",
            "",
            f"energy of tokens {words}, 0 for all others; divided by energy: their share of the gradient",
            True,
        )
        for i, words in enumerate(FREQUENCIES)
    ),
    *(Field(f"tokens_bucket_{i}", "share", f"tokens {words}", True) for i, words in enumerate(FREQUENCIES)),
)

# ALGORITHMS 1.9
TROLL = (
    Field("kl_before", "nats", "KL(new || old) of the sparse distributions before projection", True),
    Field("kl_before_projected", "nats", "kl_before over the projected tokens only", True),
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
    Field("tau", "", "weight of the new policy in the projected one; 1 if nothing was projected", True),
    Field("passes", "", "passes of the solver over the support", True),
    Field("unsolved", "share", "tokens for which the solver hit its limit of passes; the bound holds", True),
    Field("kept_old", "tokens", "tokens in the old policy's support", True),
    Field("kept_new", "tokens", "tokens in the new policy's support", True),
    Field("covered_old", "share", "probability mass of the old support under the old policy", True),
    Field("covered_new", "share", "probability mass of the new support under the new policy", True),
    Field("k_bound_old", "share", "positions at which k, not delta, limits the old support", True),
    Field("k_bound_new", "share", "positions at which k, not delta, limits the new support", True),
    Field("sampled_outside_old", "share", "sampled tokens outside the old top-k prefix", True),
    Field("sampled_outside_new", "share", "sampled tokens outside the new top-k prefix", True),
    Field("sampled_impossible", "share", "sampled tokens with probability 0 under the new policy", True),
    Field("support_jaccard", "", "tokens in both supports divided by tokens in either", True),
    Field("bound", "nats", "radius of the KL ball; the same for all tokens unless it is CPPO's budget", True),
    Field(
        "kept_below_default",
        "share",
        "positions at which the old policy keeps a token less likely than the default probability p_d: raise "
        "delta or lower p_d",
        True,
    ),
    Field("one_token_support", "share", "positions with a single kept token, which give no gradient", True),
)

# ALGORITHMS 2, 6.1, 6.2, 6.4
MASKS = (
    Field(
        "divergence", "", "divergence between the rollout or old policy and the new one, as configured", True
    ),
    Field("masked", "share", "tokens without gradient due to their own or their response's divergence", True),
    *(
        Field(f"masked_decile_{i}", "share", f"masked, over the tokens in tenth {i} of the responses", True)
        for i in range(DECILES)
    ),
    Field("masked_by_weight", "share", "cppo: tokens masked because of their own weighted divergence", True),
    Field("masked_by_budget", "share", "cppo: tokens masked because of what earlier tokens spent", True),
    Field("threshold", "", "cppo: limit of a token's weighted divergence; below 0 when overspent", True),
    Field("delta_b", "", "cppo: budget that each token adds", True),
    Field("budget_exhausted", "share", "cppo: responses whose threshold fell to 0", True),
    Field("response_divergence", "", "cppo: weighted mean divergence of a response, over responses", True),
    Field("responses_masked", "share", "trm: responses without gradient", True),
    Field("prefix_minimum", "", "minpro: smallest ratio of the tokens before a token", True),
)

# ALGORITHMS 4
SEQUENCES = (
    Field("sequence_ratio", "", "dfpo: geometric mean of a response's ratios, over responses", True),
    Field("weight_change", "", "dfpo: weight after the transform divided by the weight before", True),
    Field("weight_at_zero", "share", "dfpo: responses whose weight is 0", True),
    Field("weight_variance", "", "dfpo: variance of the weights in a group", True),
    Field("group_multiplier", "", "dfpo: nu, how far the exact projection moves a group", True),
    Field("group_imbalance_before", "", "dfpo: |sum A s| of a group before the transform", True),
    Field(
        "group_imbalance", "", "dfpo: |sum A s| of a group after the transform; 0: exact cancellation", True
    ),
    Field("group_imbalance_relative", "", "dfpo: |sum A s| / sum |A s| after the transform", True),
    Field("asymmetry_before", "", "dfpo: variance of A s in a group before the transform", True),
)

# ALGORITHMS 3
REFERENCE = (
    Field("reference_kl", "nats", "estimate of KL(new || reference), without factor objective.kl.beta", True),
    Field("reference_kl_ratio", "", "new over old probability of the sampled token, used as weight", True),
    Field("reference_kl_clamped", "share", "k1, k2, k3: tokens whose log-ratio is beyond 20", True),
    Field("reference_kl_mass", "share", "tike: probability mass of the tokens summed over", True),
    Field("reference_kl_negative", "share", "tike: positions at which the truncated sum is below 0", True),
    Field("reference_kl_sampled_outside", "share", "tike: sampled tokens that are not summed over", True),
    Field(
        "reference_kl_floored",
        "share",
        "tike: positions at which the reference was raised to its floor",
        True,
    ),
)

# ALGORITHMS 5, 6.5
CORRECTION = (
    Field("correction_weight", "", "weight of the score that corrects for the rollout policy", True),
    Field("correction_weight_squared", "", "square of correction_weight", True),
    Field(
        "effective_sample_size",
        "share",
        "correction_weight^2 / correction_weight_squared: equally weighted tokens with as much information",
    ),
    Field("tis_truncated", "share", "tis: tokens whose weight was cut at the cap", True),
    Field("icepop_left_out", "share", "icepop: tokens whose ratio is outside [alpha, beta]", True),
    Field("jackpot_accept_prob", "share", "probability that the sampled token is accepted", True),
    Field("jackpot_accepted", "share", "tokens that were accepted", True),
    Field("jackpot_response_acceptance", "share", "accepted tokens of a response, over responses", True),
    Field(
        "jackpot_z_approx", "", "acceptance rate of the position, summed over the stored tokens only", True
    ),
    Field("jackpot_z", "", "jackpot_z_approx after calibration, which weights the position", True),
    Field("jackpot_kappa", "", "calibration over the step: mean accept_prob over mean z_approx", True),
    Field("jackpot_kappa_clamped", "share", "updates whose kappa was clamped to [0.5, 4]", True),
    Field("jackpot_z_accept_correlation", "", "correlation of z_approx and accept_prob over the step", True),
    Field("jackpot_weight_truncated", "share", "tokens whose weight was cut at c1", True),
    Field("jackpot_back_truncated", "share", "tokens whose old-over-target ratio was cut at c2", True),
    Field("jackpot_kl_rollout", "nats", "KL(target || rollout) over the stored tokens", True),
    Field(
        "jackpot_kl_post", "nats", "KL(target || distribution of accepted tokens), stored tokens only", True
    ),
)

# models.rollout; ALGORITHMS 5
ROLLOUT_MODEL = (
    Field(
        "distill_kl",
        "nats",
        "KL(policy || rollout model) over the policy's kept tokens, all others counted as one; the policy "
        "after its updates",
        True,
    ),
    Field("distill_covered", "share", "probability of the policy's kept tokens", True),
    Field("distill_weight", "", "weight of that KL in the rollout model's loss"),
    Field("rollout_model_loss", "", "the rollout model's loss, mean over its updates"),
    Field("rollout_model_grad_norm", "", "the model's gradient norm before clipping, mean over its updates"),
    Field("rollout_model_lr", "", "the rollout model's learning rate after the batch"),
    Field("rollout_model_skipped", "updates", "updates of the rollout model skipped because of NaN or Inf"),
    Field("rollout_model_clipped", "share", "tokens whose ratio to the rollout engine was clipped"),
    Field(
        "rollout_model_approx_kl", "nats", "estimate of KL(rollout engine || rollout model), sampled tokens"
    ),
    Field("rollout_model_entropy", "nats", "entropy of the rollout model over the vocabulary"),
)

EXPERTS = (
    Field("expert_load_max", "", "tokens of the busiest expert divided by the mean; 1 is even"),
    Field("expert_entropy", "", "entropy of the load distribution divided by that of an even one; 1 is even"),
    Field(
        "replay_changed",
        "share",
        "train.replay: router choices that replay changed; the plain name is over all layers",
    ),
    Field(
        "replay_left_out",
        "share",
        "train.replay: tokens whose routing the engine did not record as it sampled; their routers choose",
    ),
)

SPEED = (
    Field(
        "tokens_per_s",
        "tokens/s",
        "tokens generated and trained on per second of the step; dropped responses are not counted",
    ),
    Field("mfu", "share", "model FLOP/s over the devices' dense bf16 peak; absent if the peak is unknown"),
    Field("seconds", "s", "wall time of the step with its evaluation and the checkpoint of the step before"),
)

PHASES = (
    Field("generation", "s", "sampling the rollout batch"),
    Field("sync", "s", "sending the new weights to the engine"),
    Field("reward", "s", "verifying the answers"),
    Field("old_policy", "s", "forward that records the old policy for all updates but the first"),
    Field("reference", "s", "forward of the frozen reference model"),
    Field("critic", "s", "the critic's values and its updates"),
    Field("rollout_model", "s", "the rollout model's updates, and the policy's forward for their targets"),
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
        "KL(engine || trainer) at temperature 1 on fixed prompts after a sync, for the server where it is "
        "largest; all tokens outside the server's top 64 count as one",
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
            "One JSON object per step. A field that does not apply to the configured objective, or to this",
            "step, is absent; a NaN or infinite value is `null`. TensorBoard and W&B get the same names.",
            "Generated from `megatron_troll/observe/fields.py`; do not edit.",
            "",
            "## The step",
            *_table(RUN),
            "",
            "### With named sources (data.sources)",
            "",
            "`SOURCE` is the name of a source; a source of which a step has no response is absent.",
            *_table(SOURCES),
            "",
            "### With a sum of rewards (reward.name: sum)",
            "",
            "`PART` is the name of a part.",
            *_table(PARTS_OF_REWARDS),
            "",
            "## Over the tokens that carry loss",
            "",
            "The plain name is the mean over every token of the step, on all ranks. Other reductions that",
            "the objective requests have a suffix: "
            + ", ".join(f"`name/{r}`" for r in REDUCTIONS if r != "mean")
            + ".",
            "Quantiles are exact up to 65,536 tokens per rank; beyond that they use every n-th token.",
            "A token to which a field does not apply is left out of its reductions.",
            *_table(TOKEN),
            "",
            *(line for heading, fields in PARTS.items() for line in (f"### {heading}", *_table(fields), "")),
            "## Experts",
            "",
            "From the policy's training forwards, on all ranks. The plain name is for the least even layer;",
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
