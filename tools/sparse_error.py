"""Measure what sparsifying leaves out on a real model, and write docs/sparse_error.json and its tables.

    python tools/sparse_error.py SHORT OPEN

SHORT answers held-out questions of reasoning-gym's needle_haystack with a name, OPEN answers open questions
in sentences (Hugging Face folders; runs/lm-warm-start/hf and runs/lm/base). Each is sampled at temperature 1
and is then the old policy; the new one is the same model after AdamW steps on its own answers. Sparse
quantities come from troll_kernels, exact ones from whole rows, both in float64 from the float32 hidden states
and head.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from bench_record import Record, record, write
from sparse_error_page import PAGE, RECORD, page
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from troll_kernels.project import project
from troll_kernels.sparsify import select, sparse_logp
from troll_kernels.topk import largest

from megatron_troll.data.gym.library import first_seed, item, open_set

# (K, delta), and the probability of a token left out (arXiv 2510.03817, Table 3 and App. A.4).
SETTINGS = ((16, 1e-4), (64, 1e-5), (256, 1e-6))
P_D = 1e-12
# Steps of AdamW on one batch: as many updates as runs make of it. The rest is that of lm_troll.yaml.
UPDATES = (1, 4)
LR, BETAS, GRAD_NORM = 1e-5, (0.9, 0.99), 1.0
# Positions whose rows are held at once.
CHUNK = 48
# Of what is sampled, and of questions that neither training nor its demonstrations have: they have 0 and 1.
SEED = 2
ASKED = (
    *("Write a short story about a lighthouse.", "Explain why the sky is blue.", "Describe Paris in winter."),
    *("How do bees find flowers?", "Tell me about the history of bread.", "Why do cats purr?"),
    *("Write a letter to a friend who has moved away.", "Explain what a prime number is.", "What is rain?"),
    *("How would you teach a child to swim?", "Describe the sound of a forest.", "Why do we dream?"),
)


@dataclass(frozen=True)
class Answer:
    """ids [P + T] of a prompt and its answer of T tokens."""

    ids: Tensor
    length: int


@dataclass(frozen=True)
class Policy:
    """Final hidden states [N, h] float32 that predict the N tokens of all answers, and the head [V, h]."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class Rows:
    """Log-probs [n, V] of n positions in float64, and the largest [n, max K] with their ids."""

    logp: Tensor
    values: Tensor
    ids: Tensor

    @staticmethod
    def of(policy: Policy, rows: Tensor) -> "Rows":
        logp = (policy.hidden[rows].double() @ policy.head.double().T).log_softmax(1)
        return Rows(logp, *largest(logp, max(k for k, _ in SETTINGS)))


@dataclass(frozen=True)
class Task:
    """Questions, the number of answers to each, and how many tokens an answer has. Tables call it `kind`."""

    kind: str
    questions: Sequence[str]
    samples: int
    least: int
    most: int


@dataclass(frozen=True)
class Part:
    """Figures [n] of some positions for one (K, delta): tokens kept, whether K ended the prefix, mass of the
    old and of the new policy on them; KL(new || old) exact, and sparse on the old policy's tokens and on each
    policy's own."""

    kept: Tensor
    bound: Tensor
    covered: Tensor
    covered_new: Tensor
    exact: Tensor
    old: Tensor
    own: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("short", help="folder of a model that answers with a name")
    parser.add_argument("open", help="folder of a model that answers in sentences")
    parser.add_argument("--questions", type=int, default=24, help="of each kind")
    parser.add_argument("--json", type=Path, default=RECORD, help="record to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    short = Task("names", names(arguments.questions), samples=2, least=1, most=12)
    several = (ASKED * arguments.questions)[: arguments.questions]
    prose = Task("sentences", several, samples=1, least=30, most=48)
    rows = [*measured(arguments.short, short), *measured(arguments.open, prose)]
    found = record("cpu", rows, updates=UPDATES, lr=LR, p_d=P_D)
    write(arguments.json, found)
    if arguments.json.resolve() == RECORD:
        PAGE.write_text(page(PAGE.read_text(), found))


def names(count: int) -> list[str]:
    options = {"min_num_statements": 2, "max_num_statements": 4}
    first = first_seed(SEED, 0, held_out=True)
    opened = open_set("needle_haystack", options, first, count, None)
    return [item(opened, i, first)["question"] for i in range(count)]


def measured(folder: str, task: Task) -> Iterator[Record]:
    """A row for each number of updates and each (K, delta)."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = sampled(model, AutoTokenizer.from_pretrained(folder), task)
    print(
        f"{task.kind}: {len(answers)} answers, {sum(answer.length for answer in answers)} tokens", flush=True
    )
    old, target = policy(model, answers), torch.cat([answer.ids[-answer.length :] for answer in answers])
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, weight_decay=0.0)
    for update in range(1, max(UPDATES) + 1):
        step(model, optimizer, answers)
        if update not in UPDATES:
            continue
        new = policy(model, answers)
        parts: dict[tuple[int, float], list[Part]] = {setting: [] for setting in SETTINGS}
        for rows in torch.arange(len(target)).split(CHUNK):
            before, after = Rows.of(old, rows), Rows.of(new, rows)
            for setting in SETTINGS:
                parts[setting].append(compared(before, after, target[rows], *setting))
        size = {"task": task.kind, "answers": len(answers), "tokens": len(target), "updates": update}
        for (k, delta), some in parts.items():
            yield size | {"k": k, "delta": delta} | figures(some)


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, task: Task) -> list[Answer]:
    """Answers of at least `task.least` tokens, at temperature 1, with the token that ends them."""
    found = []
    for question in task.questions:
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"].expand(task.samples, -1)
        drawn = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task.most,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
        for row in drawn:
            answer = row[ids.shape[1] :].tolist()
            end = tokenizer.eos_token_id
            length = answer.index(end) + 1 if end in answer else len(answer)
            if length >= task.least:
                found.append(Answer(row[: ids.shape[1] + length], length))
    return found


@torch.no_grad()
def policy(model: Any, answers: Sequence[Answer]) -> Policy:
    states = [model.model(a.ids[None]).last_hidden_state[0, -a.length - 1 : -1] for a in answers]
    return Policy(torch.cat(states), model.lm_head.weight.detach().clone())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, answers: Sequence[Answer]) -> None:
    """One update by the policy gradient, with advantages of 1 and -1 by turns: which way does not matter to
    what is left out of a KL, only how far."""
    tokens = sum(answer.length for answer in answers)
    optimizer.zero_grad()
    for i, answer in enumerate(answers):
        rows = cast(Any, model)(answer.ids[None, :-1]).logits[0, -answer.length :]
        logp = rows.log_softmax(1).gather(1, answer.ids[-answer.length :, None])
        (logp.sum() * (-1) ** i / tokens).backward()
    nn.utils.clip_grad_norm_(model.parameters(), GRAD_NORM)
    optimizer.step()


def compared(old: Rows, new: Rows, target: Tensor, k: int, delta: float) -> Part:
    """The same positions of both policies, and the sampled tokens [n]."""
    exact = (new.logp.exp() * (new.logp - old.logp)).sum(1)
    free, vocab = torch.full_like(exact, torch.inf), old.logp.shape[1]
    ids, old_logp = sparse(old, target, k, delta)
    new_ids, new_logp = sparse(new, target, k, delta)
    kept, at = ids >= 0, ids.clamp(min=0)
    shared = sparse_logp(new.logp.gather(1, at).masked_fill(~kept, -torch.inf), kept.sum(1), vocab, P_D)
    mass, mass_new = (rows.logp.gather(1, at).exp().masked_fill(~kept, 0.0).sum(1) for rows in (old, new))
    return Part(
        kept=kept.sum(1),
        bound=old.values[:, :k].exp().sum(1) < 1 - delta,
        covered=mass,
        covered_new=mass_new,
        exact=exact,
        old=project(ids, shared, ids, old_logp, free, vocab, P_D).kl_before,
        own=project(new_ids, new_logp, ids, old_logp, free, vocab, P_D).kl_before,
    )


def sparse(rows: Rows, target: Tensor, k: int, delta: float) -> tuple[Tensor, Tensor]:
    """Kept ids [n, k + 1], and their log-probs by eq. 21."""
    at_target, lse = rows.logp.gather(1, target[:, None])[:, 0], torch.zeros_like(rows.logp[:, 0])
    ids, kept, count, _ = select(rows.values[:, :k], rows.ids[:, :k], lse, target, at_target, delta)
    return ids, sparse_logp(kept, count, rows.logp.shape[1], P_D)


def figures(parts: Sequence[Part]) -> Record:
    """Means and quantiles over all positions; errors are sparse minus exact, nats."""
    whole = {name: torch.cat([vars(part)[name] for part in parts]).double() for name in vars(parts[0])}
    exact = whole["exact"]
    found = {
        "kept_mean": whole["kept"].mean(),
        "kept_p99": whole["kept"].quantile(0.99),
        "ended_by_k": whole["bound"].mean(),
        "covered_mean": whole["covered"].mean(),
        "covered_p1": whole["covered"].quantile(0.01),
        "outside_old": 1 - whole["covered"].mean(),
        "outside_new": 1 - whole["covered_new"].mean(),
        "kl_exact": exact.mean(),
    }
    for support in ("old", "own"):
        error = (whole[support] - exact).abs()
        found[f"kl_{support}"] = whole[support].mean()
        found[f"error_{support}"] = error.mean()
        found[f"relative_{support}"] = error.mean() / exact.mean()
    return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
    main()
