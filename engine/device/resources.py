"""What one worker's executor may use of a machine."""

from dataclasses import dataclass

from pdserve.config import DecodeConfig, KvConfig, PrefillConfig, core_list


@dataclass(frozen=True, slots=True)
class Resources:
    """Memory, cores and ranks; 0 KV blocks fits as many as ``kv_bytes`` holds.

    Sampling slots are ``0..sequences_max - 1``; at most ``steps_in_flight_max`` steps may be
    unfinished.  ``cpus`` are the cores the compute threads are pinned to; none leaves them free.
    KV bytes and threads are those of one rank, of which there are ``tp * pp``; cores are shared
    out among them.
    """

    block_tokens: int
    kv_blocks: int
    kv_bytes: int
    sequences_max: int
    threads: int
    step_depth: int
    tp: int = 1
    pp: int = 1
    cpus: tuple[int, ...] = ()

    @property
    def steps_in_flight_max(self) -> int:
        """One per pipeline stage, and ``step_depth - 1`` to hide the scheduler behind."""
        return self.pp - 1 + self.step_depth

    @classmethod
    def of(cls, own: PrefillConfig | DecodeConfig, kv: KvConfig) -> "Resources":
        """Read them from a worker's configuration."""
        return cls(
            block_tokens=kv.block_tokens,
            kv_blocks=own.kv_blocks,
            kv_bytes=own.kv_bytes,
            sequences_max=own.sequences_max,
            threads=own.threads,
            step_depth=own.step_depth,
            tp=own.tp,
            pp=own.pp,
            cpus=core_list(own.cpus, "cpus"),
        )
