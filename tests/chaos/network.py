"""Hosts and the network between them, made of network namespaces on this machine.

Every host is a network namespace, a process id namespace and one address; a switch, one more
namespace, routes between them.  So processes on two hosts see each other as on two machines:
no shared loopback, no shared /proc, and faults strike the link between exactly two hosts.
Only addresses of 10.77.0.0/16 are used, and only inside the namespaces.
"""

import ctypes
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.netem import Counts, Line, Side

ROOT = Path(__file__).parent.parent.parent
PREFIX = "pdchaos-"
OWN = f"{PREFIX}{os.getpid()}-"
SWITCH = f"{OWN}switch"
NIC = "eth0"
TABLE = ("inet", "chaos")
CHAIN = (*TABLE, "forward")
LIVE = ("state", "connected", "exclude", "time-wait")
TOOLS = {"ip": "iproute2", "tc": "iproute2", "ss": "iproute2", "nft": "nftables"}
COMMAND_S = 20.0
START_S = 20.0
PATIENCE_S = 10.0
POLL_S = 0.02


@functools.cache
def reason_to_skip() -> str | None:
    """Say why namespaces cannot be made here and what would help; None if they can."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if missing:
        return f"wanted {', '.join(sorted(missing))}: apt-get install {' '.join(sorted(missing))}"
    if os.geteuid() != 0:
        return "network namespaces need root: run as root (or in a container with NET_ADMIN)"
    name = f"{OWN}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}; wanted CAP_SYS_ADMIN"
    ruled = subprocess.run(
        ["ip", "netns", "exec", name, "nft", "add", "table", *TABLE],
        capture_output=True,
        text=True,
    )
    run("ip", "netns", "del", name)
    return f"no nftables in this kernel: {ruled.stderr.strip()}" if ruled.returncode else None


def run(*command: str, text: str = "") -> str:
    """Run a command to its end; what it says on failure is raised."""
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def remove_leftovers() -> None:
    """Remove what runs that were killed have left: their processes and their namespaces."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{_owner(name)}").exists():
            remove(name)


def _owner(namespace: str) -> str:
    return namespace.removeprefix(PREFIX).partition("-")[0]


def remove_own() -> None:
    """Remove every namespace that this process has made."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(OWN):
            remove(name)


def remove(namespace: str) -> None:
    """End whatever runs in a namespace, and remove it."""
    pids = [int(pid) for pid in run("ip", "netns", "pids", namespace).split()]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await_true(
        f"the end of all in {namespace}", lambda: not run("ip", "netns", "pids", namespace).split()
    )
    run("ip", "netns", "del", namespace)


def await_true(what: str, holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> float:
    """Poll until something observable holds; return how long it took."""
    start_s = time.monotonic()
    while not holds():
        if time.monotonic() - start_s > patience_s:
            raise TimeoutError(f"not within {patience_s} s: {what}")
        time.sleep(POLL_S)
    return time.monotonic() - start_s


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


class HostProcess:
    """A program on one host; it dies with the runner, however that dies."""

    def __init__(self, host: "Host", command: Sequence[str], log_file: Path) -> None:
        wrapper = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with log_file.open("ab") as log:
            self._outer = subprocess.Popen(
                [*host.enter, *wrapper, *command],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                preexec_fn=_die_with_parent,
            )
        self.log_file = log_file
        self.pid = 0
        await_true(f"the start of {command}", self._find, START_S)

    def _find(self) -> bool:
        if self._outer.poll() is not None:
            raise RuntimeError(f"{self.log_file}: ended at once with {self._outer.returncode}")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        found = children.read_text().split()
        self.pid = int(found[0]) if found else 0
        return bool(found)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._outer.poll() is None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the program itself a signal."""
        os.kill(self.pid, number)

    def state(self) -> str:
        """Return the letter /proc has for it: T when stopped."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def stop(self, patience_s: float = PATIENCE_S) -> None:
        """End it, gently first; the first process of a namespace may be deaf to that."""
        if self.is_running:
            with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                self.kill(signal.SIGTERM)
                self._outer.wait(patience_s)
        self.end()

    def end(self) -> None:
        """End it at once.  Idempotent."""
        if self.is_running:
            self._outer.kill()  # and with it, the program
        self._outer.wait()


class Host:
    """One machine of the network."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.namespace = OWN + name
        self.address = f"10.77.{number}.2"
        self.port_device = f"port{number}"  # the switch's end of its cable
        self.processes: list[HostProcess] = []
        self._gateway = f"10.77.{number}.1"
        run("ip", "netns", "add", self.namespace)
        run("ip", "-n", SWITCH, "link", "add", self.port_device, "type", "veth",
            "peer", "name", NIC, "netns", self.namespace)  # fmt: skip
        run("ip", "-n", SWITCH, "address", "add", f"{self._gateway}/24", "dev", self.port_device)
        run("ip", "-n", SWITCH, "link", "set", "dev", self.port_device, "up")
        inside = ("ip", "-n", self.namespace)
        run(*inside, "link", "set", "dev", "lo", "up")
        run(*inside, "address", "add", f"{self.address}/24", "dev", NIC)
        # One packet at a time, as a wire carries them; else faults would strike 64 KiB at once.
        run(*inside, "link", "set", "dev", NIC, "gso_max_segs", "1")
        run(*inside, "link", "set", "dev", NIC, "up")
        run(*inside, "route", "add", "default", "via", self._gateway)

    @property
    def enter(self) -> list[str]:
        """The words that put a command on this host."""
        return ["ip", "netns", "exec", self.namespace]

    def has_carrier(self) -> bool:
        """Say whether the kernel has noticed that the cable is plugged in; UCX looks at that."""
        shown = json.loads(run("ip", "-n", self.namespace, "-j", "link", "show", "dev", NIC))
        return bool(shown[0]["operstate"] == "UP")

    def side(self) -> Side:
        """Both ends of this host's cable, for ``netem``."""
        return Side(
            self.address,
            hardware=_hardware(self.namespace, NIC),
            device=self.port_device,
            device_hardware=_hardware(SWITCH, self.port_device),
        )

    def start(self, command: Sequence[str], log_file: Path) -> HostProcess:
        """Start a program here; it ends with the network at the latest."""
        process = HostProcess(self, command, log_file)
        self.processes.append(process)
        return process

    def sockets_to(self, peer: "Host") -> list[str]:
        """List the TCP connections from here to there, as ``ss`` words them."""
        return run(*self.enter, "ss", "-Htn", *LIVE, "dst", peer.address).splitlines()

    def ports_to(self, peer: "Host") -> list[tuple[int, int]]:
        """List the ports, here and there, of the TCP connections to a host."""
        found = [line.split()[3:5] for line in self.sockets_to(peer)]
        return [(_port(near), _port(far)) for near, far in found]

    def unsent_bytes(self, peer: "Host") -> int:
        """Say how much the kernel here still wants to send there, whoever's it was."""
        return sum(int(line.split()[2]) for line in self.sockets_to(peer))

    def kill_sockets_to(self, peer: "Host", *filters: str) -> int:
        """Destroy connections, with a reset to the other side; return how many."""
        gone = run(*self.enter, "ss", "-KHtn", *LIVE, "dst", peer.address, *filters)
        return len(gone.splitlines())


def _port(end: str) -> int:
    return int(end.rpartition(":")[2])


def _hardware(namespace: str, device: str) -> str:
    shown = json.loads(run("ip", "-n", namespace, "-j", "link", "show", "dev", device))
    return str(shown[0]["address"])


class BadLine:
    """A line between two hosts that goes through ``netem``, until it is repaired."""

    def __init__(self, one: Host, other: Host, line: Line) -> None:
        """The caller stops the kernel from forwarding between the two."""
        told = {"one": one.side(), "other": other.side(), "line": line}
        program = Path(__file__).with_name("netem.py")
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", SWITCH, sys.executable, "-I", str(program),
             json.dumps(told, default=asdict)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
        if self._hear() != "ready\n":
            raise RuntimeError(f"netem ended with {self._process.wait()}")

    def _hear(self) -> str:
        return self._process.stdout.readline() if self._process.stdout else ""

    def repair(self) -> Counts:
        """Take it out of the line; return what it did."""
        self._process.terminate()
        counts = Counts(**json.loads(self._hear()))
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return counts


class Rule:
    """One rule of the switch, in force until it is removed."""

    def __init__(self, text: str) -> None:
        """``text``: an nftables rule with one counter."""
        answer = _nft("--echo", "--json", "add", "rule", *CHAIN, *text.split())
        added = [item["add"]["rule"] for item in json.loads(answer)["nftables"] if "add" in item]
        self.text = text
        self._handle = int(added[0]["handle"])
        self._last_count: int | None = None

    @property
    def packet_count(self) -> int:
        """How many packets it has struck so far."""
        if self._last_count is not None:
            return self._last_count
        return _counts()[self._handle]

    def remove(self) -> None:
        """Put it out of force; its count remains known.  Idempotent."""
        if self._last_count is None:
            self._last_count = self.packet_count
            _nft("delete", "rule", *CHAIN, "handle", str(self._handle))

    def removed(self, counts: Mapping[int, int]) -> None:
        """Note that it was put out of force, and what it had counted by then."""
        if self._last_count is None:
            self._last_count = counts[self._handle]


def _counts() -> dict[int, int]:
    """Count the packets each rule of the switch has struck, by its handle."""
    listed = json.loads(_nft("--json", "list", "chain", *CHAIN))["nftables"]
    rules = [item["rule"] for item in listed if "rule" in item]
    return {int(rule["handle"]): _packets(rule["expr"]) for rule in rules}


def _packets(expressions: list[dict[str, Any]]) -> int:
    return next(int(item["counter"]["packets"]) for item in expressions if "counter" in item)


def _nft(*words: str) -> str:
    return run("ip", "netns", "exec", SWITCH, "nft", *words)


class Network:
    """All hosts, and the switch in their middle.  A context: leaving it removes everything."""

    def __init__(self, names: Sequence[str]) -> None:
        remove_leftovers()
        self.hosts: dict[str, Host] = {}
        self._rules: list[Rule] = []
        self._limited: set[Host] = set()
        self._bad_lines: list[BadLine] = []
        run("ip", "netns", "add", SWITCH)
        try:
            run("ip", "netns", "exec", SWITCH, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            _nft("add", "table", *TABLE)
            _nft("add", "chain", *CHAIN, "{ type filter hook forward priority 0 ; }")
            for number, name in enumerate(names, start=1):
                self.hosts[name] = Host(name, number)
            for host in self.hosts.values():
                await_true(f"the carrier of {host.name}", host.has_carrier)
        except BaseException:
            remove_own()
            raise

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every host, and whatever still runs there."""
        self.heal()
        for host in self.hosts.values():
            for process in host.processes:
                process.end()
        remove_own()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    # Faults.  Each takes the names of hosts and returns rules whose counters prove the fault.

    def drop(self, source: str, target: str, what: str = "") -> Rule:
        """Let packets from one host to another vanish; ``what`` narrows them down."""
        return self._rule(source, target, what, "drop")

    def cut(self, one: str, other: str, what: str = "") -> list[Rule]:
        """Let packets between two hosts vanish, both ways."""
        return [self.drop(one, other, what), self.drop(other, one, what)]

    def reset(self, source: str, target: str, what: str = "") -> Rule:
        """Answer the TCP packets from one host to another with a reset."""
        return self._rule(source, target, f"meta l4proto tcp {what}", "reject with tcp reset")

    def _rule(self, source: str, target: str, what: str, verdict: str) -> Rule:
        ends = f"ip saddr {self[source].address} ip daddr {self[target].address}"
        rule = Rule(f"{ends} {what} counter {verdict}")
        self._rules.append(rule)
        return rule

    def limit(self, source: str, target: str, rate: str) -> None:
        """Let packets from one host to another pass at ``rate`` only, as ``tc`` words it."""
        device = self[target].port_device
        tc = ("tc", "-n", SWITCH)
        parent = ("dev", device, "parent")
        run(*tc, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb")
        run(*tc, "class", "add", *parent, "1:", "classid", "1:1", "htb", "rate", rate)
        run(*tc, "qdisc", "add", *parent, "1:1", "bfifo", "limit", "256k")
        source_match = f"{self[source].address}/32"
        run(*tc, "filter", "add", *parent, "1:", "protocol", "ip", "u32",
            "match", "ip", "src", source_match, "flowid", "1:1")  # fmt: skip
        self._limited.add(self[target])

    def limited_bytes(self, target: str) -> int:
        """Say how much a limit on the way to a host has let pass."""
        device = self[target].port_device
        shown = run("tc", "-n", SWITCH, "-s", "class", "show", "dev", device)
        return sum(int(count) for count in re.findall(r"Sent (\d+) bytes", shown))

    def degrade(self, one: str, other: str, line: Line) -> None:
        """Have all packets between two hosts go over a bad line."""
        self._bad_lines.append(BadLine(self[one], self[other], line))
        self.cut(one, other)  # the kernel's way; both are open for a moment, never none

    def heal(self) -> Counts:
        """End every fault of the switch; return what bad lines did, added up."""
        counts = _counts()
        _nft("flush", "chain", *CHAIN)
        for rule in self._rules:
            rule.removed(counts)
        self._rules.clear()
        for host in self._limited:
            run("tc", "-n", SWITCH, "qdisc", "del", "dev", host.port_device, "root")
        self._limited.clear()
        repaired = [asdict(bad.repair()) for bad in self._bad_lines]
        self._bad_lines.clear()
        return Counts(**{name: sum(one[name] for one in repaired) for name in asdict(Counts())})
