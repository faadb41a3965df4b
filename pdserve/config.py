"""Every setting of a cluster: one TOML schema, one loader, one reference.

A section is a small frozen dataclass; a setting is a field made by ``setting`` with its
default, unit, range and meaning.  Each consumer is handed its own section, never the whole.
docs/configuration.md is generated from here.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pdserve.errors import InvalidConfig

_CORES_MAX = 4096


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare one setting of a section."""
    return dataclasses.field(
        default=default,
        metadata={"meaning": meaning, "unit": unit, "low": low, "high": high, "choices": choices},
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model is served."""

    path: str = setting("", "Hugging Face model folder; empty serves the bundled demo model")
    name: str = setting("", "Name under /v1/models; empty takes the folder's name")
    dtype: str = setting(
        "auto",
        "Arithmetic and weights; auto is float32 on the CPU, bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16"),
    )
    weights: str = setting(
        "auto",
        "What the linear layers' weights are kept as; auto is dtype",
        choices=("auto", "int8"),
    )
    device: str = setting(
        "auto", "auto takes CUDA where there is a GPU", choices=("auto", "cpu", "cuda")
    )
    backend: str = setting(
        "auto",
        "Kernels on the CPU; auto takes the native ones where a C compiler is at hand",
        choices=("auto", "torch", "native"),
    )


@dataclass(frozen=True, slots=True)
class KvConfig:
    """The KV cache, equal on all workers of a cluster."""

    block_tokens: int = setting(16, "Tokens of one block", unit="tokens", low=1, high=1024)
    checksum: bool = setting(False, "Checksum every hand-off's bytes on both sides")
    prefix_cache: bool = setting(True, "Keep computed blocks for requests with the same prefix")


def core_list(text: str, name: str) -> tuple[int, ...]:
    """Read cores written as ``0,2-3``.

    Raises:
        InvalidConfig: naming the setting ``name``.

    """
    cores: list[int] = []
    for part in filter(None, text.split(",")):
        low, dash, high = part.partition("-")
        first, last = low.strip(), high.strip() if dash else low.strip()
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < _CORES_MAX):
            raise InvalidConfig(f"{name} is {text!r}; wanted cores like 0,2-3", param=name)
        cores += range(int(first), int(last) + 1)
    if len(set(cores)) != len(cores):
        raise InvalidConfig(f"{name} is {text!r}; wanted each core once", param=name)
    return tuple(cores)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """One prefill worker."""

    worker_count: int = setting(1, "Workers the local launcher starts", low=1, high=256)
    sequences_max: int = setting(16, "Requests admitted at once", low=1, high=4096)
    kv_blocks: int = setting(0, "KV blocks; 0 derives them from kv_bytes", low=0, high=1 << 24)
    kv_bytes: int = setting(
        64 << 20,
        "KV pool size of one rank where kv_blocks is 0",
        unit="bytes",
        low=1 << 16,
        high=1 << 44,
    )
    token_budget: int = setting(512, "Tokens of one step", unit="tokens", low=1, high=1 << 20)
    step_depth: int = setting(2, "Steps in flight", low=1, high=16)
    inbox_max: int = setting(256, "Requests waiting for admission", low=1, high=1 << 16)
    credits: int = setting(
        8, "Requests computed ahead of their destination, per decode worker", low=1, high=4096
    )
    handoff_s: float = setting(
        30.0,
        "From the first token until the hand-off must have ended",
        unit="s",
        low=0.1,
        high=3600,
    )
    drain_s: float = setting(
        5.0, "After SIGTERM, time for requests to end here", unit="s", low=0, high=3600
    )
    threads: int = setting(1, "Compute threads of one rank", low=1, high=1024)
    cpus: str = setting(
        "", "Cores this role's workers are pinned to, shared out among them, as 0,2-3; empty: none"
    )
    tp: int = setting(1, "Tensor parallel ranks", low=1, high=64)
    pp: int = setting(1, "Pipeline stages", low=1, high=64)

    def __post_init__(self) -> None:
        core_list(self.cpus, "prefill.cpus")


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """One decode worker."""

    worker_count: int = setting(1, "Workers the local launcher starts", low=1, high=256)
    sequences_max: int = setting(16, "Requests reserved or running at once", low=1, high=4096)
    kv_blocks: int = setting(0, "KV blocks; 0 derives them from kv_bytes", low=0, high=1 << 24)
    kv_bytes: int = setting(
        64 << 20,
        "KV pool size of one rank where kv_blocks is 0",
        unit="bytes",
        low=1 << 16,
        high=1 << 44,
    )
    step_depth: int = setting(2, "Steps in flight", low=1, high=16)
    inbox_max: int = setting(256, "Reservations waiting for blocks", low=1, high=1 << 16)
    growth_tokens: int = setting(
        64, "Room reserved for output at reservation", unit="tokens", low=1, high=1 << 20
    )
    reserve_s: float = setting(
        5.0, "Longest wait of a reservation for blocks", unit="s", low=0.01, high=600
    )
    landing_s: float = setting(
        60.0, "From reservation until the KV must have landed", unit="s", low=0.1, high=3600
    )
    drain_s: float = setting(
        5.0, "After SIGTERM, time for requests to end here", unit="s", low=0, high=3600
    )
    threads: int = setting(1, "Compute threads of one rank", low=1, high=1024)
    cpus: str = setting(
        "", "Cores this role's workers are pinned to, shared out among them, as 0,2-3; empty: none"
    )
    tp: int = setting(1, "Tensor parallel ranks", low=1, high=64)
    pp: int = setting(1, "Pipeline stages", low=1, high=64)

    def __post_init__(self) -> None:
        core_list(self.cpus, "decode.cpus")


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Guessing several tokens and checking them in one step, on decode workers."""

    proposer: str = setting(
        "naive",
        "Who guesses: naive nobody, ngram and suffix the text so far, draft a smaller model",
        choices=("naive", "ngram", "suffix", "draft"),
    )
    draft_tokens: int = setting(4, "Guesses per step", unit="tokens", low=1, high=32)
    draft_path: str = setting("", "Model folder of the draft model")
    match_tokens_max: int = setting(
        4, "Longest match that ngram looks for first", unit="tokens", low=1, high=64
    )


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The router."""

    host: str = setting("127.0.0.1", "Address of the REST listener")
    port: int = setting(8000, "Port of the REST listener; 0 picks one", low=0, high=65535)
    admin_host: str = setting("127.0.0.1", "Address of the admin listener")
    admin_port: int = setting(8001, "Port of the admin listener; 0 picks one", low=0, high=65535)
    grpc_host: str = setting("127.0.0.1", "Address workers register at")
    grpc_port: int = setting(8002, "Port workers register at; 0 picks one", low=0, high=65535)
    placement: str = setting(
        "least_load", "How workers are chosen", choices=("least_load", "round_robin")
    )
    inflight_max: int = setting(256, "Requests dispatched at once", low=1, high=1 << 16)
    queue_max: int = setting(512, "Requests waiting for dispatch", low=1, high=1 << 16)
    queue_s: float = setting(30.0, "Longest wait for dispatch", unit="s", low=0.01, high=3600)
    request_s: float = setting(600.0, "Longest life of a request", unit="s", low=0.1, high=86400)
    first_token_s: float = setting(
        60.0, "From dispatch to the first token of an attempt", unit="s", low=0.1, high=3600
    )
    stall_s: float = setting(
        30.0, "Silence of a dispatched request before it is resumed", unit="s", low=0.1, high=3600
    )
    attempts_max: int = setting(6, "Attempts at one request, resumes included", low=1, high=100)
    pause_s: float = setting(
        30.0, "Wait for idle when pausing before it is forced", unit="s", low=0.1, high=3600
    )
    drain_s: float = setting(
        5.0, "After SIGTERM, time for requests to end by themselves", unit="s", low=0, high=3600
    )
    body_bytes_max: int = setting(
        8 << 20, "Longest request body", unit="bytes", low=1024, high=1 << 30
    )
    client_stall_s: float = setting(
        30.0, "A client that reads nothing for so long is cut off", unit="s", low=1, high=3600
    )
    idempotency_s: float = setting(
        60.0, "How long an answer is kept for its Idempotency-Key", unit="s", low=0, high=3600
    )
    idempotency_max: int = setting(
        1024, "Answers kept for their Idempotency-Key", low=0, high=1 << 20
    )


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """The KV data plane."""

    backend: str = setting(
        "auto",
        "auto takes ucx-py where it is installed, else the libucp binding",
        choices=("auto", "ucx", "ucx-py"),
    )
    library: str = setting("", "Path of a site's own libucp.so; empty takes the installed wheel's")
    tls: str = setting("tcp,cma", "UCX transports")
    net_devices: str = setting("lo", "UCX network devices; the private interface in production")
    keepalive_s: float = setting(2.0, "UCX keepalive interval", unit="s", low=0.1, high=600)
    push_s: float = setting(
        10.0, "Longest time for one layer's push to complete", unit="s", low=0.1, high=3600
    )
    destinations_max: int = setting(
        4096,
        "Destinations kept for requests that are not submitted yet",
        low=1,
        high=1 << 20,
    )
    tombstone_s: float = setting(
        60.0, "How long an ended key is remembered", unit="s", low=1, high=3600
    )
    tombstones_max: int = setting(65536, "Ended keys remembered", low=1, high=1 << 24)


@dataclass(frozen=True, slots=True)
class HeartbeatConfig:
    """How workers are watched."""

    interval_s: float = setting(0.5, "Between two heartbeats", unit="s", low=0.01, high=60)
    suspect_s: float = setting(
        1.25, "Silence after which a worker gets no new requests", unit="s", low=0.05, high=600
    )
    dead_s: float = setting(
        2.5, "Silence after which its requests are resumed elsewhere", unit="s", low=0.1, high=3600
    )
    step_s: float = setting(
        30.0, "Longest step before its worker counts as wedged", unit="s", low=0.1, high=3600
    )


@dataclass(frozen=True, slots=True)
class LeaseConfig:
    """Requests whose client or router is gone, but may come back."""

    router_s: float = setting(
        5.0, "Workers keep requests whose router is gone", unit="s", low=0, high=600
    )
    client_s: float = setting(
        5.0,
        "The router keeps a request with an Idempotency-Key whose client is gone",
        unit="s",
        low=0,
        high=600,
    )


@dataclass(frozen=True, slots=True)
class HistoryConfig:
    """The event history, for finding out what happened."""

    path: str = setting("", "Folder in which each process writes its events; empty writes none")


@dataclass(frozen=True, slots=True)
class TestConfig:
    """Faults on purpose; never in production."""

    enabled: bool = setting(False, "Allow failpoints; such workers join only such a router")
    failpoints: str = setting("", "Failpoints set from the start; see docs/failpoints.md")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A whole cluster: one table of cluster.toml per field."""

    model: ModelConfig = ModelConfig()
    kv: KvConfig = KvConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    router: RouterConfig = RouterConfig()
    transfer: TransferConfig = TransferConfig()
    heartbeat: HeartbeatConfig = HeartbeatConfig()
    lease: LeaseConfig = LeaseConfig()
    history: HistoryConfig = HistoryConfig()
    test: TestConfig = TestConfig()

    def __post_init__(self) -> None:
        if self.test.failpoints and not self.test.enabled:
            raise InvalidConfig(
                f"test.failpoints is {self.test.failpoints!r}, but test.enabled is false; "
                "failpoints are for tests only"
            )
        beat = self.heartbeat
        if not beat.interval_s < beat.suspect_s <= beat.dead_s:
            raise InvalidConfig(
                f"heartbeat: wanted interval_s < suspect_s <= dead_s, saw {beat.interval_s}, "
                f"{beat.suspect_s}, {beat.dead_s}"
            )

    @property
    def worker_model(self) -> ModelConfig:
        """The model as all workers load it: one arithmetic, so that they pair.

        Ranks compute with torch; so does everybody else where one role has ranks.
        """
        has_ranks = any(own.tp * own.pp > 1 for own in (self.prefill, self.decode))
        if has_ranks and self.model.backend == "auto":
            return dataclasses.replace(self.model, backend="torch")
        return self.model


def load(path: Path | None, overrides: Mapping[str, object] | None = None) -> ClusterConfig:
    """Read cluster.toml (or only defaults) with ``overrides`` like ``{"router.port": 80}`` on top.

    Raises:
        InvalidConfig: unreadable file, unknown key, wrong type, out of range.

    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text())
        except OSError as error:
            raise InvalidConfig(f"{path}: {error.strerror}; wanted a cluster.toml") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{path}: not TOML: {error}") from None
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        table = tables.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    return _build(ClusterConfig, tables)


def dump(config: ClusterConfig) -> str:
    """Write a configuration as TOML that ``load`` reads back to an equal one."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        table = getattr(config, section.name)
        lines += [
            f"{field.name} = {_toml(getattr(table, field.name))}"
            for field in dataclasses.fields(table)
        ]
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def _build(cls: type[ClusterConfig], tables: Mapping[str, Any]) -> ClusterConfig:
    sections = {field.name: field.type for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    built: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in sections:
            raise InvalidConfig(f"[{name}] is no table of cluster.toml{_nearest(name, sections)}")
        if not isinstance(table, dict):
            raise InvalidConfig(f"{name} is {table!r}; wanted a table [{name}]")
        built[name] = _section(hints[name], name, table)
    return cls(**built)


def _section(cls: type[Any], section: str, table: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key in table:
        if key not in fields:
            raise InvalidConfig(f"{section}.{key} is no setting{_nearest(key, fields)}")
    values = {
        key: _value(f"{section}.{key}", value, hints[key], fields[key].metadata)
        for key, value in table.items()
    }
    return cls(**values)


def _value(name: str, value: object, wanted: type[Any], meta: Mapping[str, Any]) -> object:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise InvalidConfig(f"{name} is {value!r}; wanted {_kind(wanted)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = meta["low"], meta["high"]
        # Written so that NaN fails too.
        if not ((low is None or value >= low) and (high is None or value <= high)):
            raise InvalidConfig(f"{name} is {value!r}; wanted {low} to {high}")
    if meta["choices"] and value not in meta["choices"]:
        raise InvalidConfig(f"{name} is {value!r}; wanted one of {', '.join(meta['choices'])}")
    return value


def _kind(wanted: type[Any]) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return kinds[wanted]


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def reference() -> str:
    """Render every setting as Markdown tables, for docs/configuration.md."""
    lines = [
        "# Configuration reference",
        "",
        "Generated by `make docs` from pdserve/config.py.",
        "",
    ]
    hints = get_type_hints(ClusterConfig)
    for section in dataclasses.fields(ClusterConfig):
        cls = hints[section.name]
        lines += [f"## [{section.name}]", "", (cls.__doc__ or "").strip(), ""]
        lines += ["| setting | default | unit | range | meaning |", "|---|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            meta = field.metadata
            span = ", ".join(meta["choices"])
            if meta["low"] is not None:
                span = f"{meta['low']} to {meta['high']}"
            default = _toml(field.default)
            lines.append(
                f"| `{field.name}` | `{default}` | {meta['unit']} | {span} | {meta['meaning']} |"
            )
        lines.append("")
    return "\n".join(lines)
