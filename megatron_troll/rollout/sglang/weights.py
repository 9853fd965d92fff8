"""Sends new weights to every server while all ranks stream them, and verifies them afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.rollout.sglang.connection import Connection
from megatron_troll.rollout.sglang.control import Pause, each
from megatron_troll.rollout.sglang.http import NoServers, Passing
from megatron_troll.rollout.sglang.transport import Failed, Tensors, quietly
from megatron_troll.weights.export import first_takes

# Attempts in a row that may lose all servers before the run ends.
ATTEMPTS = 3


@dataclass(frozen=True)
class RankZero:
    """Runs functions on rank 0 and gives their results, or errors, to all ranks. `connection` is rank 0's."""

    model: MegatronModel
    connection: Connection | None

    def first[T](self, act: Callable[[Connection], T]) -> T:
        """Run `act` with the connection on rank 0; return its result or raise its error on all ranks
        (Group.first)."""
        return self.model.groups.world.first(lambda: act(cast("Connection", self.connection)))


def sync(rank_zero: RankZero, number: int, pause: Pause = "retract") -> list[str]:
    """Send the model's current weights to every healthy server, as version `number`; returns the URLs of the
    servers that have them. `pause` determines what happens to requests in flight. Blocks on all ranks, which
    all stream the weights to the end even if rank 0 meets an error.

    Raises UpdateRefused, WrongServer, and NoServers if every attempt loses all servers.
    """
    lost: Failed = {}
    for _ in range(ATTEMPTS):
        try:
            urls = rank_zero.first(lambda connection: _paused(connection, pause))
        except NoServers as error:
            raise NoServers(f"{error}{_told(lost)}") from error
        reached, lost = _attempt(rank_zero, urls, number)
        if reached:
            return reached
    raise NoServers(f"every server was lost during a sync, {ATTEMPTS} times in a row.{_told(lost)}")


def _attempt(rank_zero: RankZero, urls: Sequence[str], number: int) -> tuple[list[str], Failed]:
    """The servers of `urls` that have the weights, and those that were lost."""

    def send(connection: Connection, tensors: Tensors) -> Failed:
        return connection.transport.deliver(tensors, urls, connection.versions.called(number))

    lost = delivered(rank_zero, urls, send)
    return rank_zero.first(lambda connection: _resumed(connection, urls, lost, number)), lost


def _told(lost: Failed) -> str:
    if not lost:
        return ""
    each = "\n".join(f"  {url}: {error}" for url, error in lost.items())
    return (
        f"\nLost while they received new weights:\n{each}\nSee their logs: SGLang crashes on weights "
        "whose shape differs from its model's; start servers with `mtroll serve` and this configuration"
    )


def _paused(connection: Connection, pause: Pause) -> list[str]:
    """Pause the healthy servers; returns the URLs of those that wait for weights."""

    async def stop_asking() -> list[str]:
        await connection.servers.want(None)
        await connection.servers.ready()
        urls = connection.servers.healthy
        lost = await each(urls, lambda url: connection.control.pause(url, pause))
        return [url for url in urls if url not in lost]

    return connection.background.run(stop_asking())


def delivered(
    rank_zero: RankZero, urls: Sequence[str], send: Callable[[Connection, Tensors], Failed]
) -> Failed:
    """Stream the weights on all ranks and `send` them on rank 0; returns the lost servers on all ranks."""

    def deliver(tensors: Tensors) -> Failed:
        connection = rank_zero.connection
        assert connection is not None
        try:
            return send(connection, tensors)
        except Passing as error:
            return dict.fromkeys(urls, error)
        except BaseException:
            connection.background.run(quietly(urls, connection.control.resume))
            raise

    return first_takes(rank_zero.model, deliver)


def _resumed(connection: Connection, urls: Sequence[str], lost: Failed, number: int) -> list[str]:
    """Name and verify the weights, resume all servers, and return those that have the weights."""
    version = connection.versions.called(number)

    async def finish() -> list[str]:
        reached = [url for url in urls if url not in lost]
        try:
            for step in (connection.control.name_weights, connection.control.verify):
                failed = await each(reached, lambda url, step=step: step(url, version))
                reached = [url for url in reached if url not in failed]
        finally:
            await quietly(urls, connection.control.resume)
        await connection.servers.want(version if reached else None)
        return reached

    return connection.background.run(finish())
