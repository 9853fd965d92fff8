"""`mtroll eval`: sample the policy's answers to every data set, judge them, and compute the figures."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_troll import rollout
from megatron_troll.evals.report import write
from megatron_troll.evals.results import Answers, EvalResult, figures, joined, majorities
from megatron_troll.evals.task import DataSet, EvalTask, prepare
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.observe.rewind import rewind
from megatron_troll.observe.rollouts import RolloutStore
from megatron_troll.rewards.batch import extract, judge
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.rollout.engine import Engine, Request, Setup, requests_for
from megatron_troll.run.evaluation import EVALUATION_ROUND, SHOWN
from megatron_troll.run.session import Session, of_one_day, open_session
from megatron_troll.system import Interrupts
from megatron_troll.training.build import open_model


def evaluate(task: EvalTask, interrupts: Interrupts) -> list[EvalResult] | None:
    """Evaluate every data set; write eval.json and every sample into the run folder. Returns None after
    Ctrl-C or SIGTERM: an interrupted evaluation must be restarted. Runs on every rank."""
    config = task.config
    with open_session(config, task.batches, interrupts) as session:
        task = of_one_day(task, session.world, prepare)
        session.progress.say(str(task))
        model = open_model(config.policy, task.shape, session.groups, config.seed, session.watchdog.beat)
        session.world.first(lambda: rewind(session.folder, 0))
        results: list[EvalResult] = []
        drawn = 0
        for step, one in enumerate(task.sets, 1):
            answers = SetEvaluation(task, session, model, one, drawn).answers()
            if answers is None:
                session.progress.say(f"stopped in {one.name}; an evaluation is not resumed: run it again")
                return None
            drawn += task.batches_of(one)
            keep(session, RolloutStore(session.folder.rollouts, task.token_text), step, answers)
            results.append(result(one, step, answers, config.seed))
        session.world.first(lambda: write(session.folder.evaluation, config, results))
        return results


@dataclass(frozen=True)
class SetEvaluation:
    """Evaluation of one data set on this rank; `drawn` batches were sampled before it."""

    task: EvalTask
    session: Session
    model: MegatronModel
    one: DataSet
    drawn: int

    def answers(self) -> Answers | None:
        """Sample and judge every answer; None if the job was asked to stop. Blocks on all ranks."""
        task, one = self.task, self.one
        requests = requests_for(one.prompts, one.config.samples)
        parts: list[Answers] = []
        with (
            closing(self._engine()) as engine,
            MixedScorer({"": one.reward}, progress=self.session.watchdog.beat) as scorer,
        ):
            engine.sync(0)
            for start in range(0, len(requests), task.at_once):
                if self.session.stopping():
                    return None
                began = time.perf_counter()
                parts.append(self._batch(requests[start : start + task.at_once], engine, scorer))
                step = self.drawn + len(parts)
                self.session.log(step, parts[-1].judged.metrics, time.perf_counter() - began)
        return joined(parts)

    def _engine(self) -> Engine:
        task, one = self.task, self.one
        config = task.config.model_copy(update={"rollout": one.rollout})
        folder, shown = Path(config.policy.path), one.prompts[:SHOWN]
        return rollout.build(Setup(config, self.model, folder, task.tokenizer, one.stops.ids, shown))

    def _batch(self, requests: Sequence[Request], engine: Engine, scorer: MixedScorer) -> Answers:
        asked, world, say = self.one.config, self.session.groups.world, self.session.progress.say
        with self.session.phases("generation"):
            rollouts = engine.generate(requests, asked.sampling, EVALUATION_ROUND)
        with self.session.phases("reward"):
            judged = judge(scorer, rollouts, world, say)
            wanted = scorer.has_votes and majorities(asked)
            return Answers(judged, extract(scorer, rollouts, world, say) if wanted else None)


def keep(session: Session, store: RolloutStore, step: int, answers: Answers) -> None:
    """Store every sample under `step`, the number of its data set. Blocks."""
    judged, no_advantage = answers.judged, [0.0] * len(answers.judged.rollouts)
    session.world.first(lambda: store.write(step, judged.rollouts, judged.reward.tolist(), no_advantage))


def result(one: DataSet, step: int, answers: Answers, seed: int) -> EvalResult:
    mute = answers.votes is None and majorities(one.config)
    return EvalResult(
        name=one.name,
        step=step,
        prompts=len(one.prompts),
        samples=one.config.samples,
        figures=figures(answers, one.config, seed),
        no_majority=f"reward {one.reward.name} extracts no answer to vote on" if mute else None,
        timeouts=answers.judged.timeouts,
        crashes=answers.judged.crashes,
        errors=answers.judged.errors,
        unclosed=answers.judged.unclosed,
    )
