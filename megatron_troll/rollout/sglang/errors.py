"""Errors of servers. Every message says what to do."""

from megatron_troll.rollout.engine import EngineError


class Passing(EngineError):
    """An error that a retry, maybe on another server, may avoid."""


class Unreachable(Passing):
    """The connection was refused or lost, or no reply came in time."""


class ServerFault(Passing):
    """The server reported that it failed or is too busy."""


class BadReply(Passing):
    """The reply is not what was requested: malformed, short, not a number, or from another run's weights."""


class Refused(EngineError):
    """The server understood the request and rejects it."""


class WrongServer(EngineError):
    """The server is not one that this run can sample from: another model, vocabulary, tokenizer or
    distribution, other weights, no record of its experts, or an API key that the run does not have."""


class NoServers(EngineError):
    """No server has been usable for as long as the run waits."""


class UpdateRefused(EngineError):
    """A server refuses the new weights."""
