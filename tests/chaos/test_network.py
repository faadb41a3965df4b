"""The hosts and the faults between them, tried with two small programs."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import network
from tests.chaos.netem import Line
from tests.chaos.network import Network, await_true, reason_to_skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip())),
]

PORT = 99
ECHO = f"""
import socket
server = socket.create_server(("0.0.0.0", {PORT}))
while True:
    connection, _ = server.accept()
    try:
        while data := connection.recv(65536):
            connection.sendall(data)
    except OSError:
        continue
"""
ASK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
for number in range(10**6):
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with Network(["a", "b"]) as made:
        log_file = tmp_path_factory.mktemp("echo") / "log"
        made["b"].start(["python3", "-I", "-c", ECHO], log_file)
        yield made


class Asker:
    """Sends a byte and waits for its echo, again and again."""

    def __init__(self, hosts: Network, log_file: Path) -> None:
        self._log_file = log_file
        command = ["python3", "-I", "-c", ASK, hosts["b"].address, str(PORT)]
        self.process = hosts["a"].start(command, log_file)

    @property
    def count(self) -> int:
        return self._log_file.read_text().count("\n")

    def await_more(self) -> None:
        before = self.count
        await_true("more echoes", lambda: self.count > before + 10)


@pytest.fixture
def asker(two: Network, tmp_path: Path) -> Iterator[Asker]:
    made = Asker(two, tmp_path / "log")
    made.await_more()
    yield made
    two.heal()
    made.process.end()


def test_a_cut_stops_everything_and_is_counted_and_healing_lets_it_go_on(
    two: Network, asker: Asker
) -> None:
    forth, back = two.cut("a", "b")
    await_true("a packet is dropped", lambda: forth.packet_count > 0)
    stopped_at = asker.count
    await_true("more packets are dropped", lambda: forth.packet_count > 2)
    assert asker.count <= stopped_at + 1
    two.heal()
    asker.await_more()
    assert forth.packet_count > 2
    assert back.packet_count >= 0
    assert asker.process.is_running


def test_a_reset_ends_the_connection(two: Network, asker: Asker) -> None:
    rule = two.reset("a", "b")
    await_true("the asker fails", lambda: not asker.process.is_running)
    assert rule.packet_count > 0
    assert two["a"].sockets_to(two["b"]) == []


def test_destroyed_connections_are_counted(two: Network, asker: Asker) -> None:
    assert [far for _, far in two["a"].ports_to(two["b"])] == [PORT]
    assert two["a"].kill_sockets_to(two["b"]) == 1
    await_true("the asker fails", lambda: not asker.process.is_running)


def test_a_bad_line_carries_what_it_does_not_lose(two: Network, asker: Asker) -> None:
    two.degrade("a", "b", Line(delay_s=0.01, loss=0.1, double=0.1))
    asker.await_more()
    asker.await_more()
    counts = two.heal()
    assert counts.taken > 20
    assert counts.lost > 0
    assert counts.doubled > 0
    asker.await_more()


def test_a_limit_lets_only_so_much_pass(two: Network, asker: Asker) -> None:
    two.limit("a", "b", "1mbit")
    asker.await_more()
    assert two.limited_bytes("b") > 0


def test_hosts_see_nothing_of_each_other_but_the_network(two: Network, asker: Asker) -> None:
    shown = subprocess.run(
        [*two["a"].enter, "unshare", "--pid", "--fork", "--mount-proc", "ps", "-eo", "pid="],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(shown.stdout.split()) == 1
    routes = network.run("ip", "route", "show")
    assert two["b"].address.rpartition(".")[0] not in routes
    assert asker.process.state() in "SR"


def test_only_leftovers_of_dead_runs_are_removed(asker: Asker) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    spare = f"{network.PREFIX}{dead.pid}-spare"
    network.run("ip", "netns", "add", spare)
    left = subprocess.Popen(["ip", "netns", "exec", spare, "sleep", "1000"])
    await_true("it runs there", lambda: bool(network.run("ip", "netns", "pids", spare).split()))
    network.remove_leftovers()
    assert left.wait(10) == -9
    assert spare not in network.run("ip", "netns", "list")
    asker.await_more()
