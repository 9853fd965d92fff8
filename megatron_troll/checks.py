"""Checks that refuse a configuration before compute is spent."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from troll_kernels.dispatch import LARGEST_K

from megatron_troll import rollout
from megatron_troll.config import (
    Config,
    ConfigError,
    Data,
    Model,
    Observe,
    ReferenceConfig,
    RolloutModelConfig,
    Sampling,
)
from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.mcore.layout import check_layout, check_world, uses_te, world_size
from megatron_troll.mcore.options import check_machine, check_muon_layout, check_options
from megatron_troll.mcore.shape import ModelShape, read_shape
from megatron_troll.objectives.objective import Objective
from megatron_troll.weights.quantised import refuse_for_servers
from megatron_troll.weights.source import check_folder, check_random, remarks_on

# The axes of a layout that determine which tokens a rank has, and where a pipeline ends.
CUT_ALIKE = ("tp", "pp", "vpp", "cp")


def check_methods(config: Config, objective: Objective, shape: ModelShape) -> None:
    """Raises ConfigError if the training options of `config` do not fit together, for a policy of this shape.
    Reads no file."""
    with _about("objective"):
        objective.check(shape.vocab)
        _check_kept(objective, shape)
    _check_roles(config, objective)
    _check_pair(config)
    _check_bias(config, "policy", config.policy)
    _check_replay(config, shape)
    _check_prefixes(config)
    _check_rollout(config, objective, shape)
    check_length(longest(config), shape)


def longest(config: Config) -> dict[str, int]:
    """Tokens of the longest prompt and answer, by the key that limits them."""
    return {
        "data.max_prompt_tokens": data_of(config).max_prompt_tokens,
        "rollout.sampling.max_tokens": config.rollout.sampling.max_tokens,
    }


def data_of(config: Config) -> Data:
    """The training data. Raises ConfigError if the configuration has none."""
    if config.data is None:
        raise ConfigError("data: missing; training needs prompts to answer, such as data.files")
    return config.data


def check_length(tokens: dict[str, int], shape: ModelShape) -> None:
    """Raises ConfigError if the sum of `tokens` (key -> its limit) exceeds the model's positions."""
    if sum(tokens.values()) > shape.max_positions:
        raise ConfigError(
            f"{' + '.join(tokens)} = {sum(tokens.values())} exceeds the model's max_position_embeddings "
            f"{shape.max_positions}"
        )


def _check_kept(objective: Objective, shape: ModelShape) -> None:
    """Raises ConfigError if a record keeps more tokens than the GPU kernels can."""
    supports = (*objective.reads.supports, *objective.reads_old.supports)
    _check_k(max((min(kept.k, shape.vocab) for kept in supports), default=0))


def _check_k(k: int) -> None:
    if k > LARGEST_K and torch.cuda.is_available():
        raise ConfigError(f"k={k}: the kernels of a GPU keep at most {LARGEST_K} tokens of a position")


def _check_rollout(config: Config, objective: Objective, shape: ModelShape) -> None:
    sampling = config.rollout.sampling
    if sampling.temperature == 0:
        raise ConfigError("rollout.sampling.temperature: 0 is greedy and explores nothing; set it above 0")
    if filters := active_filters(sampling):
        raise ConfigError(
            f"rollout.sampling: {', '.join(filters)} cut the distribution that tokens are sampled from, "
            "while every trust region uses log-probs of the uncut one; leave the defaults in training"
        )
    if objective.advantage.needs_groups and config.rollout.samples < 2:
        raise ConfigError(
            f"rollout.samples={config.rollout.samples}: advantage {config.objective.advantage.name!r} "
            "compares the answers to one prompt, so that there must be at least 2"
        )
    wanted = {"a method that reads the engine's own record": objective.rollout_k}
    if config.objective.old == "engine":
        wanted["objective.old=engine"] = max((kept.k for kept in objective.reads_old.supports), default=0)
    for who, k in wanted.items():
        if config.rollout.top_k < min(k, shape.vocab):
            raise ConfigError(
                f"rollout.top_k={config.rollout.top_k}: {who} needs at least {min(k, shape.vocab)}"
            )
    if config.rollout.refill and not objective.advantage.needs_groups:
        raise ConfigError(
            f"rollout.refill={config.rollout.refill} replaces prompts whose samples all get the same "
            f"reward: advantage {config.objective.advantage.name!r} learns from those too; set it to 0"
        )
    if config.rollout.prompts < config.train.updates // config.train.epochs:
        raise ConfigError(
            f"train.updates: {config.train.updates} steps over {config.train.epochs} epochs need at least as "
            f"many prompts per batch as steps per epoch; rollout.prompts is {config.rollout.prompts}"
        )
    if config.train.updates % config.train.epochs:
        raise ConfigError(
            f"train.updates={config.train.updates} is over all epochs: make it a multiple of train.epochs="
            f"{config.train.epochs}"
        )


def _check_roles(config: Config, objective: Objective) -> None:
    """Raises ConfigError for a critic that nothing uses, and for methods without the model they need."""
    critic = config.models.critic
    if objective.needs_reference and config.models.reference is None:
        raise ConfigError(
            f"models.reference: missing; objective.kl={config.objective.kl.name} keeps the policy near it"
        )
    if objective.advantage.needs_values != (critic is not None):
        raise ConfigError(
            "models.critic and objective.advantage=gae go together: "
            + ("gae needs a critic, and there is none" if critic is None else "nothing else reads its values")
        )


def check_models(config: Config, objective: Objective, shape: ModelShape) -> None:
    """Raises ConfigError if another model does not fit the policy, which has `shape`. Reads the models'
    folders, no weights."""
    if config.rollout.engine == "sglang":
        check_served(config)
    if config.models.reference is not None and objective.needs_reference:
        _check_reference(config.models.reference, config, shape)
    if config.models.critic is not None:
        _check_critic(config.models.critic, config, shape)
    if config.models.rollout is not None:
        _check_rollout_model(config.models.rollout, config, shape)


def check_served(config: Config) -> None:
    """Raises ConfigError if SGLang servers would start from a folder of quantised weights."""
    key = "models.policy.path" if config.models.rollout is None else "models.rollout.path"
    refuse_for_servers(Path(config.models.drawing.path), key)


def remarks_on_weights(*models: Model | ReferenceConfig | None) -> tuple[str, ...]:
    """Remarks on weights of `models` that are read otherwise than they are stored. Reads headers only."""
    paths = [each.path for each in models if each is not None and getattr(each, "init", "") != "random"]
    return tuple(line for path in dict.fromkeys(paths) for line in remarks_on(path))


def _check_reference(reference: ReferenceConfig, config: Config, shape: ModelShape) -> None:
    check_folder(reference.path, read_shape(reference.path))
    if read_shape(reference.path) != shape:
        raise ConfigError(
            f"models.reference: {reference.path} and the policy {config.policy.path} have different shapes"
        )


def _check_critic(critic: Model, config: Config, shape: ModelShape) -> None:
    body = read_shape(critic.path)
    if body.vocab != shape.vocab:
        raise ConfigError(f"models.critic: a vocabulary of {body.vocab}, the policy's has {shape.vocab}")
    check_model("critic", critic, body, world_size(config))


def _check_rollout_model(model: RolloutModelConfig, config: Config, shape: ModelShape) -> None:
    other = read_shape(model.path)
    check_model("rollout", model, other, world_size(config))
    if other.vocab != shape.vocab or _tokens(model) != _tokens(config.policy):
        raise ConfigError(
            f"models.rollout: {model.path} and the policy {config.policy.path} have different tokens; "
            "both learn from the same token ids"
        )
    with _about("models.rollout.distill"):
        _check_k(min(model.distill.k, shape.vocab))
    _check_bias(config, "rollout", model)
    check_length(longest(config), other)


def _check_pair(config: Config) -> None:
    """Raises ConfigError if a rollout model does not fit the policy. Reads no file."""
    model = config.models.rollout
    if model is None:
        return
    mine, policys = ({axis: getattr(m.layout, axis) for axis in CUT_ALIKE} for m in (model, config.policy))
    if mine != policys:
        raise ConfigError(
            f"models.rollout.layout: {mine} must be those of the policy, {policys}, so that a micro-batch of "
            "one is one of the other; ep and etp may differ"
        )
    if model.layout.cp > 1:
        raise ConfigError(
            f"models.policy.layout.cp={model.layout.cp}: with models.rollout, evaluations of the policy are "
            "sampled in the trainer's processes, which do not generate under context parallelism; set it to 1"
        )
    for key, value, reason in (
        ("objective.old=engine", config.objective.old == "engine", "the old policy would be another model"),
        ("train.replay=rollout", config.train.replay == "rollout", "its experts are another model's"),
    ):
        if value:
            raise ConfigError(f"{key} does not go with models.rollout: {reason}")
    low, high = model.distill.limits
    if low > high or not (model.distill.weight == 0 or low <= model.distill.weight <= high):
        raise ConfigError(
            f"models.rollout.distill.weight={model.distill.weight:g} is outside of limits [{low:g}, {high:g}]"
        )


def _tokens(model: Model) -> dict[str, int]:
    return load_tokenizer(model.path).get_vocab()


def _check_bias(config: Config, name: str, model: Model) -> None:
    """Raises ConfigError if expert biases would have to leave the trainer: Qwen3's format has none."""
    if not model.moe.bias_rate:
        return
    for key, value, allowed in (
        ("rollout.engine", config.rollout.engine, "inprocess"),
        ("checkpoint.export", config.checkpoint.export, False),
    ):
        if value != allowed:
            raise ConfigError(
                f"models.{name}.moe.bias_rate: {key} must be {str(allowed).lower()}, it is "
                f"{str(value).lower()}: the Hugging Face format has no place for the biases, without which "
                "the model would choose other experts"
            )


def _check_replay(config: Config, shape: ModelShape) -> None:
    """Raises ConfigError if there are no expert choices to repeat."""
    replay = config.train.replay
    if replay == "none":
        return
    if not shape.experts:
        raise ConfigError(f"train.replay={replay} repeats choices of experts: {config.policy.path} has none")
    if replay == "old" and config.objective.old == "engine":
        raise ConfigError(
            "train.replay=old repeats the experts of the old policy's forward, which objective.old=engine "
            "leaves out; set objective.old=trainer, or train.replay=rollout"
        )
    if replay == "rollout" and not rollout.returns_experts(config):
        hint = "use inprocess or sglang"
        if config.rollout.engine == "sglang":
            hint = "set serve.routed_experts=true"
        raise ConfigError(
            f"train.replay=rollout: the engine {config.rollout.engine} does not return the experts it chose; "
            f"{hint}, or train.replay=old"
        )


def _check_prefixes(config: Config) -> None:
    """Raises ConfigError where train.share_prefixes asks for what a layout or a machine does not have."""
    if not config.train.share_prefixes:
        return
    if not config.train.packing:
        raise ConfigError("train.share_prefixes=true: padded rows share nothing; set train.packing=true")
    models = {"policy": config.models.policy, "critic": config.models.critic}
    for name, model in models.items():
        if model is not None and model.layout.cp > 1 and torch.cuda.is_available():
            raise ConfigError(
                f"train.share_prefixes=true: on a GPU not under context parallelism; "
                f"models.{name}.layout.cp is {model.layout.cp}"
            )


def check_model(name: str, model: Model, shape: ModelShape, world: int) -> None:
    with _about(f"models.{name}.layout"):
        check_layout(shape, model.layout)
        check_world(model.layout, world)
    with _about(f"models.{name}"):
        check_options(shape, model)
        check_muon_layout(shape, model, world)
        check_machine(model)
        uses_te(model.spec)
    if model.init == "pretrained":
        check_folder(model.path, shape)
    else:
        with _about(f"models.{name}"):
            check_random(shape)


@contextmanager
def _about(key: str) -> Iterator[None]:
    """Prefix a ConfigError of the block with the key that it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def check_observe(observe: Observe) -> None:
    if observe.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "observe.wandb_project is set, but wandb is not installed: install megatron-troll[wandb], or set "
            "it to null"
        )


def active_filters(sampling: Sampling) -> list[str]:
    """The filters of `sampling` that would drop tokens."""
    filters = {"top_p": sampling.top_p < 1, "top_k": sampling.top_k > 0, "min_p": sampling.min_p > 0}
    return [name for name, active in filters.items() if active]
