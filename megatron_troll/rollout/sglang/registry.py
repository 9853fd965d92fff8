"""The servers of a run: those that its configuration names, or those that `mtroll serve` has registered in
the run's folder, where any machine that shares the folder adds its own."""

import json
import logging
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_troll.config import Config, RunPaths
from megatron_troll.rollout.sglang.http import is_server, read_key
from megatron_troll.system import write_atomic


def weights_folder(config: Config) -> Path:
    """Folder from which the servers of a run read weights."""
    return Path(config.rollout.sglang.sync.folder or RunPaths.of(config).weights)


def key_of(config: Config) -> str:
    """The API key of a run's servers, without which any user of the machine could replace their weights: that
    in rollout.sglang.api_key_file, otherwise the run's own, made by whoever comes first, the run or its
    servers. Raises ConfigError; see read_key."""
    named = config.rollout.sglang.api_key_file
    if named is not None:
        return read_key(named)
    path = RunPaths.of(config).key
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{secrets.token_hex(8)}.part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        # Unlike a rename, a link fails if there is a key already.
        os.link(part, path)
    except FileExistsError:
        pass
    finally:
        part.unlink()
    return read_key(str(path))


@dataclass
class Registry:
    """Servers that `mtroll serve` registered in `folder`. What is wrong with a registration is said once."""

    folder: Path
    _said: set[str] = field(default_factory=set)

    def urls(self) -> tuple[str, ...]:
        """URLs of the servers, sorted, without those whose process is known to be gone: another user's
        program may listen there now, and would be sent the key. One removed meanwhile is skipped."""
        found = {url for file in sorted(self.folder.glob("*.json")) if (url := self._url(file)) is not None}
        return tuple(sorted(found))

    def _url(self, file: Path) -> str | None:
        try:
            entry = json.loads(file.read_text())
            url = str(entry["url"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            entry, url = {}, ""
        if not is_server(url):
            self._say(f"{file} names no server, and is not used: delete it")
            return None
        if _gone(entry):
            self._say(
                f"{file}: process {entry['pid']} of this machine has ended, its server {url} is not used: "
                "start `mtroll serve` again"
            )
            return None
        return url

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logging.getLogger(__name__).warning("%s", what)


def register(folder: Path, url: str, pid: int) -> None:
    """Add a server that runs as process `pid` of this machine."""
    entry = {"url": url, "pid": pid, "host": _host(), "started": _started(pid)}
    write_atomic(_file(folder, url), json.dumps(entry))


def _gone(entry: dict[str, Any]) -> bool:
    """Whether a registered process ended, with its machine or by itself. False if it is one of another
    machine or container."""
    pid, host, mine = entry.get("pid"), entry.get("host"), _host()
    if not isinstance(pid, int) or not isinstance(host, list) or mine is None or host[:1] != mine[:1]:
        return False
    if host[1:2] != mine[1:2]:
        return True
    if host != mine:
        return False
    started = _started(pid)
    return started is None or started != entry.get("started")


def _host() -> list[str] | None:
    """Identity of the processes' numbers that this process sees: the machine since its start, and the
    container. None if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Return the start time of a process, in clock ticks since the machine started; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, a name in brackets, may have any characters; this is the 22nd.
    return int(stat.rpartition(")")[2].split()[19])


def unregister(folder: Path, url: str) -> None:
    _file(folder, url).unlink(missing_ok=True)


def _file(folder: Path, url: str) -> Path:
    place = urlsplit(url)
    return folder / f"{place.hostname}-{place.port}.json".replace(":", "_")
