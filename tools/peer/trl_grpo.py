"""One side of tools/bench_peer.py, in an environment of its own: TRL's GRPOTrainer, a step a line on stdin.

python tools/peer/trl_grpo.py MODEL PROMPTS.json SETTINGS.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]


class Turns(TrainerCallback):
    """Begins a rollout batch when a line comes, and answers with its seconds."""

    def __init__(self, updates: int) -> None:
        self.updates, self.generation, self.began = updates, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            print(json.dumps({"ready": True}), flush=True)
            if not sys.stdin.readline():
                sys.exit(0)
            self.generation, self.began = 0.0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            whole = time.perf_counter() - self.began
            seconds = {"generation": self.generation, "update": whole - self.generation, "step": whole}
            print(json.dumps(seconds), flush=True)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number that differs between answers, and costs nothing."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def config_of(settings: dict[str, Any]) -> GRPOConfig:
    """One rollout batch of prompts x samples answers for `updates` optimizer steps."""
    rows = settings["prompts"] * settings["samples"]
    accumulated = rows // settings["sequences"] // settings["updates"]
    return GRPOConfig(
        output_dir=settings["folder"],
        per_device_train_batch_size=settings["sequences"],
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * settings["updates"],
        num_generations=settings["samples"],
        max_completion_length=settings["tokens"],
        generation_kwargs={"min_new_tokens": settings["tokens"]},
        max_steps=10**6,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        temperature=1.0,
        top_k=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    model, prompts, settings_file = sys.argv[1:]
    settings = json.loads(Path(settings_file).read_text())
    torch.set_num_threads(settings["threads"])
    turns = Turns(settings["updates"])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        args=config_of(settings),
        train_dataset=Dataset.from_list([{"prompt": text} for text in json.loads(Path(prompts).read_text())]),
        callbacks=[turns],
    )
    generate = trainer._generate

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return generate(*arguments, **options)
        finally:
            turns.generation += time.perf_counter() - began

    trainer._generate = timed
    trainer.train()


if __name__ == "__main__":
    main()
