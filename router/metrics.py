"""Every metric of the router: name, unit and buckets in one table."""

from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_LATENCY_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Gauges(Protocol):
    """What is read when somebody scrapes, so that no gauge can drift from the truth (V7)."""

    @property
    def queue_depth(self) -> int:
        """Requests waiting for workers."""
        ...

    @property
    def inflight_count(self) -> int:
        """Requests at workers."""
        ...

    @property
    def emitted_count(self) -> int:
        """Tokens handed to users so far."""
        ...

    @property
    def dropped_counts(self) -> Mapping[str, int]:
        """Messages refused so far, by cause."""
        ...

    def worker_states(self) -> Mapping[tuple[str, str], int]:
        """Workers by (role, state)."""
        ...


class RouterMetrics:
    """The router's counters and histograms, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pd_requests", "Requests ended, by outcome", ["outcome"], registry=self.registry
        )
        self.refusals = Counter(
            "pd_refusals", "Requests not let in, by reason", ["reason"], registry=self.registry
        )
        self.resumes = Counter(
            "pd_resumes",
            "Attempts given up and continued, by cause",
            ["cause"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "pd_ttft_seconds",
            "From arrival to the first token",
            buckets=_TTFT_S,
            registry=self.registry,
        )
        self.tpot = Histogram(
            "pd_tpot_seconds",
            "Mean time between a request's tokens",
            buckets=_TPOT_S,
            registry=self.registry,
        )
        self.latency = Histogram(
            "pd_request_seconds",
            "From arrival to the end",
            buckets=_LATENCY_S,
            registry=self.registry,
        )

    def watch(self, gauges: Gauges) -> None:
        """Export what ``gauges`` says whenever somebody scrapes."""
        self.registry.register(_Scrape(gauges))


class _Scrape:
    """Reads the gauges at scrape time."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        gauges = self._gauges
        yield GaugeMetricFamily(
            "pd_queue_depth", "Requests waiting for workers", value=gauges.queue_depth
        )
        yield GaugeMetricFamily("pd_inflight", "Requests at workers", value=gauges.inflight_count)
        yield CounterMetricFamily(
            "pd_output_tokens", "Tokens handed to users", value=gauges.emitted_count
        )
        dropped = CounterMetricFamily(
            "pd_dropped_messages", "Messages of workers refused, by cause", labels=["cause"]
        )
        for cause, count in sorted(gauges.dropped_counts.items()):
            dropped.add_metric([cause], count)
        yield dropped
        workers = GaugeMetricFamily(
            "pd_workers", "Workers by role and state", labels=["role", "state"]
        )
        for (role, state), count in sorted(Tally(gauges.worker_states()).items()):
            workers.add_metric([role, state], count)
        yield workers
