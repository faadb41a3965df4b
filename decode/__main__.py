"""``python -m decode``: run one decode worker."""

import asyncio
import logging
import sys

from decode.worker import DecodeWorker
from engine.device.parallel.loading import load_worker_executor
from engine.device.resources import Resources
from kvtransfer.transport import make_transport
from pdserve.edge.history import HistoryFile
from pdserve.edge.hosting import host
from pdserve.edge.process import load_config, log_to_stderr, new_incarnation, worker_arguments
from pdserve.errors import PdserveError


def main() -> int:
    """Load the model, then serve until told to stop."""
    arguments = worker_arguments("decode")
    config = load_config(arguments)
    log_to_stderr(arguments.name)
    own = config.decode
    try:
        executor = load_worker_executor(
            config.worker_model, Resources.of(own, config.kv), config.speculation, section="decode"
        )
    except PdserveError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    incarnation = new_incarnation()
    try:
        with HistoryFile(config.history, arguments.name, incarnation) as history:
            asyncio.run(
                host(
                    lambda address: DecodeWorker(
                        config,
                        executor,
                        make_transport(config.transfer),
                        name=arguments.name,
                        address=address,
                        incarnation=incarnation,
                        history=history,
                    ),
                    bind_host=arguments.host,
                    port=arguments.port,
                    router_address=arguments.router,
                    ready_file=arguments.ready_file,
                    drain_s=own.drain_s,
                    history=history,
                )
            )
    finally:
        executor.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
