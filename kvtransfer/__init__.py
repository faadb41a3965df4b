"""Moving KV blocks: hand-off sessions, layer-signal buffer, the UCX agent."""
