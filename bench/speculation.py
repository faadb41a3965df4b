"""What guessing brings: tokens per step, and tokens per second against not guessing.

    python -m bench.speculation [--rounds 3] [--json FILE]

The bundled demo model decodes on this machine, driven by the decode worker's own scheduler; all
proposers in one run, interleaved, medians.  Two kinds of text: conversations as the model knows
them, and ones that quote a long passage of their prompt.  There is no small model of the demo
model's vocabulary, so the draft models are stand-ins: its own first layer, which nobody has
trained to stand alone and which therefore bounds a real one from below, and the demo model itself,
whose guesses are all right and which bounds acceptance, not speed, from above.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from decode.effects import Effect, EmitToken, Ended, OpenHandoff, PrefillSource
from decode.scheduler import DecodeScheduler
from engine.blocks import BlockPool
from engine.demo.corpus import ASSISTANT, END, SPECIAL_TOKENS, USER, conversation
from engine.device.decoder import Decoder
from engine.device.draft import make_guesser
from engine.device.executor import TorchExecutor
from engine.device.folder import load_folder
from engine.device.loading import DEMO_FOLDER
from engine.device.pool import KvPool
from engine.executor import ModelInfo
from engine.prefix_cache import PrefixCache
from engine.speculation.choice import Guessing
from engine.step import Binding, Chunk, SampledToken, StepPlan, StepResult
from pdserve.config import SpeculationConfig
from pdserve.layout import KvLayout
from pdserve.request import Key, Request, SamplingParams
from pdserve.tombstones import Tombstones

if TYPE_CHECKING:
    from concurrent.futures import Future

BLOCK_TOKENS = 16
END_TOKEN = SPECIAL_TOKENS.index(END)
SOURCE = PrefillSource("prefill-0", "127.0.0.1:1", 1)


def open_executor(
    folder: Path, speculation: SpeculationConfig, *, block_count: int, sequences_max: int
) -> TorchExecutor:
    """Load a model on the plain kernels, with who guesses beside it; one slot more for prompts."""
    with torch.inference_mode():
        loaded = load_folder(folder, torch.float32, 1)
        spec = loaded.spec

        def load_draft(path: str) -> Decoder:
            draft = load_folder(Path(path), torch.float32, 1)
            return Decoder(draft.spec, draft.weights, BLOCK_TOKENS)

        guesser = make_guesser(speculation, spec, load_draft)
        layout = KvLayout(
            spec.layer_count + guesser.layer_count,
            BLOCK_TOKENS,
            spec.kv_head_count,
            spec.head_dim,
            "float32",
        )
        model = Decoder(spec, loaded.weights, BLOCK_TOKENS)
        pool = KvPool(layout, block_count)
    info = ModelInfo(
        folder.name,
        loaded.hash,
        spec.vocab_size,
        spec.context_tokens_max,
        spec.architecture,
        "float32",
    )
    return TorchExecutor(
        info,
        model,
        pool,
        sequences_max=sequences_max + 1,
        threads=1,
        step_depth=8,
        guesser=guesser,
    )


@dataclass(slots=True)
class Decoded:
    """What came of some requests; ``tokens`` are each one's whole output."""

    tokens: dict[Key, list[SampledToken]] = field(default_factory=dict[Key, list[SampledToken]])
    faults: dict[Key, str] = field(default_factory=dict[Key, str])
    step_count: int = 0
    chunk_count: int = 0
    guess_count: int = 0
    decoded_count: int = 0
    right_count: int = 0
    decode_s: float = 0.0

    @property
    def tokens_per_chunk(self) -> float:
        """Tokens a sequence gets from a step, on the average."""
        return self.decoded_count / max(1, self.chunk_count)


class Decoding:
    """The decode worker's scheduler and an executor; prompts are computed where they belong."""

    def __init__(
        self,
        executor: TorchExecutor,
        guessing: Guessing,
        *,
        sequences_max: int,
        step_depth: int = 2,
        microbatch_count: int = 1,
    ) -> None:
        self.executor = executor
        self.pool = BlockPool(executor.memory.block_count)
        self.scheduler = DecodeScheduler(
            self.pool,
            PrefixCache(self.pool, BLOCK_TOKENS),
            block_tokens=BLOCK_TOKENS,
            sequences_max=sequences_max,
            step_depth=step_depth,
            inbox_max=4096,
            growth_tokens=BLOCK_TOKENS,
            context_tokens_max=executor.model.context_tokens_max,
            tombstones=Tombstones(10000, 1e9),
            guessing=guessing,
            microbatch_count=microbatch_count,
        )
        self._prompt_slot = sequences_max
        self._requests: dict[Key, Request] = {}
        self._flying: deque[tuple[StepPlan, Future[StepResult]]] = deque()

    def run(self, requests: Sequence[Request]) -> Decoded:
        """Decode requests to their ends; they may be more than fit at once."""
        decoded = Decoded()
        for request in requests:
            self._requests[request.key] = request
            decoded.tokens[request.key] = []
            self._apply(
                self.scheduler.reserve(
                    request, epoch=0, source=SOURCE, now_s=0.0, reserve_s=3600, landing_s=3600
                ),
                decoded,
            )
        while sum(self.scheduler.request_counts.values()):
            self._apply(self.scheduler.admit(0.0), decoded)
            begin_s = time.perf_counter()
            self._step(decoded)
            decoded.decode_s += time.perf_counter() - begin_s
        return decoded

    def _step(self, decoded: Decoded) -> None:
        while (plan := self.scheduler.plan(0.0)) is not None:
            self._flying.append((plan, self.executor.submit(plan)))
        if not self._flying:
            return
        plan, future = self._flying.popleft()
        result = future.result(timeout=60)
        decoded.step_count += 1
        decoded.chunk_count += len(plan.chunks)
        decoded.guess_count += sum(chunk.draft_count for chunk in plan.chunks)
        decoded.right_count += sum(len(tokens) - 1 for tokens in result.tokens.values())
        self._apply(self.scheduler.settle(result, 0.0), decoded)

    def _apply(self, effects: tuple[Effect, ...], decoded: Decoded) -> None:
        for effect in effects:
            match effect:
                case OpenHandoff():
                    self._land(effect, decoded)
                case EmitToken(key, _, sampled, _):
                    decoded.tokens[key].append(sampled)
                    decoded.decoded_count += 1
                case Ended(key, _, kind, message):
                    decoded.faults[key] = f"{kind.value}: {message}"
                case _:
                    pass

    def _land(self, opened: OpenHandoff, decoded: Decoded) -> None:
        """Compute a prompt into its blocks, as a prefill worker would through the wire."""
        key, request = opened.key, self._requests[opened.key]
        start = opened.held_count * BLOCK_TOKENS
        start = min(start, request.known_count - 1)
        tokens = request.known_tokens[start:]
        stop = request.known_count
        chunk = Chunk(key, self._prompt_slot, start, stop, tokens, opened.blocks, samples=True)
        binding = Binding(self._prompt_slot, request, request.emitted)
        future = self.executor.submit(StepPlan(0, (chunk,), (binding,)))
        result = future.result(timeout=60)
        if key in result.faults:
            message = result.faults[key]
            self._apply(self.scheduler.handoff_failed(key, 0, message, 0.0), decoded)
        else:
            (first,) = result.tokens[key]
            decoded.tokens[key].append(first)
            self._apply(self.scheduler.landed(key, 0, first.token, 0.0), decoded)
        self.scheduler.handoff_safe(key, 0)


@dataclass(frozen=True, slots=True)
class Figures:
    """One proposer on one kind of text."""

    proposer: str
    text: str
    temperature: float
    batch: int
    tokens_per_chunk: float
    right_share: float  # of the guesses
    tokens_per_s: float
    speed_up: float  # against naive, of the same rounds
    is_exact: bool  # the very tokens that naive gave


def _prompts(count: int) -> list[tuple[int, ...]]:
    """Questions from the corpus, as the router would tokenise them."""
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    questions: list[str] = []
    for number in range(count * 50):
        turn = conversation(random.Random(10_000 + number)).turns[0]
        if len(turn.assistant) > 120 and turn.user not in questions:
            questions.append(turn.user)
        if len(questions) == count:
            break
    return [tuple(tokenizer.encode(f"{USER}{question}{ASSISTANT}").ids) for question in questions]


def _requests(
    prompts: Sequence[tuple[int, ...]], temperature: float, output_tokens_max: int, first: int = 0
) -> list[Request]:
    return [
        Request(
            Key(f"{first + number:032x}", 0),
            prompt,
            output_tokens_max,
            stop_tokens=frozenset({END_TOKEN}),
            sampling=SamplingParams(temperature=temperature, seed=number),
        )
        for number, prompt in enumerate(prompts)
    ]


def _asked_again(
    prompts: Sequence[tuple[int, ...]], temperature: float, tokens_max: int
) -> list[tuple[int, ...]]:
    """Put each prompt behind itself and its own answer: what comes is mostly there already."""
    executor = open_executor(
        DEMO_FOLDER, SpeculationConfig(), block_count=600, sequences_max=len(prompts)
    )
    try:
        decoding = Decoding(executor, Guessing(), sequences_max=len(prompts))
        requests = _requests(prompts, temperature, tokens_max)
        answers = decoding.run(requests).tokens
    finally:
        executor.close()
    return [
        (*request.prompt, *(each.token for each in answers[request.key]), *request.prompt)
        for request in requests
    ]


def write_first_layers(folder: Path, layer_count: int) -> None:
    """Write the demo model's first layers as a model of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in DEMO_FOLDER.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    config["num_hidden_layers"] = layer_count
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(DEMO_FOLDER / "model.safetensors")
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layer_count
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _proposers(draft_folder: Path, draft_tokens: int) -> dict[str, SpeculationConfig]:
    kinds = {
        "naive": SpeculationConfig(),
        "ngram": SpeculationConfig(proposer="ngram"),
        "suffix": SpeculationConfig(proposer="suffix"),
        "draft: first layer": SpeculationConfig(proposer="draft", draft_path=str(draft_folder)),
        "draft: itself": SpeculationConfig(proposer="draft", draft_path=str(DEMO_FOLDER)),
    }
    return {name: replace(kind, draft_tokens=draft_tokens) for name, kind in kinds.items()}


def measure(
    text: str,
    prompts: Sequence[tuple[int, ...]],
    proposers: dict[str, SpeculationConfig],
    *,
    temperature: float,
    rounds: int,
    output_tokens_max: int,
) -> list[Figures]:
    """Decode the same requests with every proposer, in turn, ``rounds`` times."""
    batch = len(prompts)
    executors = {
        name: open_executor(DEMO_FOLDER, config, block_count=1200, sequences_max=batch)
        for name, config in proposers.items()
    }
    runs: dict[str, list[Decoded]] = {name: [] for name in proposers}
    try:
        for turn in range(rounds + 1):  # the first is not counted
            for name, executor in executors.items():
                decoding = Decoding(executor, Guessing.of(proposers[name]), sequences_max=batch)
                done = decoding.run(_requests(prompts, temperature, output_tokens_max))
                if turn:
                    runs[name].append(done)
    finally:
        for executor in executors.values():
            executor.close()
    figures: list[Figures] = []
    for name, several in runs.items():
        speeds = [run.decoded_count / run.decode_s for run in several]
        against = [
            mine / (other.decoded_count / other.decode_s)
            for mine, other in zip(speeds, runs["naive"], strict=True)
        ]
        last = several[-1]
        figures.append(
            Figures(
                name,
                text,
                temperature,
                batch,
                last.tokens_per_chunk,
                last.right_count / max(1, last.guess_count),
                statistics.median(speeds),
                statistics.median(against),
                last.tokens == runs["naive"][-1].tokens,
            )
        )
    return figures


def table(figures: Sequence[Figures]) -> str:
    """Write figures as a table of Markdown."""
    lines = [
        "| text | T | batch | proposer | tokens per step | guesses right | speed | same tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.text} | {each.temperature} | {each.batch} | {each.proposer} | "
        f"{each.tokens_per_chunk:.2f} | {each.right_share:.0%} | {each.speed_up:.2f}x | "
        f"{'yes' if each.is_exact else 'NO'} |"
        for each in figures
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and fail if any proposer changed a token."""
    parser = argparse.ArgumentParser(prog="python -m bench.speculation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    figures: list[Figures] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "first-layer"
        write_first_layers(folder, 1)
        proposers = _proposers(folder, options.draft_tokens)
        for batch in options.batches:
            for temperature in options.temperatures:
                prompts = _prompts(batch)
                again = _asked_again(prompts, temperature, options.output_tokens)
                for text, some in (("conversation", prompts), ("asked again", again)):
                    figures += measure(
                        text,
                        some,
                        proposers,
                        temperature=temperature,
                        rounds=options.rounds,
                        output_tokens_max=options.output_tokens,
                    )
                    print(f"{text}, temperature {temperature}, batch {batch}", file=sys.stderr)
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in figures], indent=1))
    return 0 if all(each.is_exact for each in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
