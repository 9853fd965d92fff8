"""A run's inputs: the configuration, and everything it names, read and validated."""

from dataclasses import dataclass, replace
from datetime import date
from math import ceil

from transformers import PreTrainedTokenizerBase

from megatron_troll import rollout
from megatron_troll.checks import (
    check_methods,
    check_model,
    check_models,
    check_observe,
    data_of,
    remarks_on_weights,
)
from megatron_troll.config import Config, ConfigError, Data, Model, RewardConfig, WarmStart
from megatron_troll.data.dates import writes_date
from megatron_troll.data.demonstrations import Demonstrations, load_demonstrations
from megatron_troll.data.prompts import PromptSet, load_prompts
from megatron_troll.data.rows import DataError
from megatron_troll.data.stops import StopTokens, stop_tokens
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import check_reasoning_tags, check_vocab, load_tokenizer
from megatron_troll.mcore.layout import world_size
from megatron_troll.mcore.shape import ModelShape, read_shape
from megatron_troll.mcore.version import check_version
from megatron_troll.objectives.compose import compose, refuse_dense_head, resolve
from megatron_troll.objectives.energy import Energy
from megatron_troll.objectives.objective import Objective
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.rewards import terms as rewarding
from megatron_troll.rewards.length import length_penalty

PROBLEMS = (ConfigError, DataError, OSError)


@dataclass(frozen=True)
class Task:
    """A run's inputs, read and validated. `config` has every default of every method written out; `rewards`
    judge the answers to the prompts of each source; `remarks` are on weights and date."""

    config: Config
    shape: ModelShape
    template: ChatTemplate
    stops: StopTokens
    prompts: PromptSet
    rewards: dict[str, RewardConfig]
    objective: Objective
    remarks: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.template.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.stops.ids

    @property
    def engine_top_k(self) -> int:
        """Top-K entries of the rollout engine that something reads; 0: nothing does."""
        read = self.config.objective.old == "engine" or self.objective.reads_rollout_topk
        return self.config.rollout.top_k if read else 0

    def __str__(self) -> str:
        return "\n".join(filter(None, (str(self.prompts), self.stops.remark, *self.remarks)))

    def token_text(self, token: int) -> str:
        """The text of one token id."""
        return str(self.tokenizer.decode([token]))


def prepare(config: Config) -> Task:
    """Read and check everything that `config` names. Raises one of PROBLEMS with the reason and the place;
    uses no device and writes nothing."""
    check_version()
    config = config.model_copy(
        update={
            "objective": resolve(config.objective),
            "reward": rewarding.resolve(_reward(config)),
            "data": _with_rewards(data_of(config), config.reward),
        }
    )
    data = data_of(config)
    objective = compose(config.objective)
    if config.observe.energy:
        objective = replace(objective, energy=Energy())
    if config.objective.head == "sparse":
        refuse_dense_head(objective)
    shape = shape_of(config)
    check_methods(config, objective, shape)
    check_models(config, objective, shape)
    check_observe(config.observe)
    tokenizer = tokenizer_of(config.policy, shape)
    config = dated(config, tokenizer)
    rewards = {name: source.reward or config.reward for name, source in data.mixture.items()}
    for name, one in rewards.items():
        own = name in data.sources and data.sources[name].reward is not None
        place = f"data.sources.{name}.reward" if own else "reward"
        length_penalty(one, config.rollout.sampling.max_tokens, place)
    if any(term.config.reasoning == "drop" for one in rewards.values() for term in rewarding.terms(one)):
        check_reasoning_tags(tokenizer)
    template = ChatTemplate(tokenizer, data.template_arguments, config.date)
    template.check("data.template_arguments")
    stops = stop_tokens(template, config.policy.path, shape.vocab, config.rollout.sampling.stop)
    judges = {name: rewarding.Judges(reward) for name, reward in rewards.items()}
    prompts = load_prompts(data, config.seed, template, lambda prompt: judges[prompt.source].problem(prompt))
    check_batch(config.rollout.prompts, prompts)
    models = config.models
    frozen = models.reference if objective.needs_reference else None
    said = remarks_on_weights(models.policy, models.critic, models.rollout, frozen)
    remarks = (*said, *remarks_on_date(config, tokenizer))
    return Task(config, shape, template, stops, prompts, rewards, objective, remarks)


def check_batch(wanted: int, prompts: PromptSet) -> None:
    """Raise ConfigError if a batch of `wanted` prompts may draw more from a source than it has."""
    weights = sum(source.weight for source in prompts.sources)
    for source in prompts.sources:
        share, there = ceil(wanted * source.weight / weights), min(map(len, source.levels))
        if share > there:
            at = "" if len(source.levels) == 1 else " at a level"
            of = f"the {share} that a batch draws of data.sources.{source.name}, which has {there}{at}"
            raise ConfigError(
                f"rollout.prompts={wanted} is more than "
                + (f"the {there} training prompts" if not source.name else of)
            )


def _reward(config: Config) -> RewardConfig:
    """The reward of the run. Raises ConfigError if it names another one than the scorer of `data.gym`."""
    data = data_of(config)
    if (
        data.gym is not None
        and "reward" in config.model_fields_set
        and not rewarding.asks_scorer(config.reward)
    ):
        raise ConfigError(
            f"reward.name={config.reward.name}: data.gym has a scorer of its own: leave the reward out "
            "or set reward.name=gym; another one judges them as the `reward` of a source (data.sources)"
        )
    return rewarding.default(config.reward, data)


def _with_rewards(data: Data, reward: RewardConfig) -> Data:
    """`data` with the rewards of sources that have one of their own, named or by default, written out."""
    own = {
        name: source.reward or rewarding.default(reward, source)
        for name, source in data.sources.items()
        if source.reward is not None or source.gym is not None
    }
    resolved = {
        name: data.sources[name].model_copy(
            update={"reward": rewarding.resolve(one, f"data.sources.{name}.reward")}
        )
        for name, one in own.items()
    }
    return data.model_copy(update={"sources": data.sources | resolved})


def shape_of(config: Config) -> ModelShape:
    """The policy's sizes. Raises one of PROBLEMS if the folder, the layout or the engine does not fit."""
    policy = config.policy
    shape = read_shape(policy.path)
    check_model("policy", policy, shape, world_size(config))
    rollout.check(config.rollout, policy.layout.cp)
    return shape


def tokenizer_of(model: Model, shape: ModelShape) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Raises one of PROBLEMS if it does not match the model."""
    tokenizer = load_tokenizer(model.path)
    check_vocab(tokenizer, shape.vocab)
    return tokenizer


def dated(config: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """`config` with the date that the chat template writes, if it writes one: that of the configuration, that
    of the run that is continued, or today's."""
    if config.date is not None or not writes_date(str(tokenizer.get_chat_template())):
        return config
    day = RunFolder.of(config).date() or date.today().isoformat()
    return config.model_copy(update={"date": day})


def remarks_on_date(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Remarks on the date in prompts."""
    if config.date is None:
        return ()
    if writes_date(str(tokenizer.get_chat_template())):
        return (f"the chat template writes the date {config.date} into every prompt (key `date`)",)
    return (f"date: {config.date} changes nothing, because the chat template writes no date",)


def sft_of(config: Config) -> WarmStart:
    """The options of `mtroll sft`. Raises ConfigError if they are missing or the run is to be resumed."""
    if config.sft is None:
        raise ConfigError("sft: missing; `mtroll sft` needs sft.files, demonstrations to learn from")
    if config.resume:
        raise ConfigError("resume: a warm start is not resumed; delete its run folder or choose another name")
    return config.sft


def demonstrations(task: Task) -> Demonstrations:
    """The demonstrations of a warm start. Raises one of PROBLEMS."""
    return load_demonstrations(sft_of(task.config), task.template, task.shape.max_positions)
