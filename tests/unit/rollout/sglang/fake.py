"""A server that answers as recorded from a real one, and goes wrong as it is told."""

import base64
import copy
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from tests.sglang.recordings import LENGTH, PROMPT, recorded

RECORDED = recorded()
TOKENS: list[int] = RECORDED["generate"]["content"]["output_ids"]
Reply = tuple[int, Any]
# What is done with a question in the place of answering it; None: the connection is dropped.
Fault = Callable[[dict[str, Any], "Fake"], Reply | None]


class Fake:
    """Served from threads of this process. `faults` are used up one a question; `asked` holds every question,
    `log` every path, in order."""

    def __init__(self) -> None:
        self.version = "default"
        self.faults: deque[Fault] = deque()
        self.asked: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.aborted: set[str] = set()
        self.under_way = self.most_under_way = 0
        self.session = False
        self.seconds = 0.0
        self.overrides: dict[str, Reply] = {}
        self.model_info: dict[str, Any] = {}
        self.server_info: dict[str, Any] = {}
        self.key: str | None = None
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, body: dict[str, Any] | None) -> Reply | None:
        with self._lock:
            self.log.append(path)
        if path in self.overrides:
            return self.overrides[path]
        if path == "/generate":
            return self._generate(body or {})
        if path == "/model_info":
            return 200, {
                **RECORDED["model_info"]["content"],
                **self.model_info,
                "weight_version": self.version,
            }
        if path == "/server_info":
            return 200, {**RECORDED["server_info"]["content"], **self.server_info}
        return self._control(path, body or {})

    def _generate(self, body: dict[str, Any]) -> Reply | None:
        if body.get("logprob_start_len") == 0:
            fault = self.faults.popleft() if self.faults else None
            return fault(body, self) if fault else (200, RECORDED["score"]["content"])
        if "rid" not in body:
            return 200, RECORDED["first_law"]["content"]
        with self._lock:
            self.asked.append(body)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            fault = self.faults.popleft() if self.faults else None
        try:
            time.sleep(self.seconds)
            return fault(body, self) if fault else (200, answer(body, self.version))
        finally:
            with self._lock:
                self.under_way -= 1

    def _control(self, path: str, body: dict[str, Any]) -> Reply:
        opens, closes = path == "/begin_weight_update", path == "/end_weight_update"
        if opens or closes:
            kind = ("begin" if opens else "end") + ("_twice" if self.session == opens else "")
            self.session = opens
            return _recorded(kind)
        if path == "/update_weights_from_tensor" and not self.session:
            return _recorded("tensor_outside_of_a_session")
        if path == "/abort_request":
            self.aborted.add(body["rid"])
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/update_weights_from_disk":
            self.version = body["weight_version"]
        names = {exchange["path"]: name for name, exchange in RECORDED.items() if exchange["status"] == 200}
        return _recorded(names[path]) if path in names else (200, {"success": True, "message": ""})


def _recorded(name: str) -> Reply:
    return RECORDED[name]["status"], RECORDED[name]["content"]


def answer(body: dict[str, Any], version: str, length: int | None = None, finish: str = "length") -> Any:
    """The recorded answer from where the question leaves off, at most `length` tokens of it."""
    done = len(body["input_ids"]) - len(PROMPT)
    end = min(LENGTH, done + body["sampling_params"]["max_new_tokens"])
    end = end if length is None else min(end, done + length)
    reply = copy.deepcopy(RECORDED["generate"]["content"])
    meta, count = reply["meta_info"], end - done
    reply["output_ids"] = reply["output_ids"][done:end]
    meta["id"] = body["rid"]
    meta["finish_reason"] = {"type": finish}
    meta["output_token_logprobs"] = meta["output_token_logprobs"][done:end]
    meta["weight_versions"] = [{"version": version, "start": 0, "end": count}]
    meta["output_top_logprobs_shape"][0] = count
    for kind, dtype in (("val", "<f4"), ("idx", "<i4")):
        name = f"output_top_logprobs_{kind}_flat_b64"
        rows = np.frombuffer(base64.b64decode(meta[name]), dtype).reshape(LENGTH, -1)[done:end]
        meta[name] = base64.b64encode(rows.tobytes()).decode()
    return reply


def dropped(body: dict[str, Any], fake: Fake) -> Reply | None:
    return None


def failed(body: dict[str, Any], fake: Fake) -> Reply:
    return 500, {"error": {"message": "CUDA error"}}


def refused(body: dict[str, Any], fake: Fake) -> Reply:
    return _recorded("too_long")


def garbage(body: dict[str, Any], fake: Fake) -> Reply:
    return 200, "<html>it works</html>"


def aborted_after(tokens: int) -> Fault:
    """Hand back a part, as a server does that is paused for new weights."""
    return lambda body, fake: (200, answer(body, fake.version, tokens, "abort"))


def slow(tokens: int) -> Fault:
    """Not done before it is asked to abort, and then hands back a part."""

    def wait(body: dict[str, Any], fake: Fake) -> Reply:
        while body["rid"] not in fake.aborted:
            time.sleep(0.01)
        return 200, answer(body, fake.version, tokens, "abort")

    return wait


def together(count: int) -> Fault:
    """Answer once as many questions are under way here."""

    def wait(body: dict[str, Any], fake: Fake) -> Reply:
        for _ in range(1000):
            if fake.most_under_way >= count:
                break
            time.sleep(0.01)
        return 200, answer(body, fake.version)

    return wait


def changed(change: Callable[[Any], object]) -> Fault:
    """The right answer, but for what `change` does to it."""

    def wrong(body: dict[str, Any], fake: Fake) -> Reply:
        reply = answer(body, fake.version)
        change(reply)
        return 200, reply

    return wrong


@contextmanager
def fakes(count: int) -> Iterator[list[Fake]]:
    servers = [Fake() for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error here."""


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any] | None) -> None:
            reply: Reply | None = (401, {"error": "Unauthorized"})
            if fake.key is None or self.headers.get("Authorization") == f"Bearer {fake.key}":
                reply = fake.reply(self.path, body)
            if reply is None:
                self.close_connection = True
                self.connection.close()
                return
            status, content = reply
            text = (
                b""
                if content is None
                else (content if isinstance(content, str) else json.dumps(content)).encode()
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
