"""Announces a worker to the router, again and again, until the router has linked."""

import asyncio
import logging
from dataclasses import replace

import grpc

from pdserve import wire
from pdserve.edge.routers import RouterLinks
from pdserve.edge.rpc import GRPC, Network
from pdserve.status import WorkerInfo
from pdserve.v1 import router_service_pb2, router_service_pb2_grpc

logger = logging.getLogger(__name__)

SEARCH_S = 0.2  # between two announcements while there is no link
KEEP_S = 2.0  # between two while there is one: a router that restarted has forgotten us
CALL_S = 2.0


async def announce(
    info: WorkerInfo, router_address: str, links: RouterLinks, network: Network = GRPC
) -> None:
    """Announce until cancelled.  A router that cannot be reached is tried again.

    ``info`` holds but for the model: a worker's weights may change.
    """
    last = ""
    async with network.channel(router_address) as channel:
        stub: router_service_pb2_grpc.RouterServiceAsyncStub
        stub = router_service_pb2_grpc.RouterServiceStub(channel)  # type: ignore[assignment]
        while True:
            now = links.info
            worker = replace(info, model_hash=now.model_hash, model_name=now.model_name)
            request = router_service_pb2.RegisterRequest(worker=wire.info_to_wire(worker))
            try:
                await stub.Register(request, timeout=CALL_S, wait_for_ready=True)
                state = "announced to the router"
            except grpc.aio.AioRpcError as error:
                state = f"router at {router_address}: {error.code().name}: {error.details()}"
            if state != last:
                logger.info("%s", state)
                last = state
            if links.is_connected:
                # A link that ends is its router's end, perhaps: another may be there already.
                await links.wait_unlinked(KEEP_S)
            else:
                await asyncio.sleep(SEARCH_S)
