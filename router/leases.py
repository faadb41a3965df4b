"""What workers kept of requests whose router is gone: offers, until a client asks again.

Pure.  An offer is one leg of one attempt, told by the worker that holds it.  A client's retry
claims all legs of its request at once: those of the newest attempt are adopted if they can give
every token the client is to see, and whatever else there is has to be aborted.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from pdserve.request import Key, Request
from pdserve.status import Role

OFFERS_MAX = 8192
NAME_BYTES = 16
"""Of an idempotency: the client's key.  The rest is what the client asked for under it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One leg that a worker kept; ``peer`` is the worker of the other one."""

    worker: str
    role: Role
    model_hash: str
    request: Request
    epoch: int
    peer: str
    deadline_s: float

    @property
    def key(self) -> Key:
        """Which attempt it is a leg of."""
        return self.request.key


@dataclass(frozen=True, slots=True)
class Claim:
    """One request as it was left: legs that belong together, and others that do not."""

    request: Request
    prefill: Offer | None
    decode: Offer | None
    strays: tuple[Offer, ...]

    @property
    def legs(self) -> tuple[Offer, ...]:
        """The offers that belong together."""
        return tuple(leg for leg in (self.prefill, self.decode) if leg is not None)

    @property
    def is_adoptable(self) -> bool:
        """Whether these legs can say every token, as it was asked for.

        A prefill leg alone leads nowhere.  A decode leg alone knows all tokens of its attempt,
        but of the first one, and of earlier attempts, no log-probability.
        """
        if self.decode is None:
            return False
        if self.request.sampling.logprob_count is None:
            return True
        return self.prefill is not None and not self.request.emitted

    @property
    def emitted(self) -> tuple[int, ...]:
        """What need not be computed again before the next attempt."""
        wants_logprobs = self.request.sampling.logprob_count is not None
        return () if wants_logprobs else self.request.emitted


class LeaseBook:
    """The offers of all workers, by idempotency; bounded, each until its deadline."""

    def __init__(self) -> None:
        self._offers: dict[bytes, dict[tuple[str, Key], Offer]] = {}
        self._count = 0

    def add(self, offer: Offer, now_s: float) -> bool:
        """Take an offer; False when there are too many."""
        self.expire(now_s)
        if self._count >= OFFERS_MAX:
            return False
        offers = self._offers.setdefault(offer.request.idempotency, {})
        self._count -= len(offers)
        offers[offer.worker, offer.key] = offer
        self._count += len(offers)
        return True

    def lost(self, worker: str) -> None:
        """Forget what a worker offered: its link ended, it will offer again."""
        self._keep(lambda offer: offer.worker != worker)

    def expire(self, now_s: float) -> None:
        """Forget what workers have let go of by now."""
        self._keep(lambda offer: offer.deadline_s > now_s)

    def claim(self, idempotency: bytes, now_s: float) -> Claim | None:
        """Say what was left of a request; nothing changes."""
        self.expire(now_s)
        offers = self._offers.get(idempotency)
        if not offers:
            return None
        keys = {offer.key for offer in offers.values()}
        newest = max(keys, key=lambda key: (key.attempt, key.request_id))
        prefill, decode = (self._leg(offers.values(), newest, role) for role in Role)
        if decode is not None and prefill is not None and decode.peer != prefill.worker:
            decode = None
        known = decode or prefill
        if known is None:
            known = next(offer for offer in offers.values() if offer.key == newest)
        legs = (prefill, decode)
        strays = tuple(offer for offer in offers.values() if offer not in legs)
        return Claim(known.request, prefill, decode, strays)

    def take(self, idempotency: bytes, now_s: float) -> Claim | None:
        """Claim a request, once."""
        claim = self.claim(idempotency, now_s)
        self._count -= len(self._offers.pop(idempotency, {}))
        return claim

    def is_used_otherwise(self, idempotencies: Collection[bytes], now_s: float) -> bool:
        """Whether the key of these was used to ask for something else."""
        self.expire(now_s)
        names = {one[:NAME_BYTES] for one in idempotencies}
        return any(
            known[:NAME_BYTES] in names and known not in idempotencies for known in self._offers
        )

    def check(self) -> None:
        """Assert the bound and the books."""
        assert self._count == sum(map(len, self._offers.values())), "offers are miscounted"
        assert self._count <= OFFERS_MAX, "too many offers"
        assert all(self._offers.values()), "a name without an offer"

    def _leg(self, offers: Collection[Offer], key: Key, role: Role) -> Offer | None:
        """Find the one leg of a role; two that claim to be it are none."""
        found = [offer for offer in offers if offer.key == key and offer.role is role]
        return found[0] if len(found) == 1 else None

    def _keep(self, wanted: Callable[[Offer], bool]) -> None:
        for idempotency, offers in list(self._offers.items()):
            for name, offer in list(offers.items()):
                if not wanted(offer):
                    del offers[name]
                    self._count -= 1
            if not offers:
                del self._offers[idempotency]

    def __iter__(self) -> Iterator[Offer]:
        return (offer for offers in self._offers.values() for offer in offers.values())

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<LeaseBook {self._count} offers of {len(self._offers)} requests>"
