"""What can go wrong with a server. Every message says what to do."""

from megatron_troll.rollout.engine import EngineError


class Passing(EngineError):
    """Something that another attempt, maybe at another server, may not meet."""


class Unreachable(Passing):
    """The connection was refused or lost, or nothing came in time."""


class ServerFault(Passing):
    """The server answered that it failed or is too busy."""


class BadReply(Passing):
    """The answer is not what was asked for: malformed, short, no number, or of another run's weights."""


class Refused(EngineError):
    """The server understood the request and will not serve it."""


class WrongServer(EngineError):
    """The server is not one that this run can draw from: another model, vocabulary, tokenizer or
    distribution, other weights, no record of its experts, or an API key that the run does not have."""


class NoServers(EngineError):
    """No server has been usable for as long as the run waits."""


class UpdateRefused(EngineError):
    """A server does not take the new weights."""
