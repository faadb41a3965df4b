"""The decode worker: landed KV in, tokens out."""
