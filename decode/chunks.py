"""What a step takes of each sequence: whose turn it is, and how many guesses have room."""

from collections.abc import Sequence as Several

from decode.room import Room
from decode.sequence import Sequence
from engine.speculation.choice import Guessing
from engine.step import Binding, Chunk


def by_arrival(sequence: Sequence) -> int:
    """Sort who came first to the front."""
    return sequence.arrival


def take_turns(
    running: Several[Sequence], room: Room, microbatch_count: int, *, is_ahead: bool
) -> list[Sequence]:
    """Choose one microbatch of ``running``, each with a block for its next token.

    First who is in no step, and never together with who is in one: a stage would have to wait
    for the last stage's token.  Of equals, who has not been in a step for the longest time; so
    nobody starves.  Unless ``is_ahead``, who is in a step waits for its result.
    """
    limit = -(-len(running) // microbatch_count)
    is_parted = limit < len(running)
    order = running
    if is_parted:
        order = sorted(running, key=lambda each: (each.unsettled_count, each.planned_step))
    chosen: list[Sequence] = []
    for sequence in order:
        is_behind = bool(chosen) and sequence.unsettled_count > chosen[0].unsettled_count
        if len(chosen) == limit or (is_parted and is_behind):
            break
        if (is_ahead or not sequence.unsettled_count) and room.grow(sequence):
            chosen.append(sequence)
    return sorted(chosen, key=by_arrival)


def bind(sequence: Sequence) -> Binding:
    """Let a sequence take its slot on the device, with all that is known of it."""
    assert sequence.slot is not None, f"{sequence} runs without a slot"
    sequence.is_bound = True
    output = tuple(sequence.tokens[len(sequence.request.prompt) :])
    return Binding(sequence.slot, sequence.request, output)


def make_chunk(
    sequence: Sequence, step: int, room: Room, guessing: Guessing, *, may_lend: bool
) -> Chunk:
    """Plan a sequence's next token, and as many of its guesses as there is room for.

    Its blocks grow for guesses only if it ``may_lend``, and never beyond where it ends.
    """
    assert sequence.slot is not None, f"{sequence} runs without a slot"
    start = sequence.position
    is_known = not sequence.unsettled_count
    stop = min(start + 1 + len(sequence.guesses), sequence.position_stop)
    reach = min(stop + guessing.lookahead_tokens, sequence.position_stop)
    if may_lend:
        room.lend(sequence, reach)
    held_stop = len(sequence.blocks) * room.block_tokens
    stop, reach = min(stop, held_stop), min(reach, held_stop)
    sequence.tried, sequence.guesses = sequence.guesses[: stop - start - 1], ()
    sequence.unsettled_count += 1
    sequence.planned_step = step
    block_count = room.blocks_for(reach)
    if len(sequence.covering) != block_count:
        sequence.covering = sequence.blocks[:block_count]
    return Chunk(
        key=sequence.key,
        slot=sequence.slot,
        start=start,
        stop=stop,
        tokens=(sequence.tokens[start], *sequence.tried) if is_known else (),
        blocks=sequence.covering,
        samples=True,
        draft_count=len(sequence.tried),
    )
