import pytest
from hypothesis import given, strategies as st

from pdserve.errors import InvalidRequest, PdserveError
from pdserve.layout import KvLayout
from pdserve.prefix import chain_hash, chain_root
from pdserve.request import FinishReason, Key, Request, SamplingParams
from pdserve.status import Audit, BlockCounts

KEY = Key("ab" * 16, 0)


def test_a_stop_token_ends_a_request_only_after_the_minimum() -> None:
    request = Request(KEY, (1,), 9, output_tokens_min=2, stop_tokens=frozenset({5}))
    assert request.finish_after(5, 2) is None
    assert request.finish_after(5, 3) is FinishReason.STOP
    assert request.finish_after(6, 9) is FinishReason.LENGTH
    assert request.finish_after(5, 9) is FinishReason.STOP


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"seed": -1}, "seed"),
        ({"logprob_count": 21}, "logprobs"),
        ({"logit_bias": ((3, float("inf")),)}, "logit_bias[3]"),
    ],
)
def test_a_wrong_sampling_parameter_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**change)  # type: ignore[arg-type]
    assert caught.value.param == field


def test_a_request_cannot_be_resumed_beyond_its_end() -> None:
    with pytest.raises(InvalidRequest, match="emitted"):
        Request(KEY, (1,), 2, emitted=(3, 4))


def test_every_fault_names_a_grpc_status() -> None:
    import grpc

    faults = [PdserveError]
    while faults:
        fault = faults.pop()
        assert grpc.StatusCode[fault.code]
        faults += fault.__subclasses__()


def block_hashes(tokens: list[int], size: int, salt: bytes = b"") -> list[bytes]:
    hashes = [chain_root(salt)]
    for stop in range(size, len(tokens) + 1, size):
        hashes.append(chain_hash(hashes[-1], tokens[stop - size : stop]))
    return hashes[1:]


@given(st.lists(st.integers(0, 999), max_size=40), st.integers(1, 8), st.binary(max_size=4))
def test_prefix_hashes_name_the_whole_prefix(tokens: list[int], size: int, salt: bytes) -> None:
    hashes = block_hashes(tokens, size, salt)
    assert len(hashes) == len(tokens) // size
    assert len(set(hashes)) == len(hashes)
    assert hashes == block_hashes([*tokens, 1], size, salt)[: len(hashes)]


def test_a_salt_separates_equal_prefixes() -> None:
    tokens = list(range(8))
    assert not set(block_hashes(tokens, 4, b"a")) & set(block_hashes(tokens, 4, b"b"))


def test_an_early_difference_changes_every_later_hash() -> None:
    one, two = list(range(12)), [99, *range(1, 12)]
    assert not set(block_hashes(one, 4)) & set(block_hashes(two, 4))


def test_pieces_of_neighbouring_blocks_are_neighbours_in_memory() -> None:
    layout = KvLayout(2, 16, 2, 32, "float32")
    assert layout.piece_bytes == 2 * 16 * 2 * 32 * 4
    assert layout.offset_bytes(0, 5, 8) + layout.piece_bytes == layout.offset_bytes(0, 6, 8)
    assert layout.offset_bytes(1, 7, 8) + layout.piece_bytes == layout.pool_bytes(8)
    assert [layout.blocks_for(count) for count in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_layouts_that_differ_anywhere_have_different_hashes() -> None:
    layouts = [
        KvLayout(2, 16, 2, 32, "float32"),
        KvLayout(3, 16, 2, 32, "float32"),
        KvLayout(2, 8, 2, 32, "float32"),
        KvLayout(2, 16, 4, 32, "float32"),
        KvLayout(2, 16, 2, 16, "float32"),
        KvLayout(2, 16, 2, 32, "bfloat16"),
    ]
    assert len({layout.hash for layout in layouts}) == len(layouts)


IDLE = Audit(BlockCounts(free=3, cached=1, total=4), 0, 8, {}, {}, 0, 0, 0, 5, {"stale": 2})


def test_idle_means_that_nothing_at_all_is_in_flight() -> None:
    from dataclasses import replace

    assert IDLE.is_fully_idle
    busy = [
        replace(IDLE, slots_used=1),
        replace(IDLE, request_counts={"running": 1}),
        replace(IDLE, session_counts={"sending": 1}),
        replace(IDLE, pending_signal_count=1),
        replace(IDLE, steps_in_flight=1),
        replace(IDLE, undelivered_count=1),
        replace(IDLE, blocks=BlockCounts(free=3, used=1, total=4)),
        replace(IDLE, blocks=BlockCounts(free=3, leased=1, total=4)),
        replace(IDLE, blocks=BlockCounts(free=3, quarantined=1, total=4)),
    ]
    assert not any(audit.is_fully_idle for audit in busy)


def test_a_lost_block_is_a_violation() -> None:
    from dataclasses import replace

    assert IDLE.is_conserved
    assert not replace(IDLE, blocks=BlockCounts(free=3, total=4)).is_conserved
    assert not replace(IDLE, violation="table and pool disagree").is_conserved
