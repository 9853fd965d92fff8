"""The plan of a configuration: every quantity, for each pipeline stage on the rank that holds the most."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_troll import rollout
from megatron_troll.batching.experts import expert_dtype
from megatron_troll.checks import check_methods
from megatron_troll.config import Config
from megatron_troll.launch.plan import batches, communication, generation, head
from megatron_troll.launch.plan.activations import (
    Work,
    activations_of,
    between_stages,
    flow_of,
    work_of,
    working_set,
)
from megatron_troll.launch.plan.models import Planned, drawing_of, models_of
from megatron_troll.launch.plan.parameters import carried_parameters
from megatron_troll.launch.plan.saved.layers import MODES
from megatron_troll.launch.plan.servers import BF16, GIB, ServerShare, check_servers, server_share, servers_of
from megatron_troll.mcore.layout import Cut, cuts, smallest_world
from megatron_troll.objectives.compose import compose, resolve
from megatron_troll.objectives.objective import Objective
from megatron_troll.weights.table import parameters_of


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model. total: each counted once, without padding; mtp: multi-token-prediction
    layers of the checkpoint, neither built nor trained; padding: vocabulary rows that stand for no token,
    over one replica; per_rank: for each stage, padding included."""

    model: str
    total: int
    mtp: int
    padding: int
    per_rank: list[int]


@dataclass(frozen=True)
class Stage:
    """Bytes on the rank of a pipeline stage that holds the most, by purpose: `states` always, `training`
    while it trains, `generation` while rollouts are generated on its GPU. host: in host memory; activations:
    of the policy, by recompute mode; experts: the part of the activations that depends on routing."""

    stage: int
    rank: int
    states: dict[str, int]
    training: dict[str, int]
    generation: dict[str, int]
    host: int
    in_flight: int
    activations: dict[str, int]
    experts: int

    @property
    def total(self) -> int:
        return sum(self.states.values()) + max(sum(self.training.values()), sum(self.generation.values()))

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes held at the peak: the states, with training or with generation."""
        return self.states | max(self.training, self.generation, key=lambda held: sum(held.values()))


@dataclass(frozen=True)
class Plan:
    """The plan of a run. All bytes are of one rank, except `sync`: the bytes that each server receives.
    host: those of rollouts and micro-batches in host memory."""

    config: Config
    world: int
    te: bool
    checks: list[Cut]
    parameters: list[Parameters]
    work: Work
    stages: list[Stage]
    logits: head.Logits
    traffic: communication.Traffic
    servers: list[ServerShare]
    sync: int
    host: dict[str, int]
    limit: int

    @property
    def worst(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.worst.total <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """The plan as values that JSON can hold."""
        policy = self.parameters[0]
        return {
            "config": self.config.model_dump(mode="json", by_alias=True),
            "world": self.world,
            "layers": "te" if self.te else "local",
            "checks": [asdict(check) | {"fits": check.fits} for check in self.checks],
            "parameters": asdict(policy),
            "models": [asdict(model) for model in self.parameters],
            "work": asdict(self.work),
            "stages": [asdict(stage) | {"total": stage.total} for stage in self.stages],
            "worst": asdict(self.worst) | {"total": self.worst.total},
            "logits": asdict(self.logits),
            "traffic": asdict(self.traffic),
            "servers": [asdict(server) for server in self.servers],
            "sync": self.sync,
            "host": self.host,
            "limit": self.limit,
            "fits": self.fits,
        }


def plan(config: Config, ranks: int | None = None) -> Plan:
    """Plan a run on `ranks` ranks, or on as many as `config.launch` starts. Raises ConfigError naming the key
    that does not fit. Needs only the models' config.json, or a published model's name (plan/models.py)."""
    objective = compose(config.objective)
    config = config.model_copy(update={"objective": resolve(config.objective)})
    world = ranks or config.launch.ranks or smallest_world(config.policy.layout)
    models = models_of(config, world)
    policy = models[0]
    rollout.check_engine(config.rollout, config.policy.layout.cp)
    check_methods(config, objective, policy.shape)
    work, flow = work_of(config, policy.ranks), flow_of(policy, work_of(config, policy.ranks))
    drawing, launch = drawing_of(models), config.launch
    drawn = parameters_of(drawing.holding.table)
    check_servers(config, world, drawing.shape, drawn, work.tokens)
    return Plan(
        config=config,
        world=world,
        te=flow.te,
        checks=cuts(policy.shape, policy.model.layout),
        parameters=[_parameters(planned) for planned in models],
        work=work,
        stages=[_stage(config, models, objective, work, stage) for stage in range(policy.model.layout.pp)],
        logits=head.logits_of(flow, objective, config.train.head_chunk),
        traffic=_traffic(config, models, objective, work),
        servers=servers_of(
            drawing.shape, drawn, work.tokens, _limit(launch.device_gib * server_share(config))
        ),
        sync=BF16 * drawn,
        host=batches.on_host(config, objective, work, policy),
        limit=_limit(launch.device_gib - launch.reserve_gib),
    )


def _limit(gib: float) -> int:
    return round(gib * GIB)


def _parameters(planned: Planned) -> Parameters:
    ranks, layout = planned.ranks, planned.ranks.layout
    chunks = [
        parameter
        for stage in range(layout.pp)
        for chunk in range(ranks.chunks)
        for parameter in planned.holding.of_chunk(stage, chunk)
    ]
    first = [stage * (ranks.world // layout.pp) for stage in range(layout.pp)]
    return Parameters(
        model=planned.name,
        total=parameters_of(planned.holding.table),
        mtp=carried_parameters(planned.holding.table, planned.shape) if planned.name == "policy" else 0,
        padding=sum(parameter.padding for parameter in chunks),
        per_rank=[planned.states(rank).parameters for rank in first],
    )


def _stage(config: Config, models: Sequence[Planned], objective: Objective, work: Work, stage: int) -> Stage:
    """Plan the rank of this stage that holds the most; another model may be cut into other stages."""
    policy = models[0]
    size = policy.ranks.world // policy.model.layout.pp
    states = {
        rank: [planned.states(rank) for planned in models] for rank in range(stage * size, (stage + 1) * size)
    }
    rank = max(states, key=lambda r: sum(s.weights + s.gradients + s.optimizer for s in states[r]))
    modes = {mode: activations_of(policy, work, stage, mode) for mode in MODES}
    used = modes[policy.model.recompute]
    others = [_kept(config, planned, rank) for planned in models[1:] if planned.trained]
    beside = _beside(config, policy, objective, work, stage, used.in_flight)
    return Stage(
        stage=stage,
        rank=rank,
        states={
            "weights": sum(s.weights for s in states[rank]),
            "gradients": sum(s.gradients for s in states[rank]),
            "optimizer": sum(s.optimizer for s in states[rank]),
        },
        training={"activations": max(used.kept, *others, 0)} | beside,
        generation=generation.held(config, policy, drawing_of(models), work, stage)
        | generation.sync(config, stage),
        host=sum(s.host for s in states[rank]),
        in_flight=used.in_flight,
        activations={mode: found.kept for mode, found in modes.items()},
        experts=used.experts,
    )


def _kept(config: Config, other: Planned, rank: int) -> int:
    """Bytes of activations on `rank` while `other` is trained in the policy's place."""
    work, stage = work_of(config, other.ranks), other.ranks.stage(rank)
    return activations_of(other, work, stage, other.model.recompute).kept


def _beside(
    config: Config, policy: Planned, objective: Objective, work: Work, stage: int, flying: int
) -> dict[str, int]:
    """Bytes held while training, besides states and activations."""
    flow, layout = flow_of(policy, work), policy.model.layout
    last = stage == layout.pp - 1
    tokens = work.responses * work.tokens // layout.cp
    answers = work.responses * config.rollout.sampling.max_tokens // layout.cp
    return {
        "head": head.saved_by_head(flow, objective) if last else 0,
        "logits": head.logits_of(flow, objective, config.train.head_chunk).used if last else 0,
        "records": head.records_of(answers, flow, objective, config.models.rollout) if last else 0,
        "batch": batches.in_use(config, objective, work, layout.cp),
        "replay": _replayed(config, policy, stage, tokens),
        "pipeline": between_stages(policy, flow, stage, flying),
        "working set": working_set(flow),
    }


def _replayed(config: Config, policy: Planned, stage: int, tokens: int) -> int:
    """Bytes of the recorded experts of every token, if training replays them."""
    ranks, shape = policy.ranks, policy.shape
    if config.train.replay == "none":
        return 0
    layers = sum(len(ranks.layers(stage, chunk, shape.layers)) for chunk in range(ranks.chunks))
    number = expert_dtype(shape.experts)().nbytes
    return tokens // ranks.layout.tp * layers * shape.experts_per_token * number


def _traffic(
    config: Config, models: Sequence[Planned], objective: Objective, work: Work
) -> communication.Traffic:
    """Traffic of all models. Forwards without gradient: those of the old policy and of the reference, the
    critic's for its values, the policy's that a rollout model learns from, and one for every update if the
    objective or the balancing loss needs statistics over the whole update."""
    policy, epochs = models[0], config.train.epochs
    forwards = (
        (config.objective.old == "trainer") + objective.needs_reference + (drawing_of(models) is not policy)
    )
    forwards += epochs * (objective.needs_statistics or policy.model.moe.aux_loss > 0)
    total = communication.of_batch(policy, work, config.train, forwards)
    for other in (planned for planned in models[1:] if planned.trained):
        balanced = epochs * (other.model.moe.aux_loss > 0)
        alone = balanced + (other.name == "critic")
        total += communication.of_batch(other, work_of(config, other.ranks), config.train, alone)
    return total
