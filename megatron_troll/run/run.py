"""The parts of a run, put together; its state, and how that is saved and resumed."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron_troll.checks import data_of
from megatron_troll.data.curriculum import Curricula
from megatron_troll.data.mixture import MixtureOrder
from megatron_troll.mcore.checkpoint import Checkpoints
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import layer_remarks
from megatron_troll.mcore.optimizer import Trainable
from megatron_troll.objectives.compose import head_remarks, remarks
from megatron_troll.observe.rollouts import RolloutStore
from megatron_troll.observe.trackers import Summary
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.rollout.engine import Engine
from megatron_troll.run.evaluation import Evaluator, open_engine, open_judged
from megatron_troll.run.made_with import Continued, continued, note
from megatron_troll.run.queue import RolloutQueue
from megatron_troll.run.session import Session, of_one_day, open_session
from megatron_troll.run.state import TrainState
from megatron_troll.system import Interrupts, write_atomic
from megatron_troll.task import Task, prepare
from megatron_troll.training.build import open_policy
from megatron_troll.training.critic import Critic, open_critic
from megatron_troll.training.learner import Learner
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.reference import open_reference
from megatron_troll.training.rollout_model import RolloutModel, open_rollout_model
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.weights.export import save as export

# Parts of what a run is made with (made_with.py) that rollouts and their rewards come from.
SAMPLED_WITH = {"data", "tokenizer", "template", "stop_tokens", "rewards", "methods"}


@dataclass(frozen=True)
class Run:
    """Everything the loop works with. `policy` is the trained model; `engine` samples from its weights as of
    the last `sync`, or from those of the `rollout_model` if there is one. `made_with`: on rank 0 only."""

    task: Task
    session: Session
    policy: Trainable
    learner: Learner
    critic: Critic | None
    rollout_model: RolloutModel | None
    engine: Engine
    scorer: MixedScorer
    evaluator: Evaluator
    order: MixtureOrder
    store: RolloutStore
    checkpoints: Checkpoints
    pending: RolloutQueue
    made_with: Continued | None = None

    @cached_property
    def curricula(self) -> Curricula:
        """The levels of the sources."""
        return Curricula(self.task.prompts.sources)

    def resume(self) -> TrainState:
        """Load the newest checkpoint if `resume` is set and one exists; otherwise start at step 0. Blocks."""
        # Only one rank looks: a network file system may show other ranks an older state.
        there = self.session.world.first(lambda: self.checkpoints.latest() is not None)
        folder, say = self.session.folder, self.session.progress.say
        if not (self.task.config.resume and there):
            if self.task.config.resume:
                say(f"nothing to resume in {folder.root}: starting at step 0")
            self.session.begin_at(0)
            return TrainState()
        state = TrainState(**self.checkpoints.load())  # read_state has checked the fields
        say(f"continuing from step {state.step} of {folder.root}{folder.lost(state.step)}")
        self.order.seek(state.position)
        self.curricula.load(state.levels)
        prompts = {prompt.id: prompt for prompt in self.task.prompts.train}
        if self._redraws():
            say("answers that were sampled before the change and not yet trained on are left out")
            self.engine.forget(self.task.config.train.steps)
        else:
            self.pending.read(
                self.checkpoints.path(state.step), prompts, elsewhere=self.session.world.rank > 0
            )
        # A run that was asked to stop before its first evaluation has no row of step 0 yet.
        self.session.begin_at(0 if state.before is None and state.step == 0 else state.step + 1)
        return state

    def _redraws(self) -> bool:
        """Whether batches sampled before an accepted change belong to what has changed. Blocks."""
        return self.session.world.first(
            lambda: self.made_with is not None and bool({*self.made_with.changed} & SAMPLED_WITH)
        )

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Save a checkpoint of `state`; `score` is the held-out success of exactly this policy, if known.
        Batches still being sampled are not in it: a resumed run begins them again, and the engine may have
        kept answers. Blocks; with checkpoint.asynchronous writing continues in the background."""
        state = replace(state, position=self.pending.position(state.position))
        with self.session.phases("checkpoint"):
            self.checkpoints.save(state.step, asdict(state), score, self._attach)
            self._note_saved()
            self.engine.forget(self.session.world.first(lambda: self.checkpoints.latest() or 0))

    def _attach(self, checkpoint: Path) -> None:
        """Write what only rank 0 has into a checkpoint."""
        self.pending.write(checkpoint)
        if self.made_with is not None:
            self.made_with.provenance.write(checkpoint)

    def usable(self) -> str:
        """One line about the checkpoint from which the run can be continued."""
        latest = self.checkpoints.latest()
        if latest is None:
            return f"no checkpoint is in {self.checkpoints.folder}: the steps so far are lost"
        return f"the newest whole checkpoint is {self.checkpoints.path(latest)}: continue with resume=true"

    def _finish_saving(self) -> None:
        self.checkpoints.finish()
        self._note_saved()

    def _note_saved(self) -> None:
        """Write the step of the newest complete checkpoint to the run folder, if there is one yet."""

        def note() -> None:
            if latest := self.checkpoints.latest():
                write_atomic(self.session.folder.saved, f"{latest}\n")

        self.session.world.first(note)

    def sync(self, step: int) -> dict[str, float]:
        """Let the engine sample from its model as it is after `step`, and evaluations from the policy. Blocks
        on all ranks."""
        with self.session.phases("sync"):
            metrics = self.engine.sync(step)
            if self.evaluator.engine is not self.engine:
                self.evaluator.engine.sync(step)
            return metrics

    def since(self, state: TrainState, began: float) -> TrainState:
        """`state` with the time since `began` added, and the present prompt position and levels."""
        seconds = state.seconds + time.perf_counter() - began
        return replace(state, seconds=seconds, position=self.order.position, levels=self.curricula.state)

    def stop(self, state: TrainState) -> None:
        """End a run that was asked to stop, once its checkpoint is on disk; a file in the run folder reports
        this to a launcher. Blocks."""
        self._finish_saving()
        self.session.world.first(lambda: write_atomic(self.session.folder.stopped, f"{state.step}\n"))
        self.session.progress.say(f"stopped after step {state.step}; continue with resume=true")

    def finish(self, state: TrainState) -> None:
        """Finish a complete run: export, summary and report."""
        self._finish_saving()
        self.engine.forget(state.step)
        said = remarks(self.task.config.objective, self.task.objective)
        if self.made_with is not None:
            said = (*said, *self.made_with.provenance.remarks)
        config = self.task.config
        if self.rollout_model is not None and config.models.rollout is not None and config.checkpoint.export:
            folder, path = self.session.folder.hf_rollout, config.models.rollout.path
            said = (*said, *export(self.rollout_model.model, folder, path, ends=self.task.stops.exported))
        summary = Summary(state.before, state.after, state.seconds, config.seed, said)
        self.session.complete(self.policy.model, summary, self.task.stops.exported)


@contextmanager
def open_run(task: Task, interrupts: Interrupts) -> Iterator[Run]:
    """Join the world, load the policy and build every part. Blocks on all ranks."""
    config = task.config
    with ExitStack() as stack:
        made_with: list[Continued] = []
        opened = open_session(
            config, config.train.steps, interrupts, lambda: made_with.append(continued(task))
        )
        session = stack.enter_context(opened)
        task = of_one_day(task, session.world, prepare)
        session.progress.say(str(task))
        say_made_with(session, made_with)
        scorer = stack.enter_context(_scorer(task, session))
        policy = open_policy(
            config.policy,
            task.shape,
            session.groups,
            config.seed,
            config.train.steps * config.train.updates,
            session.watchdog.beat,
        )
        for line in (*head_remarks(task.objective, task.shape.vocab), *layer_remarks(policy.model)):
            session.progress.say(line)
        trainer = open_trainer(task, policy)
        critic = None if config.models.critic is None else open_critic(config, policy.model, session.phases)
        rollout_model, drawn = None, policy.model
        if config.models.rollout is not None:
            rollout_model = open_rollout_model(task, policy.model, session.phases)
            drawn = rollout_model.model
        engine = stack.enter_context(closing(open_engine(task, drawn)))
        judged = engine
        if rollout_model is not None:
            judged = stack.enter_context(closing(open_judged(task, policy.model)))
        yield Run(
            task=task,
            session=session,
            policy=policy,
            learner=Learner(trainer, open_batcher(task, policy), session.phases),
            critic=critic,
            rollout_model=rollout_model,
            engine=engine,
            scorer=scorer,
            evaluator=Evaluator(task, session, judged, scorer),
            order=MixtureOrder(task.prompts.sources, config.seed, data_of(config).shuffle),
            store=RolloutStore(session.folder.rollouts, task.token_text),
            checkpoints=open_checkpoints(session, policy, critic, rollout_model),
            pending=RolloutQueue(config.rollout.staleness, config.train.steps),
            made_with=next(iter(made_with), None),
        )


def _scorer(task: Task, session: Session) -> MixedScorer:
    longest = task.config.rollout.sampling.max_tokens
    return MixedScorer(task.rewards, progress=session.watchdog.beat, limit=longest)


def say_made_with(session: Session, found: Sequence[Continued]) -> None:
    """Say and note in the run folder which changes a run continues with. `found`: on rank 0 only. Blocks."""
    for one in found:
        for line in one.said:
            session.progress.say(line)
    session.world.first(lambda: [note(session.folder, one.provenance) for one in found])


def open_trainer(task: Task, policy: Trainable) -> PolicyTrainer:
    """The policy's trainer, with a reference model if a method reads one."""
    config, objective = task.config, task.objective
    temperature, reference = config.rollout.sampling.temperature, None
    if objective.needs_reference:
        assert config.models.reference is not None
        model = config.policy.model_copy(update={"path": config.models.reference.path})
        reads = objective.reads_reference
        reference = open_reference(model, policy.model, temperature, reads, config.train.head_chunk)
    return PolicyTrainer(
        policy,
        objective,
        Head(policy.model, temperature, config.train.head_chunk),
        config.objective.old,
        reference,
        config.objective.aggregation,
        config.train.replay,
    )


def open_batcher(task: Task, policy: Trainable) -> MicroBatcher:
    """The policy's MicroBatcher."""
    config = task.config
    replay = config.train.replay == "rollout"
    return MicroBatcher(config, policy.model, config.policy.layout, task.engine_top_k, replay)


def open_checkpoints(
    session: Session, policy: Trainable, critic: Critic | None, rollout_model: RolloutModel | None
) -> Checkpoints:
    checkpoint, trained = session.config.checkpoint, {"policy": policy}
    if critic is not None:
        trained["critic"] = critic.trained
    if rollout_model is not None:
        trained["rollout"] = rollout_model.trainer.trainable
    return Checkpoints(
        session.folder.checkpoints,
        trained,
        keep_last=checkpoint.keep_last,
        keep_best=checkpoint.keep_best,
        asynchronous=checkpoint.asynchronous,
    )
