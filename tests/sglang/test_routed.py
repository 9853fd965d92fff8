"""The experts that a real server says it chose are those of Hugging Face's routers on the same tokens."""

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_troll.config import Sampling
from megatron_troll.rollout.sglang.wire import GenerationRequest, Part, Routed, part_of
from tests.dist.layouts_reference import UNRECORDED, routers_watched
from tests.dist.tiny import logits_of, reference
from tests.sglang.farm import Farm, RealServer
from tests.sglang.model import CONFIG, VOCAB, write_model
from tests.sglang.test_replay import undecided

PROMPT = [2, 8, 9, 10, 4, 3]
ROUTED = Routed(CONFIG["num_hidden_layers"], CONFIG["num_experts_per_tok"], CONFIG["num_experts"])


def test_a_server_tells_the_experts_of_every_token_that_it_read(farm: Farm, folder: Path) -> None:
    server = farm.start(folder, enable_return_routed_experts=True).wait_until_healthy()
    try:
        first = ask(server.url, PROMPT, 12)
        check(first, PROMPT)
        # The prompt is in the server's cache now; the rest of an answer reads its beginning again.
        check(ask(server.url, PROMPT, 12), PROMPT)
        begun = [*PROMPT, *first.ids[:5].tolist()]
        check(ask(server.url, begun, 4), begun)
    finally:
        server.kill()


@pytest.fixture
def undecided_server(farm: Farm, tmp_path: Path) -> Iterator[RealServer]:
    """A server of a model whose routers leave the choice to rounding, with a prefix cache."""
    undecided(write_model(tmp_path / "model"))
    server = farm.start(tmp_path / "model", enable_return_routed_experts=True).wait_until_healthy()
    yield server
    server.kill()


def test_replay_gives_the_servers_log_probs_but_for_what_it_leaves_out(
    undecided_server: RealServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Siblings that share the prefix cache, some of them retracted while they are sampled. The first token of
    an answer is sampled by a forward of its own, whose record is that of the first sibling."""
    url, length = undecided_server.url, 110
    with ThreadPoolExecutor(12) as pool:
        calm = list(pool.map(lambda i: ask(url, [*PROMPT, 5 + i % 3], 40, 1.0), range(12)))
        futures = [pool.submit(ask, url, [*PROMPT, 5 + i % 3], length, 1.0) for i in range(12)]
        time.sleep(1.0)
        httpx.post(f"{url}/pause_generation", json={"mode": "retract"}, timeout=60, trust_env=False)
        httpx.post(f"{url}/continue_generation", json={}, timeout=60, trust_env=False)
        disturbed = [future.result() for future in futures]
    left_out = [~known(part) for part in (*calm, *disturbed)]
    retracted = [part for part, out in zip(disturbed, left_out[len(calm) :]) if out.all()]
    assert retracted
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    worst = 0.0
    for i, part in enumerate((*calm, *disturbed)):
        if left_out[i].all():
            continue
        assert not left_out[i].any()
        worst = max(worst, gaps(model, [*PROMPT, 5 + i % 12 % 3], part)[1:].max())
    assert worst < 1e-4
    share = np.concatenate(left_out).mean()
    with capsys.disabled():
        print(f"\n{len(retracted)} of {len(disturbed)} answers retracted; {share:.1%} of tokens not replayed")


def known(part: Part) -> np.ndarray:
    """[P + T - 1] whether the routing of a token is recorded."""
    assert part.experts is not None
    return (part.experts != UNRECORDED).all((1, 2))


@torch.no_grad()
def gaps(model: nn.Module, prompt: list[int], part: Part) -> np.ndarray:
    """[T] distance of the server's log-probs from those of `model` with the recorded routing."""
    assert part.experts is not None
    read = torch.tensor([*prompt, *part.ids.tolist()])
    with routers_watched(model, torch.from_numpy(part.experts).long()):
        logp = logits_of(model, read[None, :-1])[0, len(prompt) - 1 :].log_softmax(-1)
    return (logp.gather(1, read[len(prompt) :, None])[:, 0] - torch.from_numpy(part.logp)).abs().numpy()


def ask(url: str, ids: list[int], length: int, temperature: float = 0.0) -> Part:
    question = GenerationRequest(
        ids, length, Sampling(temperature=temperature), (VOCAB - 1,), 4, VOCAB, seed=1, routed=ROUTED
    )
    body = question.body(f"routed-{secrets.token_hex(4)}")
    body["sampling_params"]["ignore_eos"] = True
    reply = httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).raise_for_status()
    return part_of(reply.json(), question)


def check(part: Part, prompt: list[int]) -> None:
    assert part.experts is not None
    read = [*prompt, *part.ids.tolist()][:-1]
    np.testing.assert_array_equal(part.experts, chosen(read))


@torch.no_grad()
def chosen(ids: list[int]) -> np.ndarray:
    """[t, layers, k], ascending."""
    model, seen = reference(CONFIG), []

    def watch(gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weight = gate.weight
        assert isinstance(weight, Tensor)
        seen.append(F.linear(inputs[0], weight).topk(ROUTED.per_token, -1).indices)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_pre_hook(watch)
    model(torch.tensor([ids]))
    return torch.stack(seen, 1).sort(-1).values.numpy()
