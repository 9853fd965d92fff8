"""Inputs of `mtroll eval`: the configuration, and everything it names, read and validated."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_troll.checks import check_length, check_served, remarks_on_weights
from megatron_troll.config import Config, ConfigError, EvalSet, RewardConfig, RolloutConfig
from megatron_troll.data.gym.tasks import Wanted, make
from megatron_troll.data.reader import Counts, Reader, instruction_of
from megatron_troll.data.stops import StopTokens, stop_tokens
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import check_reasoning_tags
from megatron_troll.mcore.layout import world_size
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.rewards.terms import Judges, default, resolve, terms
from megatron_troll.task import dated, remarks_on_date, shape_of, tokenizer_of
from megatron_troll.types import Prompt


@dataclass(frozen=True)
class DataSet:
    """One data set with its prompts. `config` and `reward` have every default filled in; its engine is
    built with `rollout`."""

    name: str
    config: EvalSet
    reward: RewardConfig
    rollout: RolloutConfig
    prompts: tuple[Prompt, ...]
    counts: Counts
    stops: StopTokens

    def __str__(self) -> str:
        return f"{self.name}: {len(self.prompts):,} prompts x {self.config.samples} ({self.counts})"


@dataclass(frozen=True)
class EvalTask:
    """A validated evaluation. `at_once`: answers sampled together, over all data-parallel ranks; `remarks`
    are on weights and date."""

    config: Config
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    sets: tuple[DataSet, ...]
    at_once: int
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        remarks = dict.fromkeys(one.stops.remark for one in self.sets)
        return "\n".join(filter(None, (*map(str, self.sets), *remarks, *self.remarks)))

    @property
    def batches(self) -> int:
        return sum(map(self.batches_of, self.sets))

    def batches_of(self, one: DataSet) -> int:
        return -(-len(one.prompts) * one.config.samples // self.at_once)

    def token_text(self, token: int) -> str:
        """Text of one token id."""
        return str(self.tokenizer.decode([token]))


def prepare(config: Config) -> EvalTask:
    """Read and check what `config` names. Raises one of task.PROBLEMS, which says what is wrong and where.
    Touches no device and writes nothing."""
    if not config.eval:
        raise ConfigError("eval: missing; `mtroll eval` needs eval.<name>.files or .gym, prompts to answer")
    if config.resume:
        raise ConfigError(
            "resume: an evaluation is not resumed; delete its run folder or choose another name"
        )
    rewards = {name: _reward(config, name) for name in config.eval}
    resolved = {name: one.model_copy(update={"reward": rewards[name]}) for name, one in config.eval.items()}
    config = config.model_copy(update={"eval": resolved})
    shape = shape_of(config)
    if config.rollout.engine == "sglang":
        check_served(config)
    for name, one in config.eval.items():
        limits = {"max_prompt_tokens": one.max_prompt_tokens, "sampling.max_tokens": one.sampling.max_tokens}
        check_length({f"eval.{name}.{key}": tokens for key, tokens in limits.items()}, shape)
    tokenizer = tokenizer_of(config.policy, shape)
    config = dated(config, tokenizer)
    if any(term.config.reasoning == "drop" for reward in rewards.values() for term in terms(reward)):
        check_reasoning_tags(tokenizer)
    sets = tuple(_data_set(config, name, rewards[name], tokenizer, shape.vocab) for name in config.eval)
    layout = config.policy.layout
    replicas = world_size(config) // (layout.tp * layout.pp * layout.cp)
    at_once = config.rollout.max_sequences * replicas
    remarks = (*remarks_on_weights(config.policy), *remarks_on_date(config, tokenizer))
    return EvalTask(config, shape, tokenizer, sets, at_once, remarks)


def _reward(config: Config, name: str) -> RewardConfig:
    """The data set's own verifier config, otherwise the run's, with its defaults. Raises ConfigError."""
    one = config.eval[name]
    if one.reward is None:
        return resolve(default(config.reward, one))
    return resolve(one.reward, f"eval.{name}.reward")


def _data_set(
    config: Config, name: str, reward: RewardConfig, tokenizer: PreTrainedTokenizerBase, vocab: int
) -> DataSet:
    one, key = config.eval[name], f"eval.{name}"
    template = _template(config, name, tokenizer)
    problem = Judges(reward).problem
    reader = Reader(one, key, template, problem, instruction=instruction_of(one), system=one.system)
    if one.gym is not None:
        tasks = make({name: Wanted(f"{key}.gym", one.gym, train=False, held_out=one.gym.size)})[name]
        prompts = reader.tasks(tasks.held_out, tasks.to_prompt)
    else:
        prompts = reader.files(one.files or (), one)
    return DataSet(
        name=name,
        config=one,
        reward=reward,
        # Nothing is trained on these samples: recording their top-K would only waste memory.
        rollout=config.rollout.model_copy(update={"sampling": one.sampling, "top_k": 0}),
        prompts=tuple(prompts[: one.prompts]),
        counts=reader.counts,
        stops=stop_tokens(template, config.policy.path, vocab, one.sampling.stop, f"{key}.sampling.stop"),
    )


def _template(config: Config, name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The chat template with the data set's own arguments, otherwise those of training."""
    own, data = config.eval[name].template_arguments, config.data
    if own is None:
        template = ChatTemplate(tokenizer, data.template_arguments if data else {}, config.date)
        template.check("data.template_arguments")
    else:
        template = ChatTemplate(tokenizer, own, config.date)
        template.check(f"eval.{name}.template_arguments")
    return template
