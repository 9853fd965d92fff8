"""`mtroll serve`: run the servers of a configuration, and register them for the runs that use them."""

import os
from collections.abc import Callable

import torch

from megatron_troll.config import Config, RunPaths
from megatron_troll.launch.servers import ServerPlan, Supervisor, command, environment, interpreter
from megatron_troll.launch.sglang_flags import check_address, flags_of
from megatron_troll.mcore.shape import read_shape
from megatron_troll.rollout.sglang.registry import key_of, register, unregister
from megatron_troll.system import Interrupts
from megatron_troll.weights.source import check_folder


def serve(config: Config, interrupts: Interrupts, say: Callable[[str], object]) -> None:
    """Start serve.servers servers, and keep them running until asked to stop. Healthy ones are
    registered in runs/<name>/servers. Raises one of task.PROBLEMS before anything is started, and
    ServerFailed."""
    plans, folder = plans_of(config), RunPaths.of(config).servers

    def announce(plan: ServerPlan, pid: int | None) -> None:
        if pid is None:
            unregister(folder, plan.url)
        else:
            register(folder, plan.url, pid)

    say(f"starting {len(plans)} SGLang servers; Ctrl-C stops them")
    Supervisor(config.serve.start_timeout_s, config.serve.restarts, announce, say).run(plans, interrupts)


def plans_of(config: Config) -> list[ServerPlan]:
    """The servers to start. Raises one of task.PROBLEMS."""
    serve, model = config.serve, config.models.drawing
    check_address(serve, config.rollout.sglang.api_key_file)
    key, shape = key_of(config), read_shape(model.path)
    if model.init == "pretrained":
        check_folder(model.path, shape)
    python, device = interpreter(serve.python), device_of(serve.device)
    threads = serve.threads or max(1, (os.cpu_count() or 1) // serve.servers)
    return [
        ServerPlan(
            argv=command(str(python), device),
            environment=environment(device, threads),
            flags=flags_of(config, shape, number, device),
            folder=RunPaths.of(config).logs,
            key=key,
        )
        for number in range(serve.servers)
    ]


def device_of(named: str) -> str:
    if named == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return named
