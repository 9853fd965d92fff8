"""A server that is not the policy's is told from one that is."""

import asyncio
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_troll.mcore.shape import shape_of
from megatron_troll.rollout.sglang.http import BadReply, Http, ServerFault, WrongServer
from megatron_troll.rollout.sglang.identity import Identity
from tests.sglang.model import CONFIG, TOKENIZER
from tests.sglang.recordings import PROMPT
from tests.unit.rollout.sglang.fake import RECORDED, Fake, fakes

FOLDER = Path("runs/model")
TEXT = "sort 3142"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    with fakes(1) as servers:
        serve(servers[0], tmp_path, CONFIG)
        yield servers[0]


def serve(fake: Fake, folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    fake.model_info = {"model_type": config["model_type"]}
    fake.server_info = {"model_path": str(folder)}


def check(fake: Fake, temperature: float = 1.0) -> str:
    identity = Identity(FOLDER, shape_of(CONFIG), TOKENIZER, TEXT, PROMPT, temperature)

    async def run() -> str:
        http = Http(None)
        try:
            return await identity.check(http, fake.url)
        finally:
            await http.close()

    return asyncio.run(run())


def test_the_policys_own_server(fake: Fake) -> None:
    assert check(fake) == "default"


def test_a_folder_on_another_machine_is_not_looked_for(fake: Fake) -> None:
    fake.server_info["model_path"] = "/on/another/machine"
    assert check(fake) == "default"


def test_another_model(fake: Fake, tmp_path: Path) -> None:
    serve(fake, tmp_path, CONFIG | {"num_hidden_layers": 2})
    with pytest.raises(WrongServer, match="layers 2, not 4: start the server from runs/model"):
        check(fake)


def test_quantised_weights(fake: Fake, tmp_path: Path) -> None:
    serve(fake, tmp_path, CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(WrongServer, match=r"quantised \(FP8; quant.*: start the server from runs/model"):
        check(fake)


def test_another_size_of_experts_after_a_sync_from_disk(fake: Fake, tmp_path: Path) -> None:
    """Its /model_info then names the trainer's own export."""
    synced = tmp_path / "synced"
    synced.mkdir()
    (synced / "config.json").write_text(json.dumps(CONFIG))
    serve(fake, tmp_path, CONFIG | {"moe_intermediate_size": 20})
    fake.model_info["model_path"] = str(synced)
    with pytest.raises(WrongServer, match="expert_ffn 20, not 24: start the server from runs/model"):
        check(fake)


def test_sampling_that_the_run_did_not_ask_for(fake: Fake) -> None:
    fake.model_info["preferred_sampling_params"] = {"temperature": 0.3}
    assert check(fake) == "default"
    fake.model_info["preferred_sampling_params"] = {"temperature": 0.3, "repetition_penalty": 1.2}
    with pytest.raises(WrongServer, match=r"repetition_penalty=1.2, .* without --preferred-sampling-params"):
        check(fake)


def test_a_watermark(fake: Fake) -> None:
    fake.server_info["watermark_default_enabled"] = True
    with pytest.raises(WrongServer, match="without --watermark-default-enabled"):
        check(fake)


def test_another_family(fake: Fake) -> None:
    fake.model_info["model_type"] = "llama"
    with pytest.raises(WrongServer, match="of type 'llama', the run samples from a 'qwen3_moe'"):
        check(fake)


def test_another_vocabulary(fake: Fake, tmp_path: Path) -> None:
    serve(fake, tmp_path, CONFIG | {"vocab_size": 1000})
    with pytest.raises(WrongServer, match="vocabulary of 1000"):
        check(fake)


def test_another_tokenizer(fake: Fake) -> None:
    fake.overrides["/tokenize"] = (200, {"tokens": [1, 2, 3], "count": 3})
    with pytest.raises(WrongServer, match=r"'sort 3142' is \[1, 2, 3\] there"):
        check(fake)


def test_a_server_without_a_tokenizer_has_none_to_differ(fake: Fake) -> None:
    fake.overrides["/tokenize"] = (400, {"error": {"message": "no tokenizer"}})
    assert check(fake) == "default"


def test_what_is_not_sglang(fake: Fake) -> None:
    fake.overrides["/server_info"] = (200, {})
    with pytest.raises(BadReply, match="/server_info names no model_path"):
        check(fake)
    fake.overrides["/model_info"] = (200, "<html>")
    with pytest.raises(BadReply, match="/model_info names no weight_version"):
        check(fake)


def test_a_server_that_is_not_healthy(fake: Fake) -> None:
    fake.overrides["/health"] = (503, {"message": "loading"})
    with pytest.raises(ServerFault, match="answered 503: loading"):
        check(fake)


def test_log_probs_of_temperature_1_in_any_case(fake: Fake) -> None:
    """What SGLANG_RETURN_ORIGINAL_LOGPROB=1 makes of a server; the recording is of temperature 1."""
    with pytest.raises(WrongServer, match=r"not at temperature 0\.5: unset SGLANG_RETURN_ORIGINAL_LOGPROB"):
        check(fake, temperature=0.5)


def test_log_probs_of_the_temperature_asked_for(fake: Fake) -> None:
    plain = RECORDED["first_law"]["content"]
    tempered = copy.deepcopy(plain)
    for entry in tempered["meta_info"]["output_top_logprobs"][0]:
        entry[0] = 2 * entry[0] - 0.25  # any constant: the law's own normaliser
    replies = iter([plain, tempered])
    fake.reply = lambda path, body, reply=fake.reply: (  # pyright: ignore[reportAttributeAccessIssue]
        (200, next(replies)) if path == "/generate" else reply(path, body)
    )
    assert check(fake, temperature=0.5) == "default"
