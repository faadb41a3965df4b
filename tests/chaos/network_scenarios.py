"""Faults of the network between hosts: partitions, bad links, resets, blocked ports, late bytes.

Each host is a network namespace of its own.  Faults strike at the switch between them, or in a
host's kernel, and their counters are the proof.
"""

from collections.abc import Callable, Iterable
from typing import cast

from tests.chaos.cluster import Setup
from tests.chaos.framework import Trial, pause, scenario
from tests.chaos.load import LONG, MEDIUM, PROMPTS, SHORT, Ask, Steady
from tests.chaos.netem import Line
from tests.chaos.network import Network, Rule, reason_to_skip
from tests.chaos.network_cluster import START_S, WORKER_PORT, NetworkCluster

P0, P1, D0, D1, ROUTER = "prefill-0", "prefill-1", "decode-0", "decode-1", "router"

HOSTS = Setup("2P+2D on hosts", settings=(("prefill.token_budget", 64),), make=NetworkCluster)
"""The cluster most scenarios here share."""

TIGHT = Setup(
    "1P+1D on hosts",
    prefill_count=1,
    decode_count=1,
    settings=(
        ("decode.kv_blocks", 300),
        ("kv.prefix_cache", "false"),
        ("router.queue_s", 120),  # all of them wait for one slow worker
    ),
    make=NetworkCluster,
)
"""Few decode blocks for many long prompts: what is given back is used again at once."""

LOAD: tuple[Ask, ...] = tuple(
    ask for three in zip(PROMPTS, MEDIUM, SHORT * 2, strict=True) for ask in three
)
CLIENTS = 8
DEAD_S = 3.0  # heartbeat.dead_s and a tick
LINK_S = 3.0  # a silent link of a pair: a ping after 1 s, given up 1.5 s later, and a tick
STALL_S = 3.5  # a dead worker's requests: 3 s, and a prefill
PAIR_STALL_S = LINK_S + 2.0  # a dead pair's: the link, and a prefill on a loaded machine
# TCP moves MSS / RTT * 1.22 / sqrt(loss) (Mathis et al., 1997): 360 kB/s at 40 ms and 1.5 %,
# shared by the hand-offs of eight clients' prompts, of up to 2 MB each.
BAD_LINE_STALL_S = 8.0
BASELINE_S = 10.0  # after healing
NO_LINK = frozenset({"dead", "wedged", "absent"})
HELD_BACK_BYTES = 200_000


def network_of(trial: Trial) -> Network:
    """The network of a trial's cluster."""
    return cast("NetworkCluster", trial.cluster).network


def prove(trial: Trial, rules: Iterable[Rule]) -> None:
    """Let each rule's counter show that it struck."""
    for rule in rules:
        trial.prove(f"{rule.packet_count} packets: {rule.text}", rule.packet_count > 0)


def require_no_false_death(trial: Trial, since_s: float) -> None:
    """Check that the router took no worker for dead: it reached them all the time."""
    for name in cast("NetworkCluster", trial.cluster).names:
        states = NO_LINK & set(trial.watch.left_ready(name, since_s))
        trial.require(f"{name} was never taken for {', '.join(states)}", not states)


async def begin(trial: Trial) -> Steady:
    """Load with long prompts and long outputs until it is stopped; returns once tokens flow."""
    steady = Steady(trial.client, LOAD, CLIENTS)
    await trial.cluster.await_true(
        "tokens flow", lambda: sum(len(one.token_ids) > 3 for one in steady.answers) > CLIENTS
    )
    return steady


async def end(trial: Trial, steady: Steady, stall_s: float) -> None:
    """Heal, end the load, measure: the longest stall, and the time until nothing is held."""
    network_of(trial).heal()
    trial.fault()
    answers = await steady.stop()
    trial.measure_stall(answers, stall_s)
    slowest_s = max(answer.first_token_s for answer in answers)
    trial.note(f"{len(answers)} requests, slowest first token {slowest_s:.2f} s")
    took_s = await trial.cluster.await_ready() + await trial.cluster.await_baseline()
    trial.bound("ready and at baseline after the load", took_s, BASELINE_S)


async def hurt_pair(trial: Trial, hurt: Callable[[Network], Iterable[Rule]], last_s: float) -> None:
    """Hurt a link between two workers under load, for a while."""
    steady = await begin(trial)
    began_s = trial.fault()
    rules = list(hurt(network_of(trial)))
    await pause(last_s)
    prove(trial, rules)
    await end(trial, steady, PAIR_STALL_S)
    require_no_false_death(trial, began_s)


# Prefill to decode.


@scenario(
    "net-pair-partition",
    ids="L1, N2",
    what="P0 and D0 do not reach each other for 8 s; the router reaches both",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def pair_partition(trial: Trial) -> None:
    await hurt_pair(trial, lambda network: network.cut(P0, D0), 8.0)


@scenario(
    "net-pair-forth-lost",
    ids="L2",
    what="for 8 s nothing of P0 reaches D0; the other direction works",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def pair_forth_lost(trial: Trial) -> None:
    await hurt_pair(trial, lambda network: [network.drop(P0, D0)], 8.0)


@scenario(
    "net-pair-back-lost",
    ids="L2",
    what="for 8 s nothing of D0 reaches P0; the other direction works",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def pair_back_lost(trial: Trial) -> None:
    await hurt_pair(trial, lambda network: [network.drop(D0, P0)], 8.0)


@scenario(
    "net-bad-line",
    ids="L3",
    what="P0-D0 and P0-D1 with 20+-5 ms, 1.5 % loss, 1 % doubled, reordered, for 8 s",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def bad_line(trial: Trial) -> None:
    network = network_of(trial)
    steady = await begin(trial)
    began_s = trial.fault()
    for seed, decode in enumerate((D0, D1)):
        line = Line(delay_s=0.02, jitter_s=0.005, loss=0.015, double=0.01, seed=seed)
        network.degrade(P0, decode, line)
    await pause(8.0)
    counts = network.heal()
    shown = f"{counts.taken} packets taken"
    trial.prove(f"{shown}, {counts.lost} lost", counts.lost > 0)
    trial.prove(f"{shown}, {counts.doubled} doubled", counts.doubled > 0)
    trial.prove(f"{shown}, {counts.overtaken} overtaken", counts.overtaken > 0)
    await end(trial, steady, BAD_LINE_STALL_S)
    require_no_false_death(trial, began_s)


@scenario(
    "net-slow-line",
    ids="L4",
    what="P0 to D0 at 16 Mbit/s for 8 s",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def slow_line(trial: Trial) -> None:
    network = network_of(trial)
    steady = await begin(trial)
    began_s = trial.fault()
    network.limit(P0, D0, "16mbit")
    await pause(8.0)
    passed_bytes = network.limited_bytes(D0)
    trial.prove(f"{passed_bytes} bytes through the limit", passed_bytes > 100_000)
    await end(trial, steady, PAIR_STALL_S)
    require_no_false_death(trial, began_s)


@scenario(
    "net-reset-storm",
    ids="L6",
    what="P0-D0: 5 times, resets for all that passes and all connections destroyed",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def reset_storm(trial: Trial) -> None:
    network = network_of(trial)
    steady = await begin(trial)
    began_s = trial.fault()
    rules: list[Rule] = []
    killed_count = 0
    for _ in range(5):
        pulse = [network.reset(P0, D0), network.reset(D0, P0)]
        await pause(0.3)
        for rule in pulse:
            rule.remove()
        rules += pulse
        await pause(0.4)
        killed_count += network[P0].kill_sockets_to(network[D0])
    packet_count = sum(rule.packet_count for rule in rules)
    trial.prove(f"{packet_count} packets answered with a reset", packet_count > 0)
    trial.prove(f"{killed_count} connections destroyed", killed_count > 0)
    await end(trial, steady, STALL_S)
    require_no_false_death(trial, began_s)


@scenario(
    "net-idle-death",
    ids="L8",
    what="while idle, the connections of P0 and P1 to D0 and D1 die without a word",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def idle_death(trial: Trial) -> None:
    network = network_of(trial)
    trial.fault()
    rules = [
        rule
        for prefill in (P0, P1)
        for decode in (D0, D1)
        for rule in drop_connections(network, prefill, decode)
    ]
    await pause(1.0)  # less than anybody needs to notice
    answers = trial.client.start_all(LOAD)
    await trial.client.wait(answers)
    dropped_count = sum(rule.packet_count for rule in rules)
    trial.prove(f"{dropped_count} packets of {len(rules)} flows dropped", dropped_count > 0)
    trial.measure_stall(answers, PAIR_STALL_S)
    network.heal()
    trial.fault()


def drop_connections(network: Network, one: str, other: str) -> list[Rule]:
    """Drop what the connections of now carry, both ways; new ones pass."""
    rules = []
    for near, far in network[one].ports_to(network[other]):
        rules.append(network.drop(one, other, f"tcp sport {near} tcp dport {far}"))
        rules.append(network.drop(other, one, f"tcp sport {far} tcp dport {near}"))
    return rules


@scenario(
    "net-data-blocked",
    ids="N4",
    what="P0-D0: gRPC passes, the data plane's connections do not, for 12 s",
    setup=HOSTS,
    skip=reason_to_skip,
    limit_s=90.0,
)
async def data_blocked(trial: Trial) -> None:
    other = f"meta l4proto tcp tcp sport != {WORKER_PORT} tcp dport != {WORKER_PORT}"
    await hurt_pair(trial, lambda network: network.cut(P0, D0, other), 12.0)


@scenario(
    "net-syn-blackhole",
    ids="N9",
    what="P0-D0: connections destroyed and none can be made for 8 s",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def syn_blackhole(trial: Trial) -> None:
    def hurt(network: Network) -> list[Rule]:
        rules = network.cut(P0, D0, "tcp flags & (syn | ack) == syn")
        count = network[D0].kill_sockets_to(network[P0])
        trial.prove(f"{count} connections destroyed", count > 0)
        return rules[1:]  # the decode worker dials; the other way is not used each time

    await hurt_pair(trial, hurt, 8.0)


# Router to worker.


async def cut_off(trial: Trial, name: str) -> None:
    """Part the router from a worker under load, and heal it."""
    network = network_of(trial)
    steady = await begin(trial)
    known = len(trial.cluster.log_text(name))
    began_s = trial.fault()
    rules = network.cut(ROUTER, name)
    await trial.detect(name, began_s, DEAD_S, "a partition")

    def has_let_go() -> bool:
        return " is gone" in trial.cluster.log_text(name)[known:]

    waited_s = await trial.cluster.await_true(f"{name} notices", has_let_go)
    trial.bound(
        f"{name} notices that the router is gone", waited_s + (trial.detection_s or 0), LINK_S
    )
    prove(trial, rules)
    await end(trial, steady, STALL_S)


@scenario(
    "net-router-prefill",
    ids="N1",
    what="the router and P0 do not reach each other until both have noticed",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def router_prefill(trial: Trial) -> None:
    await cut_off(trial, P0)


@scenario(
    "net-router-decode",
    ids="N1",
    what="the router and D0 do not reach each other until both have noticed",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def router_decode(trial: Trial) -> None:
    await cut_off(trial, D0)


@scenario(
    "net-flapping",
    ids="N3",
    what="D0's whole network: 1 s off, 1 s on, 5 times",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def flapping(trial: Trial) -> None:
    network = network_of(trial)
    steady = await begin(trial)
    rules: list[Rule] = []
    for _ in range(5):
        trial.fault()
        now = [rule for name in (ROUTER, P0, P1) for rule in network.cut(name, D0)]
        await pause(1.0)
        for rule in now:
            rule.remove()
        rules += now
        await pause(1.0)
    dropped_count = sum(rule.packet_count for rule in rules)
    trial.prove(f"{dropped_count} packets dropped", dropped_count > 0)
    await end(trial, steady, PAIR_STALL_S)


# Late bytes.


async def hold_bytes_back(trial: Trial) -> list[Rule]:
    """Part P0 and D0 at a moment when P0's kernel holds many bytes that D0 has not got."""
    network = network_of(trial)
    network.limit(P0, D0, "12mbit")
    trial.client.start_all(PROMPTS)

    def is_held() -> bool:
        return network[P0].unsent_bytes(network[D0]) > HELD_BACK_BYTES

    while True:
        await trial.cluster.await_true("the sender's kernel holds bytes back", is_held)
        trial.fault()
        rules = network.cut(P0, D0)
        if is_held():  # still, now that nothing passes any more
            break
        for rule in rules:
            rule.remove()
    held_bytes = network[P0].unsent_bytes(network[D0])
    trial.prove(f"{held_bytes} bytes of KV in the sender's kernel", held_bytes > HELD_BACK_BYTES)
    return rules


async def reuse_blocks(trial: Trial, rules: Iterable[Rule]) -> None:
    """Let the two meet again, on the slow line, and keep every block in use for a while."""
    for rule in rules:
        rule.remove()
    prove(trial, rules)
    trial.fault()
    trial.client.start_all(MEDIUM + LONG[:4])
    await pause(3.0)  # what was held back would arrive in this time
    network_of(trial).heal()
    await trial.client.wait(trial.client.answers)
    trial.measure_stall(trial.client.answers)
    took_s = await trial.cluster.await_baseline()
    trial.bound("at baseline after the load", took_s, BASELINE_S)


@scenario(
    "net-late-bytes",
    ids="L7",
    what="P0 and D0 part in mid-transfer until both gave up, then meet again; blocks are scarce",
    setup=TIGHT,
    skip=reason_to_skip,
    limit_s=120.0,
)
async def late_bytes(trial: Trial) -> None:
    """What the sender's kernel held must not land in blocks that have another owner by then."""
    rules = await hold_bytes_back(trial)
    await pause(8.0)
    await reuse_blocks(trial, rules)


@scenario(
    "net-late-bytes-death",
    ids="L7, P11",
    what="P0 and D0 part in mid-transfer, P0 is killed and started again, then they meet again",
    setup=TIGHT,
    skip=reason_to_skip,
    limit_s=180.0,
)
async def late_bytes_of_the_dead(trial: Trial) -> None:
    """A new incarnation at the address proves the death; the dead one's bytes must be gone."""
    cluster = cast("NetworkCluster", trial.cluster)
    rules = await hold_bytes_back(trial)
    await trial.kill(P0)
    cluster.start(P0)
    await cluster.await_ready(START_S)
    await reuse_blocks(trial, rules)


# The control.


@scenario(
    "net-control-no-target",
    ids="-",
    what="a partition of two hosts that never talk: its counters must not move",
    setup=HOSTS,
    is_control=True,
    skip=reason_to_skip,
)
async def control(trial: Trial) -> None:
    rules = network_of(trial).cut(P0, P1)
    trial.fault()
    await trial.client.wait(trial.client.start_all(SHORT + MEDIUM))
    prove(trial, rules)
    network_of(trial).heal()
