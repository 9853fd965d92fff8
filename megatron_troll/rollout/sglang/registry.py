"""The servers of a run: those that its configuration names, or those that `mtroll serve` has registered in
the run's folder, where any machine that shares the folder adds its own."""

import json
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from megatron_troll.config import Config, RunPaths
from megatron_troll.rollout.sglang.http import read_key
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


def registered(folder: Path) -> tuple[str, ...]:
    """URLs of the servers in `folder`, sorted. A file that is being written or removed is skipped."""
    urls = set()
    for file in folder.glob("*.json"):
        try:
            urls.add(str(json.loads(file.read_text())["url"]))
        except (OSError, ValueError, LookupError):
            continue
    return tuple(sorted(urls))


def register(folder: Path, url: str, pid: int) -> None:
    """Add a server that runs as process `pid` of this machine."""
    write_atomic(_file(folder, url), json.dumps({"url": url, "pid": pid}))


def unregister(folder: Path, url: str) -> None:
    _file(folder, url).unlink(missing_ok=True)


def _file(folder: Path, url: str) -> Path:
    place = urlsplit(url)
    return folder / f"{place.hostname}-{place.port}.json".replace(":", "_")
