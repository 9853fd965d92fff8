"""What can go wrong with a server. Every message says what to do."""

from megatron_troll.rollout.engine import EngineError


class Passing(EngineError):
    """Something that another attempt, maybe at another server, may not meet."""


class Unreachable(Passing):
    """The connection was refused or lost, or nothing came in time."""


class ServerFault(Passing):
    """The server answered that it failed or is too busy."""


class BadReply(Passing):
    """The server's answer is not what was asked for."""


class ShortTopK(BadReply):
    """Fewer entries per position than asked for."""


class NotFinite(BadReply):
    """A log-probability that is no number."""


class NoExperts(EngineError):
    """The server does not say which experts it chose."""


class StaleWeights(Passing):
    """An answer from weights that this run did not put there."""


class Refused(EngineError):
    """The server understood the request and will not serve it."""


class Unauthorized(EngineError):
    """The server wants an API key, or another one."""


class WrongModel(EngineError):
    """The server serves a model that is not the one that the run draws from."""


class WrongVocabulary(WrongModel):
    """The server's model has another vocabulary."""


class WrongTokenizer(WrongModel):
    """The server's tokenizer gives other ids."""


class WrongLaw(EngineError):
    """The server's log-probs are not of the law that tokens are drawn from."""


class NoServers(EngineError):
    """No server has been usable for as long as the run waits."""


class UpdateRefused(EngineError):
    """A server does not take the new weights."""


class VersionMissing(EngineError):
    """A server took new weights and does not call them by the version they were given."""


class Mismatch(EngineError):
    """A server's log-probs are too far from the trainer's."""
