"""Other weights under a running cluster: exact afterwards, whoever comes and goes."""

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from decode.worker import DecodeWorker
from engine.device.loading import DEMO_FOLDER
from pdserve.config import ClusterConfig, load
from pdserve.errors import Conflict, InvalidRequest
from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc
from router.core import RouterCore
from router.pause import Mode
from sim.scripted import Script, ScriptedWorker, run_script

PROMPT = [number % 700 + 40 for number in range(75)]


def perturbed(folder: Path, seed: int) -> Path:
    """Copy the demo model with other weights, so much other that its tokens differ."""
    shutil.copytree(DEMO_FOLDER, folder)
    weights = load_file(folder / "model.safetensors")
    dice = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if "norm" not in name:
            noise = torch.randn(weight.shape, generator=dice)
            weights[name] = (weight.float() * (1 + 0.3 * noise)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(tmp_path_factory.mktemp("models") / "other", 1)


@pytest.fixture
def settings() -> dict[str, object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return {"heartbeat.interval_s": 0.1, "router.grpc_port": port}


@pytest.fixture
def config(settings: dict[str, object]) -> ClusterConfig:
    small = {
        "kv.checksum": True,
        "prefill.kv_blocks": 200,
        "decode.kv_blocks": 200,
        "prefill.token_budget": 32,
    }
    return load(None, small | settings)


def specs(pair: Any) -> list[Any]:
    return [
        pair.spec(PROMPT, 40),
        pair.spec(PROMPT[::-1], 40),
        pair.spec(PROMPT, 40, temperature=1.0, seed=5),
    ]


async def outputs(pair: Any) -> list[list[int]]:
    seen = [await pair.tokens(spec) for spec in specs(pair)]
    await pair.await_baseline()
    return seen


async def fresh_outputs(pair: Any, folder: Path) -> list[list[int]]:
    """What a cluster gives that was started on that folder."""
    fresh = load(None, {"model.path": str(folder), "router.grpc_port": 0, "decode.kv_blocks": 200})
    pair_type: type[Script] = type(pair)
    async with run_script(pair_type(fresh)) as other:
        return await outputs(other)


async def test_after_an_update_the_cluster_is_like_one_started_on_the_new_folder(
    pair: Any, other_model: Path
) -> None:
    old = await outputs(pair)
    wanted = await fresh_outputs(pair, other_model)
    assert all(one != other for one, other in zip(old, wanted, strict=True))
    hashes = {hosted.worker.info.model_hash for hosted in (pair.prefill, pair.decode)}
    await pair.core.pause()
    answer = await pair.core.update_weights(str(other_model), 60.0)
    assert answer["updated"] == ["decode-0", "prefill-0"]
    assert answer["failed"] == {}
    now = {hosted.worker.info.model_hash for hosted in (pair.prefill, pair.decode)}
    assert now == {answer["model_hash"]}
    assert not now & hashes
    for hosted in (pair.prefill, pair.decode):
        assert hosted.audit.blocks.cached == 0, "prefixes of the old weights"
    await pair.core.resume()
    assert await outputs(pair) == wanted
    # And back: a change is no one-way street.
    await pair.core.pause()
    await pair.core.update_weights(str(DEMO_FOLDER), 60.0)
    await pair.core.resume()
    assert await outputs(pair) == old


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "no such folder"),
        ("weights", "model.safetensors: no such file"),
        ("pickle", "is a pickle, which is never read"),
        ("config", "config.json: num_hidden_layers is 2; wanted 4"),
        ("vocabulary", r"config.json: vocab_size is 1000; wanted 1152|model.embed_tokens.weight"),
        ("tokenizer", "tokenizer.json: differs from that of the model in use"),
        ("eos", r"generation_config.json: eos_token_id is \[7\]; wanted \[0\]"),
        ("torn", "damaged safetensors file"),
    ],
)
async def test_a_folder_that_cannot_take_its_place_changes_nothing(
    pair: Any, tmp_path: Path, damage: str, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(DEMO_FOLDER, folder)
    config = folder / "config.json"
    match damage:
        case "missing":
            shutil.rmtree(folder)
        case "weights":
            (folder / "model.safetensors").unlink()
        case "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "config":
            config.write_text(
                config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 2')
            )
        case "vocabulary":
            config.write_text(
                config.read_text().replace('"vocab_size": 1152', '"vocab_size": 1000')
            )
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")
        case "eos":
            (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
        case "torn":
            content = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    wanted = await pair.tokens(pair.spec(PROMPT, 20))
    hashes = {hosted.worker.info.model_hash for hosted in (pair.prefill, pair.decode)}
    await pair.core.pause()
    with pytest.raises(InvalidRequest, match=message):
        await pair.core.update_weights(str(folder), 60.0)
    assert {each.worker.info.model_hash for each in (pair.prefill, pair.decode)} == hashes
    await pair.core.resume()
    assert await pair.tokens(pair.spec(PROMPT, 20)) == wanted


async def test_kept_requests_forbid_an_update(pair: Any, other_model: Path) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, 60))
    request = asyncio.create_task(pair.tokens(pair.spec(PROMPT, 60)))
    await pair.until("a request in flight", lambda: bool(pair.core.table.live))
    await pair.core.pause(Mode.KEEP)
    with pytest.raises(Conflict, match="mode keep"):
        await pair.core.update_weights(str(other_model), 60.0)
    await pair.core.resume()
    assert await request == wanted


async def test_a_worker_that_restarts_on_the_old_folder_serves_the_new_weights(
    pair: Any, config: ClusterConfig, other_model: Path
) -> None:
    await pair.core.pause()
    await pair.core.update_weights(str(other_model), 60.0)
    await pair.core.resume()
    wanted = await outputs(pair)
    await pair.decode.close()
    pair.decode = ScriptedWorker(config, DecodeWorker, pair.hub)
    old = pair.decode.worker.info.model_hash
    await pair.decode.start(f"127.0.0.1:{config.router.grpc_port}")
    await pair.until("it serves", lambda: pair.core.is_ready is None)
    assert pair.decode.worker.info.model_hash != old
    assert await outputs(pair) == wanted


async def test_the_next_router_takes_the_workers_with_their_new_weights(
    pair: Any, config: ClusterConfig, other_model: Path
) -> None:
    await pair.core.pause()
    await pair.core.update_weights(str(other_model), 60.0)
    await pair.core.resume()
    wanted = await outputs(pair)
    await pair.core.close()
    pair.core = RouterCore(config.router, config.heartbeat, config.decode)
    await pair.core.open()
    await pair.until("it serves", lambda: pair.core.is_ready is None)
    assert await outputs(pair) == wanted


async def test_a_busy_worker_loads_but_does_not_change(pair: Any, other_model: Path) -> None:
    request = asyncio.create_task(pair.tokens(pair.spec(PROMPT, 300)))
    decode = pair.decode.worker
    await pair.until("it runs", lambda: decode.audit().request_counts["running"] == 1)
    phases = worker_service_pb2.UpdateWeightsRequest
    async with grpc.aio.insecure_channel(decode.info.address) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        prepared = await stub.UpdateWeights(
            phases(phase=phases.PREPARE, path=str(other_model)), timeout=30
        )
        commit = phases(phase=phases.COMMIT, model_hash=prepared.model_hash)
        with pytest.raises(grpc.aio.AioRpcError, match="decode-0 is not idle: 1 requests"):
            await stub.UpdateWeights(commit, timeout=30)
        assert len(await request) == 300
        await pair.await_baseline()
        await stub.UpdateWeights(commit, timeout=30)
    assert decode.info.model_hash == prepared.model_hash


async def test_what_was_prepared_and_given_up_is_forgotten(pair: Any, other_model: Path) -> None:
    decode = pair.decode.worker
    model_hash = await decode.prepare_weights(str(other_model))
    with pytest.raises(Conflict, match="wanted another"):
        decode.commit_weights("another")
    decode.discard_weights()
    decode.discard_weights()
    with pytest.raises(Conflict, match="prepared is nothing"):
        decode.commit_weights(model_hash)
