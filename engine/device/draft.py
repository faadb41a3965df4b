"""Who guesses beside a model: a proposer that reads the text, or a smaller model.

A draft model keeps its KV in layers of its own behind the target's, in the same blocks of the
same pool, so it crosses a hand-off, is cached and is given back like any other KV.  After every
step it is complete for all positions whose target KV is; what it holds of guesses that were
wrong is written over, as the target's is.

It samples with the target's parameters, penalties included, and with the very random number the
target will use at that position.  So where both expect the same, they say the same, at any
temperature.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.device.batch import Row
from engine.device.model import Model, nobody
from engine.device.pool import KvPool
from engine.device.sampler import Logits, sample
from engine.device.slots import Mark, Slot
from engine.device.spec import ModelSpec
from engine.speculation.choice import text_proposer
from engine.speculation.proposer import NaiveProposer, Proposer
from engine.step import Binding, Chunk
from pdserve.config import SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel
from pdserve.request import Key

OnDraftLayer = Callable[[int], None]
Guesses = Mapping[Key, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a step did to one sequence: nothing sampled in the middle of a prompt, or by a fault."""

    chunk: Chunk
    slot: Slot
    sampled: tuple[int, ...]


class Guesser(Protocol):
    """Guesses for the next step at the end of this one, on the executor's thread."""

    @property
    def layer_count(self) -> int:
        """Layers of the pool it needs behind the model's."""
        ...

    def bind(self, binding: Binding, slot: Slot) -> None:
        """Begin anew with a sequence; ``slot`` is its sampling slot."""
        ...

    def guess(self, turns: Sequence[Turn], pool: KvPool, on_layer: OnDraftLayer) -> Guesses:
        """Guess what follows; none where nothing was sampled.

        ``on_layer`` is called with the pool's layer, for each of the guesser's own, once its KV
        of the step's chunks is written.
        """
        ...

    def unbind(self) -> None:
        """Forget every sequence."""
        ...


class TextGuesser:
    """A proposer behind the executor's slots."""

    layer_count = 0

    def __init__(self, proposer: Proposer, draft_tokens: int) -> None:
        self._proposer = proposer
        self._draft_tokens = draft_tokens

    def bind(self, binding: Binding, slot: Slot) -> None:
        """Show the text to the proposer; one with strange tokens is not worth a guess."""
        if slot.fault is None:
            self._proposer.bind(binding.slot, binding.request.prompt + binding.output)

    def guess(self, turns: Sequence[Turn], pool: KvPool, on_layer: OnDraftLayer) -> Guesses:
        """Ask the proposer, for as much as the request may still say."""
        del pool, on_layer
        guesses: dict[Key, tuple[int, ...]] = {}
        for turn in turns:
            if not turn.sampled:
                continue
            place = turn.chunk.slot
            self._proposer.extend(place, turn.sampled)
            count_max = min(self._draft_tokens, turn.slot.tokens_left - 1)
            proposed = self._proposer.propose(place, count_max) if count_max > 0 else ()
            if proposed:
                guesses[turn.chunk.key] = proposed[:count_max]
        return guesses

    def unbind(self) -> None:
        """Forget every text."""
        self._proposer.unbind()

    def __repr__(self) -> str:
        return f"<TextGuesser {self._proposer!r}>"


NOBODY_GUESSES = TextGuesser(NaiveProposer(), 0)


@dataclass(slots=True)
class _Text:
    """One sequence as the draft model sees it.

    Its KV is right for the first ``computed_count`` tokens (None: for all before the first
    chunk), and for those of ``ahead`` that turn out to follow.

    Only guesses in the last token's own block are in ``ahead``.  Blocks behind it may have been
    another's by the next step, even if they are back; what was written there is written again.
    """

    tokens: list[int]
    computed_count: int | None = None
    ahead: list[int] = field(default_factory=list[int])

    def catch_up(self, turn: Turn, *, is_guessing: bool, block_tokens: int) -> Row:
        """Note what a step brought; give the tokens without KV, to be computed now.

        With the last token itself, whose logits a guess needs, if its place is in the blocks.
        """
        chunk = turn.chunk
        start = chunk.start if self.computed_count is None else self.computed_count
        self.tokens += turn.sampled
        last = len(self.tokens) - 1
        for token in self.ahead:
            if start >= last or self.tokens[start] != token:
                break
            start += 1
        self.ahead = []
        stop = last if turn.sampled else min(chunk.stop, last + 1)
        is_open = bool(turn.sampled) and is_guessing and last < len(chunk.blocks) * block_tokens
        self.computed_count = max(start, stop + is_open)
        return Row(self.tokens[start : stop + is_open], start, chunk.blocks, int(is_open))

    def note(self, token: int, place: int, block_tokens: int) -> None:
        """Remember that a guess's KV will be at ``place``, if it can be relied on."""
        if place // block_tokens == (len(self.tokens) - 1) // block_tokens:
            self.ahead.append(token)


@dataclass(slots=True)
class _Try:
    """One sequence's guesses being made."""

    turn: Turn
    text: _Text
    mark: Mark
    count_max: int
    guesses: list[int] = field(default_factory=list[int])

    @property
    def place(self) -> int:
        """Position of the last guess."""
        return len(self.text.tokens) + len(self.guesses) - 1


class DraftGuesser:
    """A smaller model of the same vocabulary; ``first_layer`` of the pool is its first.

    With ``draft_tokens`` 0 it only keeps its KV complete: what a prefill worker has it for.
    """

    def __init__(self, model: Model, *, first_layer: int, draft_tokens: int) -> None:
        self.layer_count = model.spec.layer_count
        self._model = model
        self._first_layer = first_layer
        self._draft_tokens = draft_tokens
        self._texts: dict[int, _Text] = {}

    def bind(self, binding: Binding, slot: Slot) -> None:
        """Begin anew; KV before the sequence's first chunk came with the blocks."""
        if slot.fault is None:
            tokens = [*binding.request.prompt, *binding.output]
            self._texts[binding.slot] = _Text(tokens)
        else:
            self._texts.pop(binding.slot, None)

    def guess(self, turns: Sequence[Turn], pool: KvPool, on_layer: OnDraftLayer) -> Guesses:
        """Catch up with the target, then guess token by token."""
        layers = _layers_of(pool, self._first_layer)
        rows: list[Row] = []
        tries: list[_Try | None] = []  # of each row
        for turn in turns:
            text = self._texts.get(turn.chunk.slot)
            if text is None:
                continue
            left = min(self._draft_tokens, turn.slot.tokens_left - 1)
            row = text.catch_up(turn, is_guessing=left > 0, block_tokens=layers.layout.block_tokens)
            if row.tokens:
                rows.append(row)
                tries.append(_Try(turn, text, turn.slot.mark(), left) if row.logit_count else None)
        if rows:
            logits, owners = self._model.forward(
                rows, layers, lambda layer: on_layer(self._first_layer + layer)
            )
            self._try([each for index in owners if (each := tries[index])], logits.numpy(), layers)
        else:
            for layer in range(self.layer_count):
                on_layer(self._first_layer + layer)
        guesses: dict[Key, tuple[int, ...]] = {}
        for each in filter(None, tries):
            each.turn.slot.rewind(each.mark, each.guesses)
            guesses[each.turn.chunk.key] = tuple(each.guesses)
        return guesses

    def _try(self, tries: list[_Try], logits: Logits, layers: KvPool) -> None:
        """Guess from ``logits``, one row each, and go on while anybody has room."""
        active = tries
        while active:
            outcomes = sample(logits, [each.turn.slot for each in active], is_guess=True)
            going: list[_Try] = []
            for each, outcome in zip(active, outcomes, strict=True):
                if isinstance(outcome, str):  # its own trouble: it just has fewer guesses
                    continue
                each.guesses.append(outcome.token)
                has_room = each.place < len(each.turn.chunk.blocks) * layers.layout.block_tokens
                if len(each.guesses) < each.count_max and has_room:
                    each.text.note(outcome.token, each.place, layers.layout.block_tokens)
                    going.append(each)
            if not going:
                return
            rows = [Row(each.guesses[-1:], each.place, each.turn.chunk.blocks, 1) for each in going]
            result, owners = self._model.forward(rows, layers, nobody)
            active, logits = [going[index] for index in owners], result.numpy()

    def unbind(self) -> None:
        """Forget every text."""
        self._texts.clear()

    def __repr__(self) -> str:
        return f"<DraftGuesser {self.layer_count} layers, {len(self._texts)} texts>"


def make_guesser(
    speculation: SpeculationConfig, target: ModelSpec, load: Callable[[str], Model]
) -> Guesser:
    """Make who guesses beside ``target``; ``load`` loads the folder of a draft model.

    Raises:
        InvalidConfig: there is no draft model to load.
        InvalidModel: it is not one for the same pool and tokens.

    """
    if speculation.proposer != "draft":
        return TextGuesser(text_proposer(speculation), speculation.draft_tokens)
    path = speculation.draft_path
    if not path:
        raise InvalidConfig(
            "speculation.draft_path is empty; wanted the folder of a draft model",
            param="speculation.draft_path",
        )
    model = load(path)
    require_alike(target, model.spec, path)
    return DraftGuesser(
        model, first_layer=target.layer_count, draft_tokens=speculation.draft_tokens
    )


def require_alike(target: ModelSpec, draft: ModelSpec, path: str) -> None:
    """Refuse a draft model whose KV or tokens are not of the target's form.

    Raises:
        InvalidModel: naming the file and the field.

    """
    fields = {
        "vocab_size": (draft.vocab_size, target.vocab_size),
        "num_key_value_heads": (draft.kv_head_count, target.kv_head_count),
        "head_dim": (draft.head_dim, target.head_dim),
    }
    for name, (seen, wanted) in fields.items():
        if seen != wanted:
            raise InvalidModel(
                f"{path}/config.json: {name} of the draft model is {seen}; wanted {wanted}, as "
                f"the model has whose tokens it guesses",
                param=name,
            )
    if draft.context_tokens_max < target.context_tokens_max:
        raise InvalidModel(
            f"{path}/config.json: max_position_embeddings of the draft model is "
            f"{draft.context_tokens_max}; wanted at least {target.context_tokens_max}",
            param="max_position_embeddings",
        )


def _layers_of(pool: KvPool, first_layer: int) -> KvPool:
    """See the pool without the layers before ``first_layer``; the memory is the same."""
    view = copy.copy(pool)
    view.slots, view.heads = pool.slots[first_layer:], pool.heads[first_layer:]
    return view
