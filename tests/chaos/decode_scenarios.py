"""Decode workers die at every token, stop, hang, and run out of room."""

from tests.chaos.cluster import Setup
from tests.chaos.framework import Trial, is_running, pause, scenario
from tests.chaos.load import LONG, MEDIUM, MIXED, PROMPTS, Ask, End

STALL_S = 3.5  # 3 s until a worker is given up, and a prefill
SILENCE_S = 3.0  # heartbeat.dead_s and a tick

TIGHT = Setup(
    "tight pools",
    settings=(
        ("prefill.token_budget", 64),
        ("prefill.kv_blocks", 90),
        ("decode.kv_blocks", 90),
        ("decode.growth_tokens", 16),
    ),
)
"""Each pool holds one and a half of the longest requests."""


@scenario("decode-kill-before-kv", ids="D1", what="SIGKILL before any KV has arrived")
async def kill_before_kv(trial: Trial) -> None:
    answers = trial.client.start_all(PROMPTS * 2)
    name = await trial.cluster.busy("decode", "reserved")
    await trial.kill(name)
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


@scenario("decode-kill-middle", ids="D2", what="SIGKILL with streams in mid-flow")
async def kill_middle(trial: Trial) -> None:
    answers = await trial.begin(LONG, tokens=50)
    await trial.kill(trial.cluster.victim("decode"))
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


@scenario("decode-kill-loaded", ids="D2", what="SIGKILL with 40 streams, prefill busy too")
async def kill_loaded(trial: Trial) -> None:
    answers = await trial.begin(MIXED + LONG, tokens=20)
    await trial.kill(trial.cluster.victim("decode"))
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


@scenario(
    "decode-kill-at-token", ids="D2", what="die at tokens 0, 1, middle and last but one", limit_s=90
)
async def kill_at_token(trial: Trial) -> None:
    ask = MEDIUM[0]
    last = ask.output_tokens - 3  # settles before the last but one: token 0 is prefill's
    for point, skip in (
        ("decode.reserve", 0),
        ("decode.settle", 0),
        ("decode.settle", ask.output_tokens // 2),
        ("decode.settle", last),
    ):
        name = trial.cluster.victim("decode")
        pid = trial.cluster.pid(name)
        await trial.failpoint(name, f"{point}=skip({skip}),1*kill")
        while not trial.has_fired(name, point):
            # One stream at a time, so that the pass counted is its token.
            answer = await trial.client.ask(ask)
            trial.measure_stall([answer], STALL_S)
        await trial.fired((name, point))
        trial.prove(f"{name} pid {pid} is gone", not is_running(pid))
        await trial.cluster.await_ready()


@scenario(
    "decode-kill-before-terminal", ids="D3", what="die with the last token computed and not said"
)
async def kill_before_terminal(trial: Trial) -> None:
    name = trial.cluster.victim("decode")
    pid = trial.cluster.pid(name)
    await trial.failpoint(name, "decode.before_terminal=skip(2),1*kill")
    answers = trial.client.start_all(MIXED)
    await trial.fired((name, "decode.before_terminal"))
    await trial.cluster.await_true(f"{name} is gone", lambda: not is_running(pid))
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


@scenario("decode-stop-2s", ids="D4", what="SIGSTOP for 2 s, then SIGCONT")
async def stop_short(trial: Trial) -> None:
    answers = await trial.begin(MIXED, tokens=20)
    name = trial.cluster.victim("decode")
    await trial.stop(name)
    await pause(2.0)
    trial.wake(name)
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


@scenario(
    "decode-stop-4s",
    ids="D4",
    what="SIGSTOP until just given up, then SIGCONT: its frames come late, on the same link",
)
async def stop_until_dead(trial: Trial) -> None:
    before = await dropped_count(trial)
    await stop_and_resume(trial, MIXED + LONG, 0.4)
    trial.note(f"{await dropped_count(trial) - before} stale frames dropped by the router")


@scenario(
    "decode-stop-6s",
    ids="D4 D5 T3",
    what="SIGSTOP until its link is given up too: resumed elsewhere, back under a new link",
)
async def stop_long(trial: Trial) -> None:
    # As many as one decode worker has slots for: nobody has to wait for a slot besides.
    await stop_and_resume(trial, MEDIUM + LONG, 3.0)


async def stop_and_resume(trial: Trial, asks: tuple[Ask, ...], longer_s: float) -> None:
    """Stop a worker until it is taken for dead and a while longer."""
    answers = await trial.begin(asks, tokens=20)
    name = trial.cluster.victim("decode")
    began_s = await trial.stop(name)
    await trial.detect(name, began_s, SILENCE_S, "SIGSTOP")
    await pause(longer_s)
    trial.wake(name)
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


async def dropped_count(trial: Trial) -> int:
    """Messages of workers that the router has refused so far."""
    return int(sum((await trial.cluster.audit())["dropped"].values()))


@scenario("decode-wedged", ids="P6 D4", what="its event loop blocks for 5 s, its RPC threads live")
async def wedged(trial: Trial) -> None:
    name = trial.cluster.victim("decode")
    answers = await trial.begin(MIXED, tokens=20)
    await trial.failpoint(name, "decode.before_schedule=1*block(5)")
    await trial.fired((name, "decode.before_schedule"))
    await trial.detect(name, trial.fault(), SILENCE_S, "a wedged loop")
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


@scenario(
    "all-decode-dead", ids="X4 A7", what="SIGKILL every decode worker: 503, then service again"
)
async def all_dead(trial: Trial) -> None:
    trial.allow(End.REFUSED, "no_decode_workers", "unavailable", "no_matching_workers")
    answers = await trial.begin(LONG)
    began_s = trial.fault()
    for name in ("decode-0", "decode-1"):
        await trial.kill(name)

    async def refused() -> bool:
        return (await trial.client.ask(MEDIUM[0])).end is End.REFUSED

    took_s = await trial.cluster.await_true("new requests are refused", refused, 5)
    trial.bound("refusal of new requests", took_s, 3.0)
    trial.note(f"readyz {(await trial.cluster.get('/readyz')).status_code} while none lives")
    await trial.cluster.await_ready()
    trial.note(f"workers back after {trial.watch.now_s() - began_s:.1f} s")
    await trial.client.wait(answers)
    trial.measure_stall(answers)


@scenario(
    "pair-killed", ids="X5", what="SIGKILL the prefill and the decode worker of a request together"
)
async def pair_killed(trial: Trial) -> None:
    answers = trial.client.start_all(PROMPTS + LONG)
    await trial.cluster.busy("prefill", "running")
    row = (await trial.cluster.requests())[0]
    names = [str(row[key] or trial.cluster.victim(role)) for key, role in
             (("prefill_worker", "prefill"), ("decode_worker", "decode"))]  # fmt: skip
    for name in names:
        await trial.kill(name)
    await trial.client.wait(answers)
    trial.measure_stall(answers, STALL_S)


@scenario(
    "kv-exhausted",
    ids="P10 D6",
    what="pools of 1.5 requests, 48 long ones: queueing, preemption, no deadlock",
    setup=TIGHT,
    limit_s=120,
)
async def exhausted(trial: Trial) -> None:
    trial.allow(End.REFUSED, "queue_full", "queue_timeout")
    before = await trial.cluster.metric("pd_resumes_total", cause="preempted")
    trial.fault()
    answers = trial.client.start_all(MIXED + LONG + LONG)
    least = 1 << 30

    async def is_over() -> bool:
        nonlocal least
        for row in (await trial.cluster.workers()).values():
            if row["role"] == "decode":
                least = min(least, row["blocks"]["free"] + row["blocks"]["cached"])
        return all(answer.end is not End.RUNNING for answer in answers)

    await trial.cluster.await_true("all streams ended", is_over, 110)
    preempted = await trial.cluster.metric("pd_resumes_total", cause="preempted") - before
    trial.prove(f"{preempted:.0f} preemptions", preempted > 0)
    trial.prove(f"a decode pool had {least} of 90 blocks left", least < 10)
    trial.measure_stall(answers)
