"""``python -m router``: run the router."""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from pdserve.config import ClusterConfig
from pdserve.edge.history import HistoryFile
from pdserve.edge.process import (
    load_config,
    log_to_stderr,
    new_incarnation,
    stop_signal,
    write_ready_file,
)
from pdserve.errors import PdserveError
from pdserve.history.events import Event, Recorder
from router.core import RouterCore
from router.http import Listeners
from router.model_folder import ModelFolder

CLOSE_S = 3.0  # after a signal, time for answers to leave

log = logging.getLogger("pdserve.router")


async def serve(
    config: ClusterConfig, ready_file: Path | None, incarnation: int, history: Recorder
) -> None:
    """Serve until told to stop; then end what is in flight, within a bounded time."""
    stopped = stop_signal()
    model = ModelFolder.load(config.model.path, config.model.name)
    core = RouterCore(
        config.router,
        config.heartbeat,
        config.decode,
        lease=config.lease,
        is_test_build=config.test.enabled,
        incarnation=incarnation,
        history=history,
    )
    listeners = Listeners(
        core,
        core,
        config.router,
        model,
        core.metrics.registry,
        client_lease_s=config.lease.client_s,
    )
    try:
        grpc_address = await core.open()
        port, admin_port = await listeners.start()
        own = config.router
        url = f"http://{own.host}:{port}"
        admin_url = f"http://{own.admin_host}:{admin_port}"
        log.info("event=listening url=%s admin_url=%s grpc=%s", url, admin_url, grpc_address)
        write_ready_file(
            ready_file, {"url": url, "admin_url": admin_url, "grpc_address": grpc_address}
        )
        await stopped.wait()
        log.info("event=stopping live=%d", len(core.table.live))
        await core.drain(own.drain_s)
    finally:
        # In this order: callers learn of the end while there is still somebody to tell them.
        core.end_all()
        await listeners.close(CLOSE_S)
        await core.close()
    history.record(Event.STOP, in_flight=len(core.table.live))


def main() -> int:
    """Parse the command line and serve; 2 for a wrong setting, 1 for a fault at start."""
    parser = argparse.ArgumentParser(prog="python -m router", description="Run the router.")
    parser.add_argument("--config", type=Path, help="cluster.toml; defaults without one")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--ready-file", type=Path, help="written once the router listens")
    arguments = parser.parse_args()
    config = load_config(arguments)
    log_to_stderr("router")
    incarnation = new_incarnation()
    try:
        with HistoryFile(config.history, "router", incarnation) as history:
            asyncio.run(serve(config, arguments.ready_file, incarnation, history))
    except PdserveError as error:
        log.error("event=failed why=%r", error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
