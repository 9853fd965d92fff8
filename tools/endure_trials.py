"""Trials of tools/endure.py: one function for each kind."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from endure_bench import (
    LIMIT_S,
    PROMPTS,
    SAMPLES,
    STEPS,
    STOPPED_AFTER,
    Bench,
    Done,
    Trial,
    difference,
    metrics,
    remains,
    samples,
    snapshot,
    working_in,
)

TARGETS = ("rank", "launcher", "helper", "all")
DAMAGES = ("truncated", "bit flipped", "deleted", "emptied", "folder in its place")
ALL_STEPS = range(STEPS + 1)


def kill(bench: Bench, chance: random.Random, number: int) -> Trial:
    """Start a run, kill one of its processes (or all) at a random moment, and continue it to its end."""
    name, target = f"kill_{number}", TARGETS[number % len(TARGETS)]
    before = remains(bench)
    shutil.rmtree(bench.run(name), ignore_errors=True)  # of a trial that was interrupted
    with discarded(bench.run(name)):
        process = bench.start("train", "run.yaml", f"name={name}")
        moment = chance.uniform(0.5, plain_seconds(bench))
        sleep_while_running(process, moment)
        victims = strike(process, target, chance)
        codes = [process.wait(LIMIT_S)]
        wait_for_ranks(bench)
        done = bench.command("train", "run.yaml", f"name={name}", "resume=true")
        wrong = done.last if done.code else difference(bench.run(name), bench.run("plain"), ALL_STEPS)
    detail = f"{victims}, after {moment:.1f} s"
    return outcome(bench, detail, [*codes, done.code], before, wrong)


def kill_server(bench: Bench, chance: random.Random, number: int) -> Trial:
    """Kill the SGLang server of a run at a random moment; `mtroll serve` starts another. Continue the run if
    it ended. Rollouts depend on what a server batches together: they are counted, not compared."""
    before = remains(bench)
    with discarded(bench.run("served")):
        serve = bench.start("serve", "served.yaml", output="output_serve")
        process = bench.start("train", "served.yaml")
        while not (bench.run("served") / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.2)
        moment = chance.uniform(0.0, 20.0)
        sleep_while_running(process, moment)
        victims = psutil.Process(serve.pid).children(recursive=True)
        for victim in victims:
            victim.kill()
        codes = [process.wait(LIMIT_S)]
        done = bench.command("train", "served.yaml", "resume=true")
        serve.send_signal(signal.SIGTERM)
        codes += [done.code, serve.wait(LIMIT_S)]
        wrong = done.last if done.code else uncounted(bench.run("served"))
    detail = f"{len(victims)} processes of the server, {moment:.1f} s after step 0"
    return outcome(bench, detail, codes, before, wrong)


def uncounted(run: Path) -> str:
    """The first step of a finished run without exactly one row and all its rollouts once; "" if none."""
    if [row["step"] for row in metrics(run)] != list(ALL_STEPS):
        return "rows lost or doubled"
    for step in ALL_STEPS[1:]:
        names = {(prompt, sample) for prompt, sample, *_ in samples(run, step)}
        if not len(names) == len(samples(run, step)) == PROMPTS * SAMPLES:
            return f"rollouts of step {step} lost or doubled"
    return ""


def disk(bench: Bench, chance: random.Random, number: int) -> Trial:
    """Run on a file system with too little room, or too few inodes; then continue with enough. Raises
    CalledProcessError where nothing may be mounted."""
    name = f"disk_{number}"
    used = list(bench.run("plain").rglob("*"))
    few = number % 2 == 1
    limit = chance.randrange(5, len(used)) if few else chance.randrange(sum(p.stat().st_size for p in used))
    before, folder = remains(bench), bench.run(name)
    folder.mkdir()
    # The kernel rounds a size up to pages, and takes 0 for no limit.
    mount(folder, f"nr_inodes={limit},size=1g" if few else f"size={max(4096, limit)}")
    try:
        first = bench.command("train", "run.yaml", f"name={name}")
        mount(folder, "remount,nr_inodes=100k,size=1g")
        done = bench.command("train", "run.yaml", f"name={name}", "resume=true")
        wrong = done.last if done.code else difference(folder, bench.run("plain"), ALL_STEPS)
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()
    if not wrong and "Traceback" in first.text:
        wrong = first.last
    detail = f"{limit} inodes" if few else f"{limit} bytes"
    return outcome(bench, detail, [first.code, done.code], before, wrong)


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def damage(bench: Bench, chance: random.Random, number: int) -> Trial:
    """Change one file of a stopped run, half of them files of checkpoints, and continue the run."""
    name, how = f"damage_{number}", DAMAGES[number % len(DAMAGES)]
    before = remains(bench)
    with discarded(bench.copy_stopped(name)):
        run = bench.run(name)
        files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
        in_checkpoint = chance.random() < 0.5
        file = chance.choice([one for one in files if ("checkpoints" in one.parts) == in_checkpoint])
        change(file, how, chance)
        there = snapshot(run)
        done = bench.command(*bench.continuing(name))
        if done.code:
            return refusal(bench, f"{how}: {file.relative_to(run)}", done, before, snapshot(run) == there)
        continued, after = bench.run("continued"), range(STOPPED_AFTER + 1, STEPS + 1)
        wrong = difference(run, continued, ALL_STEPS, done.text, file.name) or difference(
            run, continued, after
        )
        told = "told" if not wrong and difference(run, continued, ALL_STEPS) else "equal"
    detail = f"{how}: {file.relative_to(run)}"
    return outcome(bench, detail, [done.code], before, wrong, told)


def change(file: Path, how: str, chance: random.Random) -> None:
    """Damage a file that is not empty."""
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: chance.randrange(len(data))])
    elif how == "bit flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
    elif how == "emptied":
        file.write_bytes(b"")
    else:
        file.unlink()
        if how == "folder in its place":
            file.mkdir()


def change_input(bench: Bench, chance: random.Random, number: int) -> Trial:
    """Change what a stopped run is made with: it is refused until `resume.accept` names the change."""
    name = f"input_{number}"
    what, part, file = (
        ("a prompt is gone", "data", bench.root / "data" / "train.jsonl"),
        ("a prompt has another answer", "data", bench.root / "data" / "train.jsonl"),
        ("a held-out prompt is gone", "held_out", bench.root / "data" / "held_out.jsonl"),
        ("another template", "template", bench.run("warm") / "hf" / "chat_template.jinja"),
        ("another end of turn", "stop_tokens", bench.run("warm") / "hf" / "generation_config.json"),
        ("a token is gone", "tokenizer", bench.run("warm") / "hf" / "tokenizer_config.json"),
    )[number % 6]
    kept, before = file.read_bytes(), remains(bench)
    with discarded(bench.copy_stopped(name)):
        there = snapshot(bench.run(name))
        try:
            alter(file, what, chance)
            done = bench.command(*bench.continuing(name))
            same = snapshot(bench.run(name)) == there
            accepted = bench.command(*bench.continuing(name), f"resume={{accept: [{part}]}}")
        finally:
            file.write_bytes(kept)
    if done.code == 2 and accepted.code:
        done = accepted
        same = False
    elif done.code == 0:
        return outcome(bench, what, [0, accepted.code], before, "continued in silence")
    return refusal(bench, what, done, before, same)


def alter(file: Path, what: str, chance: random.Random) -> None:
    text = file.read_text()
    if file.suffix == ".jsonl":
        lines = text.splitlines(keepends=True)
        at = chance.randrange(len(lines))
        record = json.loads(lines[at])
        if what.endswith("is gone"):
            del lines[at]
        else:
            lines[at] = json.dumps(record | {"answer": f"{record['answer']}0"}) + "\n"
        file.write_text("".join(lines))
    elif file.suffix == ".jinja":
        file.write_text(text.replace("{{", "{{ ' ' }}{{", 1))
    else:
        content = json.loads(text)
        if "eos_token_id" in content:
            ends = content["eos_token_id"]
            content["eos_token_id"] = [*(ends if isinstance(ends, list) else [ends]), 5]
        else:
            content["model_max_length"] = 77
        file.write_text(json.dumps(content))


def outcome(
    bench: Bench,
    detail: str,
    codes: list[int],
    before: list[str],
    wrong: str,
    right: str = "equal",
) -> Trial:
    """The trial of a run that went on. `before`: what remained before it."""
    left = sorted(set(remains(bench)) - set(before))
    return Trial(detail, "wrong" if wrong else right, codes, left, wrong)


def refusal(bench: Bench, detail: str, done: Done, before: list[str], unchanged: bool) -> Trial:
    """The trial of a run that did not go on."""
    right = unchanged and "Traceback" not in done.text
    said = done.last if unchanged else f"the run's files have changed; {done.last}"
    left = sorted(set(remains(bench)) - set(before))
    return Trial(detail, "refused" if right else "wrong", [done.code], left, said)


@contextmanager
def discarded(folder: Path) -> Iterator[None]:
    """Delete a folder after the block."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plain_seconds(bench: Bench) -> float:
    """Seconds that the plain run took, with its start and its end (about: it depends on the machine)."""
    summary = json.loads((bench.run("plain") / "summary.json").read_text())
    return 20.0 + float(summary["seconds"])


def sleep_while_running(process: "subprocess.Popen[str]", seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)


def strike(process: "subprocess.Popen[str]", target: str, chance: random.Random) -> str:
    """Kill processes of a run, and say which: the launcher where there is no rank or helper yet, none if the
    run has ended."""
    if process.poll() is not None:
        return "nothing, it had ended"
    launcher = psutil.Process(process.pid)
    children = launcher.children(recursive=True)
    ranks = [child for child in children if child.ppid() == process.pid]
    helpers = [child for child in children if child.ppid() != process.pid]
    choices = {"rank": ranks, "helper": helpers, "launcher": [launcher]}
    victims = [launcher, *children]
    if target != "all":
        target = target if choices[target] else "launcher"
        victims = [chance.choice(choices[target])]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    return f"{target}, {len(victims)} processes"


def wait_for_ranks(bench: Bench) -> None:
    """Wait until the ranks of a killed launcher have saved and ended, as they do when it dies."""
    end = time.monotonic() + LIMIT_S
    while working_in(bench.root) and time.monotonic() < end:
        time.sleep(0.2)
