"""The control: a fault aimed at nothing, which must be noticed to have done nothing."""

from tests.chaos.framework import Trial, is_running, scenario
from tests.chaos.load import MIXED


@scenario(
    "control-no-target",
    ids="-",
    what="a SIGKILL aimed at nothing: the proof that a worker died must not hold",
    is_control=True,
)
async def no_target(trial: Trial) -> None:
    answers = await trial.begin(MIXED)
    trial.fault()
    pid = trial.cluster.pid("decode-0")
    trial.prove(f"decode-0 pid {pid} is gone", not is_running(pid))
    await trial.client.wait(answers)
