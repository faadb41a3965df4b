"""The router: one REST endpoint over two fleets of workers."""
