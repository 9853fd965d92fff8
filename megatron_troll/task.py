"""A run's inputs: the configuration, and everything it names, read and validated."""

from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from megatron_troll import rollout
from megatron_troll.checks import check_methods, check_model, check_models, check_observe, data_of
from megatron_troll.config import Config, ConfigError, Model, WarmStart
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
from megatron_troll.rewards import reward as verifiers

PROBLEMS = (ConfigError, DataError, OSError)


@dataclass(frozen=True)
class Task:
    """A run's inputs, read and validated. `config` has every default of every method written out."""

    config: Config
    shape: ModelShape
    template: ChatTemplate
    stops: StopTokens
    prompts: PromptSet
    objective: Objective

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.template.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.stops.ids

    def __str__(self) -> str:
        return "\n".join(filter(None, (str(self.prompts), self.stops.remark)))

    def token_text(self, token: int) -> str:
        """The text of one token id."""
        return str(self.tokenizer.decode([token]))


def prepare(config: Config) -> Task:
    """Read and check everything that `config` names. Raises one of PROBLEMS with the reason and the place;
    uses no device and writes nothing."""
    check_version()
    data = data_of(config)
    config = config.model_copy(
        update={
            "objective": resolve(config.objective),
            "reward": verifiers.resolve(config.reward),
        }
    )
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
    if config.reward.reasoning == "drop":
        check_reasoning_tags(tokenizer)
    template = ChatTemplate(tokenizer, data.template_arguments)
    template.check("data.template_arguments")
    stops = stop_tokens(template, config.policy.path, shape.vocab, config.rollout.sampling.stop)
    judging = partial(verifiers.problem, verifiers.build(config.reward))
    prompts = load_prompts(data, config.seed, template, judging)
    if config.rollout.prompts > len(prompts.train):
        raise ConfigError(
            f"rollout.prompts={config.rollout.prompts} is more than the {len(prompts.train)} training prompts"
        )
    return Task(config, shape, template, stops, prompts, objective)


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
