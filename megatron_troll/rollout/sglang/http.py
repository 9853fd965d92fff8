"""HTTP requests to servers, with one exception class per kind of failure."""

import json
from pathlib import Path
from typing import Any

import httpx

from megatron_troll.config import ConfigError
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
    """The server is not one that this run can sample from: no URL, another model, vocabulary, tokenizer or
    distribution, other weights, no record of its experts, or an API key that the run does not have."""


class NoServers(EngineError):
    """No server has been usable for as long as the run waits."""


class UpdateRefused(EngineError):
    """A server refuses the new weights."""


CONNECT_S = 10.0
# For all requests but generation, syncs and health checks, which have their own limits.
QUICK_S = 60.0
# SGLang closes a connection that was idle for 5 s: a request sent at that moment is lost.
IDLE_S = 2.0


class Http:
    """A connection pool of one event loop. `key` is sent with every request and appears in no message."""

    def __init__(self, key: str | None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Proxies set in the environment are for the internet, not for servers in the same cluster.
        self._client = httpx.AsyncClient(
            headers=headers,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=IDLE_S),
        )

    async def get(self, url: str, path: str, timeout: float = QUICK_S) -> Any:
        return await self._call("GET", url, path, None, timeout)

    async def post(self, url: str, path: str, body: Any, timeout: float | None = QUICK_S) -> Any:
        """Return the JSON of the reply; its text if it is not JSON, None if it is empty. Raises Unreachable,
        BadReply, ServerFault (429 and 5xx), WrongServer (401 and 403), Refused (any other 4xx)."""
        return await self._call("POST", url, path, body, timeout)

    async def delete(self, url: str, path: str) -> Any:
        return await self._call("DELETE", url, path, None, QUICK_S)

    async def _call(self, method: str, url: str, path: str, body: Any, timeout: float | None) -> Any:
        limits = httpx.Timeout(timeout, connect=CONNECT_S)
        try:
            reply = await self._client.request(method, url + path, json=body, timeout=limits)
        except httpx.TransportError as error:
            what = str(error) or type(error).__name__
            raise Unreachable(f"{url}{path}: {what}") from error
        except httpx.InvalidURL as error:
            raise WrongServer(f"{url} is no URL of a server: {error}") from error
        except httpx.DecodingError as error:
            raise BadReply(f"{url}{path}: {error}") from error
        if reply.is_success:
            return _content(reply)
        raise _failure(reply, url + path)

    async def close(self) -> None:
        await self._client.aclose()


def is_server(url: str) -> bool:
    """Whether `url` can be that of a server: a request to it can be sent."""
    try:
        place = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        return False
    in_range = place.port is None or 0 < place.port < 2**16
    return place.scheme in ("http", "https") and bool(place.host) and place.path == "/" and in_range


def _content(reply: httpx.Response) -> Any:
    if not reply.content:
        return None
    try:
        return reply.json()
    except ValueError:
        return reply.text


def _failure(reply: httpx.Response, where: str) -> Exception:
    said = f"{where} answered {reply.status_code}: {_message(reply)}"
    if reply.status_code in (401, 403):
        return WrongServer(
            f"{said}; name the file of the server's key in rollout.sglang.api_key_file (`mtroll serve` keeps "
            "it in runs/<its name>/servers/key)"
        )
    if reply.status_code == 429 or reply.status_code >= 500:
        return ServerFault(said)
    return Refused(said)


def _message(reply: httpx.Response) -> str:
    """The server's error message, from any of the forms it has."""
    try:
        body = reply.json()
    except ValueError:
        return reply.text[:300]
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or json.dumps(body))[:1000]


def read_key(file: str) -> str:
    """Read the key in `rollout.sglang.api_key_file`. Raises ConfigError if the file cannot be read, holds no
    valid key, or is readable by others."""
    path = Path(file)
    try:
        readable, key = path.stat().st_mode & 0o077, path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"rollout.sglang.api_key_file: {file}: {error.strerror}") from error
    if readable:
        raise ConfigError(f"rollout.sglang.api_key_file: others may read {file}: chmod 600 {file}")
    if not key or not key.isascii() or len(key.split()) != 1:
        raise ConfigError(f"rollout.sglang.api_key_file: {file} does not hold one word of ASCII")
    return key
