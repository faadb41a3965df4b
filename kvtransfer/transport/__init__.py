"""Data planes for KV, behind one narrow interface."""

from kvtransfer.transport.base import Transport
from pdserve.config import TransferConfig


def make_transport(config: TransferConfig) -> Transport:
    """Make the configured transport; "auto" takes ucx-py where it is installed.

    Raises:
        InvalidConfig: the backend asked for is not installed.

    """
    # Imported here: no process loads a UCX library that it does not use.
    from kvtransfer.transport.ucx import UcxTransport

    if config.backend == "ucx-py" or (config.backend == "auto" and _has_ucxpy()):
        from kvtransfer.transport.ucxpy import open_library as open_ucxpy

        return UcxTransport(config, open_ucxpy)
    from kvtransfer.transport.libucp import open_library as open_libucp

    return UcxTransport(config, open_libucp)


def _has_ucxpy() -> bool:
    from importlib.util import find_spec

    try:
        return find_spec("ucp._libs.ucx_api") is not None
    except ModuleNotFoundError:
        return False
