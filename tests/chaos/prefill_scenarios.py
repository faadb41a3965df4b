"""Prefill workers die at every stage, stop, hang, and fail single requests."""

from tests.chaos.cluster import Setup
from tests.chaos.framework import Trial, is_running, pause, scenario
from tests.chaos.load import LONG, MEDIUM, MIXED, PROMPTS, SHORT, End

SILENCE_S = 3.0  # heartbeat.dead_s and a tick

HASTY = Setup(
    "short patience",
    settings=(
        ("prefill.token_budget", 64),
        ("prefill.handoff_s", 4),
        ("decode.landing_s", 4),
        ("router.first_token_s", 6),
        ("router.stall_s", 4),
    ),
)
"""A lost message is found by a deadline alone; the usual ones would take a minute."""


@scenario(
    "prefill-kill-before-schedule", ids="P1", what="die on taking a submit, before its first step"
)
async def kill_before_schedule(trial: Trial) -> None:
    await die_at(trial, "prefill.submit", "1*kill")


@scenario("prefill-kill-mid-prefill", ids="P2", what="SIGKILL while prompts are being computed")
async def kill_mid_prefill(trial: Trial) -> None:
    answers = trial.client.start_all(PROMPTS + LONG)
    name = await trial.cluster.busy("prefill", "running")
    await trial.kill(name)
    await trial.client.wait(answers)
    trial.measure_stall(answers)


@scenario("prefill-kill-first-layer", ids="P3", what="die at a request's first layer push")
async def kill_first_layer(trial: Trial) -> None:
    await die_at(trial, "kv.push", "1*kill")


@scenario("prefill-kill-mid-transfer", ids="P3", what="die at the tenth layer push")
async def kill_mid_transfer(trial: Trial) -> None:
    await die_at(trial, "kv.push", "skip(9),1*kill")


@scenario(
    "prefill-kill-before-landed", ids="P4", what="die with all KV written and nothing said of it"
)
async def kill_before_landed(trial: Trial) -> None:
    await die_at(trial, "kv.landed", "skip(1),1*kill")


@scenario("prefill-kill-after-landing", ids="P4", what="SIGKILL once all its requests decode")
async def kill_after_landing(trial: Trial) -> None:
    answers = await trial.begin(LONG, tokens=10)
    name = trial.cluster.victim("prefill")
    await trial.kill(name)
    await trial.client.wait(answers)
    stall_s = trial.measure_stall(answers)
    trial.bound("stall of streams that had landed", stall_s, 2.0)


async def die_at(trial: Trial, point: str, action: str) -> None:
    """Let a worker kill itself at a failpoint under load."""
    name = trial.cluster.victim("prefill")
    pid = trial.cluster.pid(name)
    await trial.failpoint(name, f"{point}={action}")
    answers = trial.client.start_all(MIXED)
    await trial.fired((name, point))
    await trial.cluster.await_true(f"{name} is gone", lambda: not is_running(pid))
    trial.prove(f"{name} pid {pid} is gone", not is_running(pid))
    await trial.client.wait(answers)
    trial.measure_stall(answers)


@scenario("prefill-stop-2s", ids="P5", what="SIGSTOP for 2 s under load, then SIGCONT")
async def stop_short(trial: Trial) -> None:
    answers = trial.client.start_all(PROMPTS + MIXED)
    name = await trial.cluster.busy("prefill", "running")
    await trial.stop(name)
    await pause(2.0)
    trial.wake(name)
    await trial.client.wait(answers)
    trial.measure_stall(answers)


@scenario(
    "prefill-stop-5s",
    ids="P5",
    what="SIGSTOP for 5 s: given up, resumed elsewhere, back on SIGCONT",
)
async def stop_long(trial: Trial) -> None:
    answers = trial.client.start_all(PROMPTS + MIXED)
    name = await trial.cluster.busy("prefill", "running")
    began_s = await trial.stop(name)
    await trial.detect(name, began_s, SILENCE_S, "SIGSTOP")
    await pause(2.0)
    trial.wake(name)
    await trial.client.wait(answers)
    trial.measure_stall(answers)


@scenario("prefill-wedged", ids="P6", what="its event loop blocks for 5 s, its RPC threads live")
async def wedged(trial: Trial) -> None:
    name = trial.cluster.victim("prefill")
    answers = await trial.begin(PROMPTS + MIXED)
    await trial.failpoint(name, "prefill.before_schedule=1*block(5)")
    await trial.fired((name, "prefill.before_schedule"))
    await trial.detect(name, trial.fault(), SILENCE_S, "a wedged loop")
    await trial.client.wait(answers)
    trial.measure_stall(answers)


@scenario("prefill-raises", ids="P8", what="one request each raises at every place of prefill")
async def prefill_raises(trial: Trial) -> None:
    points = (
        "link.accept",
        "prefill.submit",
        "prefill.settle",
        "link.token",
        "kv.push",
        "kv.landed",
    )
    await raise_at(trial, "prefill", points)


@scenario("decode-raises", ids="D8", what="one request each raises at every place of decode")
async def decode_raises(trial: Trial) -> None:
    points = (
        "link.accept",
        "decode.reserve",
        "decode.settle",
        "link.token",
        "decode.before_terminal",
    )
    await raise_at(trial, "decode", points)


async def raise_at(trial: Trial, role: str, points: tuple[str, ...]) -> None:
    """Raise once at each place; one request each may fail, nobody else."""
    trial.allow(End.ERROR)
    trial.allow(End.REFUSED)
    name = trial.cluster.victim(role)
    for point in points:
        await trial.failpoint(name, f"{point}=1*raise(on purpose)")
        answers = trial.client.start_all(SHORT + MEDIUM)
        await trial.fired((name, point))
        await trial.client.wait(answers)
        failed = [answer for answer in answers if answer.end in (End.ERROR, End.REFUSED)]
        trial.require(f"{point}: {len(failed)} requests failed, wanted at most 1", len(failed) <= 1)
        codes = sorted({f"{answer.status} {answer.code}" for answer in failed})
        trial.note(f"{point}: {', '.join(codes) or 'resumed, nobody failed'}")


@scenario(
    "kv-corrupted", ids="L5", what="three hand-offs' checksums are spoiled; caught, sent again"
)
async def corrupted(trial: Trial) -> None:
    name = trial.cluster.victim("prefill")
    before = await trial.cluster.metric("pd_resumes_total")
    await trial.failpoint(name, "kv.corrupt=3*corrupt")
    answers = trial.client.start_all(MIXED)
    await trial.fired((name, "kv.corrupt"))
    await trial.client.wait(answers)
    after = await trial.cluster.metric("pd_resumes_total")
    trial.prove(f"{after - before:.0f} attempts were given up and resumed", after > before)
    trial.measure_stall(answers)


@scenario(
    "kv-landed-lost", ids="N5", what="the message that KV has landed is lost twice", setup=HASTY
)
async def landed_lost(trial: Trial) -> None:
    name = trial.cluster.victim("prefill")
    await trial.failpoint(name, "kv.landed=2*drop")
    answers = trial.client.start_all(MIXED)
    await trial.fired((name, "kv.landed"))
    await trial.client.wait(answers)
    trial.measure_stall(answers, 8.0)


@scenario(
    "dispatch-lost",
    ids="N5",
    what="a worker of each role loses a submit and a reserve",
    setup=HASTY,
)
async def dispatch_lost(trial: Trial) -> None:
    names = [trial.cluster.victim(role) for role in ("prefill", "decode")]
    for name in names:
        await trial.failpoint(name, "link.accept=1*drop")
    answers = trial.client.start_all(MIXED)
    await trial.fired(*((name, "link.accept") for name in names))
    await trial.client.wait(answers)
    trial.measure_stall(answers, 8.0)
