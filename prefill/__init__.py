"""The prefill worker: prompts in, KV and first tokens out."""
