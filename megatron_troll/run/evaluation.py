"""Held-out success: the policy's score on prompts that training never sees."""

from dataclasses import dataclass
from pathlib import Path

from megatron_troll import rollout
from megatron_troll.config import Model, Sampling
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.rewards.batch import by_source, judge
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.rollout.engine import Engine, Setup, requests_for
from megatron_troll.rollout.engines.inprocess import InProcessEngine
from megatron_troll.run.session import Session
from megatron_troll.task import Task

# Held-out prompts are always answered with the same random numbers, so that evaluations are paired.
EVALUATION_ROUND = -1
HELD_OUT = "held_out_success"
# Training prompts that an engine gets to test itself on.
SHOWN = 16


@dataclass(frozen=True)
class Evaluator:
    """Samples with `engine` and scores with `scorer`, as `config.evaluation` specifies."""

    task: Task
    session: Session
    engine: Engine
    scorer: MixedScorer

    def success(self) -> dict[str, float]:
        """`held_out_success`, the mean success on the held-out prompts, and that of each source by its name.
        Blocks on all ranks."""
        evaluation = self.task.config.evaluation
        prompts = self.task.prompts.held_out[: evaluation.prompts]
        requests = requests_for(prompts, evaluation.samples)
        with self.session.phases("evaluation"):
            rollouts = self.engine.generate(requests, self._sampling(), EVALUATION_ROUND)
            world, say = self.session.groups.world, self.session.progress.say
            judged = judge(self.scorer, rollouts, world, say)
        means = by_source(HELD_OUT, judged.rollouts, judged.success)
        return {HELD_OUT: float(judged.success.mean())} | means

    def _sampling(self) -> Sampling:
        temperature = self.task.config.evaluation.temperature
        sampling = self.task.config.rollout.sampling
        return sampling if temperature is None else sampling.model_copy(update={"temperature": temperature})


def open_engine(task: Task, model: MegatronModel) -> Engine:
    """The engine that the task names, which samples the rollouts from the weights of `model`. See
    rollout.build."""
    return rollout.build(_setup(task, model, task.config.models.drawing))


def open_judged(task: Task, model: MegatronModel) -> Engine:
    """An in-process engine on the policy's `model`, for evaluations when another model samples the rollouts:
    servers then hold only that other model."""
    return InProcessEngine(_setup(task, model, task.config.policy))


def _setup(task: Task, model: MegatronModel, source: Model) -> Setup:
    config, prompts = task.config, task.prompts.train[:SHOWN]
    # The engine is not asked for what nothing reads.
    asked = config.rollout.model_copy(update={"top_k": task.engine_top_k})
    config = config.model_copy(update={"rollout": asked})
    return Setup(config, model, Path(source.path), task.tokenizer, task.stop_ids, prompts)
