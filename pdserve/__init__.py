"""Words every part of the cluster shares: requests, layouts, errors, the wire contract."""

__version__ = "0.1.0"
