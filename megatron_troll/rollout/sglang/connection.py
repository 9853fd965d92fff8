"""Rank 0's connection to the servers; the other ranks have none."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_troll.config import RunPaths
from megatron_troll.mcore.parallel import device
from megatron_troll.rollout.engine import Setup
from megatron_troll.rollout.sglang.background import Background
from megatron_troll.rollout.sglang.broadcast import Broadcast, backend_for
from megatron_troll.rollout.sglang.client import Client
from megatron_troll.rollout.sglang.control import Control, each
from megatron_troll.rollout.sglang.http import Http
from megatron_troll.rollout.sglang.identity import Identity
from megatron_troll.rollout.sglang.registry import Registry, key_of, weights_folder
from megatron_troll.rollout.sglang.servers import Router, ServerPool
from megatron_troll.rollout.sglang.transport import Disk, Shared, Transport
from megatron_troll.rollout.sglang.wire import Versions
from megatron_troll.system import address_towards

MIB = 2**20
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# For a run without known prompts; the log-probs are then checked after token 0 of the vocabulary.
NO_PROMPT = "1 + 1 = "


@dataclass(frozen=True)
class Connection:
    """One event loop and the objects that use it."""

    background: Background
    http: Http
    servers: ServerPool
    client: Client
    control: Control
    transport: Transport
    versions: Versions

    def on_all(self, do: Callable[[str], Awaitable[object]]) -> None:
        """Run `do(url)` for every healthy server; one that cannot be reached is skipped, and checked later.
        Raises errors that a retry cannot fix."""
        self.background.run(each(self.servers.healthy, do))

    def close(self) -> None:
        self.transport.close()
        self.background.run(self.http.close())
        self.background.close()


def open_connection(setup: Setup) -> Connection:
    """Connect; waits until a server is healthy and serves the model. Raises EngineError."""
    config, background = setup.rollout.sglang, Background(setup.model.progress)
    versions = Versions(setup.config.name)

    async def assemble() -> tuple[Http, ServerPool, Client]:
        http = Http(key_of(setup.config))
        identity = _identity(setup)
        router = None if config.router is None else Router(config.router, http)
        servers = ServerPool(config, _discover(setup), lambda url: identity.check(http, url), router)
        client = Client(config, http, servers, versions, setup.model.progress)
        await servers.ready()
        return http, servers, client

    try:
        http, servers, client = background.run(assemble())
    except BaseException:
        background.close()
        raise
    control = Control(http, config.sync.timeout_s)
    transport = _transport(setup, background, control, versions)
    if isinstance(transport, Disk):
        servers.catch_up = transport.catch_up
    return Connection(background, http, servers, client, control, transport, versions)


def _discover(setup: Setup) -> Callable[[], Sequence[str]]:
    named, folder = setup.rollout.sglang.servers, RunPaths.of(setup.config).servers
    return (lambda: named) if named else Registry(folder).urls


def _identity(setup: Setup) -> Identity:
    text = setup.prompts[0].messages[-1].content if setup.prompts else NO_PROMPT
    ids = setup.prompts[0].ids.tolist() if setup.prompts else [0]
    return Identity(
        setup.folder,
        setup.model.shape,
        setup.tokenizer,
        text,
        ids,
        setup.rollout.sampling.logprob_temperature,
    )


def _transport(setup: Setup, background: Background, control: Control, versions: Versions) -> Transport:
    sync = setup.rollout.sglang.sync
    max_bytes = sync.bucket_mib * MIB
    if sync.via == "disk":
        return disk(setup, background, control, max_bytes)
    if sync.via == "tensor":
        return Shared(background, control, max_bytes)
    address = sync.address or _own_address(_discover(setup)())
    return Broadcast(background, control, max_bytes, address, versions.run, backend_for(device()))


def disk(setup: Setup, background: Background, control: Control, max_bytes: int) -> Disk:
    """The transport by folders of this run."""
    run = str(RunPaths.of(setup.config).root.resolve())
    return Disk(background, control, weights_folder(setup.config), setup.folder, max_bytes, run)


def _own_address(servers: Sequence[str]) -> str:
    """This machine's address on the route to the first server elsewhere; loopback if there is none."""
    hosts = [host for url in servers if (host := urlsplit(url).hostname) not in (None, *LOOPBACK)]
    return address_towards(hosts[0]) if hosts else "127.0.0.1"
