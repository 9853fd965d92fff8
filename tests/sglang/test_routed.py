"""The experts that a real server says it chose are those of Hugging Face's routers on the same tokens."""

from pathlib import Path

import httpx
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_troll.config import Sampling
from megatron_troll.rollout.sglang.wire import GenerationRequest, Part, Routed, part_of
from tests.dist.tiny import reference
from tests.sglang.farm import Farm
from tests.sglang.model import CONFIG, VOCAB

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


def ask(url: str, ids: list[int], length: int) -> Part:
    question = GenerationRequest(
        ids, length, Sampling(temperature=0.0), (VOCAB - 1,), 4, VOCAB, seed=1, routed=ROUTED
    )
    body = question.body("routed-")
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
