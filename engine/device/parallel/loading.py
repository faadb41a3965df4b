"""From settings to a running group."""

from pathlib import Path

from engine.device.backends import torch_arithmetic
from engine.device.cuda.loading import picks_cuda
from engine.device.loading import DEMO_FOLDER, load_executor, load_on_cuda, model_hash
from engine.device.native.cores import check_cores
from engine.device.parallel.folder_header import Header, read_header, read_spec, require_same_shape
from engine.device.parallel.group import SILENCE_S_MAX, GroupExecutor
from engine.device.parallel.messages import Start
from engine.device.parallel.partition import Partition, part_layout, split
from engine.device.parallel.ranks import Pool
from engine.device.resources import Resources
from engine.executor import Executor, ModelInfo
from pdserve.config import ModelConfig, SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel
from pdserve.layout import KvLayout

_DTYPES = {"auto": "float32", "float32": "float32", "bfloat16": "bfloat16"}
_DEMO_NAME = "demo"
NOBODY_GUESSES = SpeculationConfig()


def load_worker_executor(
    config: ModelConfig,
    resources: Resources,
    speculation: SpeculationConfig = NOBODY_GUESSES,
    *,
    section: str = "",
) -> Executor:
    """Load a worker's model: into this process, or onto a group of ranks if it is to be cut.

    Raises:
        InvalidModel: the folder is damaged or not supported.
        InvalidConfig: a setting does not fit the model or the machine.
        PeerLost: a rank ended while it started.

    """
    if picks_cuda(config):
        return load_on_cuda(config, resources, speculation)
    if resources.tp * resources.pp == 1:
        return load_executor(config, resources, speculation)
    return load_group_executor(config, resources, speculation, section=section)


def load_group_executor(
    config: ModelConfig,
    resources: Resources,
    speculation: SpeculationConfig = NOBODY_GUESSES,
    *,
    section: str = "",
    silence_s_max: float = SILENCE_S_MAX,
) -> GroupExecutor:
    """Start a group of ``tp * pp`` ranks on a model; ``section`` names its settings.

    ``kv_bytes`` are those of one rank, as threads are: with more ranks the pool has more blocks.

    Raises:
        InvalidModel: the folder is damaged or not supported.
        InvalidConfig: the model cannot be cut so, or a pool would hold no block, or cannot be had.
        PeerLost: a rank ended while it started.

    """
    _check(config, speculation)
    check_cores(resources.cpus)
    path = str(Path(config.path).absolute()) if config.path else str(DEMO_FOLDER)
    dtype = _DTYPES[config.dtype]
    spec = read_spec(Path(path))
    partition = Partition.of(spec, tp=resources.tp, pp=resources.pp, section=section)
    layouts = [
        part_layout(spec, share, block_tokens=resources.block_tokens, dtype=dtype)
        for share in partition.shares
    ]
    block_bytes = max(layout.block_bytes for layout in layouts)
    block_count = resources.kv_blocks or resources.kv_bytes // block_bytes
    if block_count < 1:
        raise InvalidConfig(
            f"kv_bytes is {resources.kv_bytes}; wanted at least {block_bytes}, one block of "
            f"{resources.block_tokens} tokens of one rank's part of this model",
            param="kv_bytes",
        )
    starts = [
        Start(
            rank=share.rank,
            tp=resources.tp,
            pp=resources.pp,
            path=path,
            dtype=dtype,
            block_tokens=resources.block_tokens,
            block_count=block_count,
            sequences_max=resources.sequences_max,
            steps_in_flight_max=resources.steps_in_flight_max,
            threads=resources.threads,
            cpus=_cores(resources.cpus, share.rank, len(partition.shares)),
            speculation=speculation,
        )
        for share in partition.shares
    ]
    whole = KvLayout(
        spec.layer_count, resources.block_tokens, spec.kv_head_count, spec.head_dim, dtype
    )
    return GroupExecutor(
        partition,
        starts,
        _make_pools([layout.pool_bytes(block_count) for layout in layouts], resources),
        layout=whole,
        describe=_Describer(config, resources, dtype).describe,
        silence_s_max=silence_s_max,
    )


def _make_pools(sizes_bytes: list[int], resources: Resources) -> list[Pool]:
    pools: list[Pool] = []
    try:
        for size_bytes in sizes_bytes:
            pools.append(Pool(size_bytes))  # noqa: PERF401 - those made are closed if one cannot be
    except (OSError, OverflowError, ValueError) as error:
        for pool in pools:
            pool.close()
        name = "kv_blocks" if resources.kv_blocks else "kv_bytes"
        raise InvalidConfig(
            f"{name}: KV pools of {sum(sizes_bytes)} bytes: {error}", param=name
        ) from None
    return pools


class _Describer:
    """Names models: the first it is shown, and what may take its place."""

    def __init__(self, config: ModelConfig, resources: Resources, dtype: str) -> None:
        self._config = config
        self._threads = resources.threads
        self._dtype = dtype
        self._first: Header | None = None

    def describe(self, path: str) -> ModelInfo:
        """Read and compare.

        Raises:
            InvalidModel: naming the file and the field.

        """
        if not path:
            raise InvalidModel("path is empty; wanted a Hugging Face model folder")
        header = read_header(Path(path), self._threads)
        name = Path(path).resolve().name
        if self._first is None:
            self._first = header
            name = name if self._config.path else _DEMO_NAME
        require_same_shape(Path(path), header, self._first)
        return ModelInfo(
            name=self._config.name or name,
            hash=model_hash(header.hash, f"torch.{self._dtype}", torch_arithmetic()),
            vocab_size=header.spec.vocab_size,
            context_tokens_max=header.spec.context_tokens_max,
            architecture=header.spec.architecture,
            dtype=self._dtype,
        )


def _cores(cores: tuple[int, ...], rank: int, rank_count: int) -> tuple[int, ...]:
    """Share cores out; where there are fewer than ranks, all ranks share all."""
    if len(cores) < rank_count:
        return cores
    part = split(len(cores), rank_count)[rank]
    return cores[part.start : part.stop]


def _check(config: ModelConfig, speculation: SpeculationConfig) -> None:
    wanted = (
        ("model.backend", config.backend, ("auto", "torch")),
        ("model.weights", config.weights, ("auto",)),
        ("model.device", config.device, ("auto", "cpu")),
        ("speculation.proposer", speculation.proposer, ("naive", "ngram", "suffix")),
    )
    for name, seen, known in wanted:
        if seen not in known:
            raise InvalidConfig(
                f"{name} is {seen!r}; wanted {' or '.join(known)}, as several ranks compute",
                param=name,
            )
