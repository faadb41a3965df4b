"""What workers offer of another router's requests, and which legs a retry claims."""

import random

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.request import Key, Request, SamplingParams
from pdserve.status import Role
from router import leases
from router.leases import LeaseBook, Offer

ID = "a" * 32
NAME = b"k" * 16 + b"body-and-run-000"


def offer(role: Role = Role.DECODE, **changes) -> Offer:
    logprobs = changes.get("logprobs")
    request = Request(
        key=Key(changes.get("request_id", ID), changes.get("attempt", 0)),
        prompt=(1, 2),
        emitted=changes.get("emitted", ()),
        output_tokens_max=9,
        sampling=SamplingParams(seed=7, logprob_count=logprobs),
        idempotency=changes.get("name", NAME),
    )
    is_prefill = role is Role.PREFILL
    return Offer(
        worker=changes.get("worker", "p" if is_prefill else "d"),
        role=role,
        model_hash="m",
        request=request,
        epoch=changes.get("epoch", 0),
        peer=changes.get("peer", "d" if is_prefill else "p"),
        deadline_s=changes.get("deadline_s", 5.0),
    )


def book_of(*offers: Offer) -> LeaseBook:
    book = LeaseBook()
    for one in offers:
        assert book.add(one, 0.0)
        book.check()
    return book


def test_both_legs_are_claimed_together_and_once() -> None:
    prefill, decode = offer(Role.PREFILL), offer()
    book = book_of(prefill, decode)
    claim = book.take(NAME, 1.0)
    assert claim is not None
    assert (claim.prefill, claim.decode, claim.strays) == (prefill, decode, ())
    assert claim.is_adoptable
    assert book.take(NAME, 1.0) is None
    assert len(book) == 0


def test_a_decode_leg_alone_can_be_adopted_and_a_prefill_leg_cannot() -> None:
    alone = book_of(offer()).take(NAME, 0.0)
    assert alone is not None
    assert alone.is_adoptable
    stuck = book_of(offer(Role.PREFILL)).take(NAME, 0.0)
    assert stuck is not None
    assert not stuck.is_adoptable
    assert [one.worker for one in stuck.legs] == ["p"]


def test_the_newest_attempt_counts_and_the_others_are_strays() -> None:
    old, new = offer(worker="d1"), offer(attempt=1, emitted=(5,))
    claim = book_of(old, new).take(NAME, 0.0)
    assert claim is not None
    assert (claim.decode, claim.strays) == (new, (old,))
    assert claim.emitted == (5,)


@pytest.mark.parametrize(
    "offers",
    [
        (offer(), offer(worker="d1", epoch=1)),
        (offer(Role.PREFILL, worker="p1"), offer()),
    ],
    ids=["two decode legs", "another prefill worker"],
)
def test_legs_that_disagree_are_not_adopted(offers: tuple[Offer, ...]) -> None:
    claim = book_of(*offers).take(NAME, 0.0)
    assert claim is not None
    assert not claim.is_adoptable
    assert {*claim.legs, *claim.strays} == set(offers), "each of them is told to let go"


def test_log_probabilities_need_the_leg_that_told_the_first_token() -> None:
    decode, prefill = offer(logprobs=2), offer(Role.PREFILL, logprobs=2)
    alone = book_of(decode).take(NAME, 0.0)
    assert alone is not None
    assert not alone.is_adoptable
    both = book_of(decode, prefill).take(NAME, 0.0)
    assert both is not None
    assert both.is_adoptable
    resumed = book_of(
        offer(logprobs=2, attempt=1, emitted=(5,)),
        offer(Role.PREFILL, logprobs=2, attempt=1, emitted=(5,)),
    ).take(NAME, 0.0)
    assert resumed is not None
    assert not resumed.is_adoptable
    assert resumed.emitted == (), "computed again, with what was asked for"


def test_an_offer_ends_with_its_deadline_and_with_its_workers_link() -> None:
    book = book_of(offer(deadline_s=2.0), offer(Role.PREFILL, deadline_s=9.0))
    assert book.claim(NAME, 1.9).decode is not None
    assert book.claim(NAME, 2.0).decode is None
    book.lost("p")
    assert book.take(NAME, 2.0) is None
    book.check()


def test_offers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "OFFERS_MAX", 2)
    book = book_of(offer(name=b"1"), offer(name=b"2"))
    assert not book.add(offer(name=b"3"), 0.0)
    assert book.add(offer(name=b"3"), 5.0), "the others' time is over"
    book.check()


def test_a_key_that_asked_for_something_else_is_found() -> None:
    book = book_of(offer())
    assert not book.is_used_otherwise([NAME, b"k" * 16 + b"body-and-run-001"], 0.0)
    assert book.is_used_otherwise([b"k" * 16 + b"another-body-000"], 0.0)
    assert not book.is_used_otherwise([b"j" * 16 + b"another-body-000"], 0.0)
    assert not book.is_used_otherwise([b"k" * 16 + b"another-body-000"], 5.0), "it is over"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32))
def test_in_any_order_each_offer_is_claimed_or_forgotten(seed: int) -> None:
    rng = random.Random(seed)
    book, added, claimed, now_s = LeaseBook(), [], [], 0.0
    for _ in range(rng.randrange(30)):
        match rng.randrange(4):
            case 0 | 1:
                one = offer(
                    rng.choice(list(Role)),
                    worker=rng.choice("pqde"),
                    attempt=rng.randrange(2),
                    deadline_s=now_s + rng.choice([1.0, 3.0]),
                    name=rng.choice([NAME, b"other"]),
                )
                book.add(one, now_s)
                added.append(one)
            case 2:
                now_s += rng.choice([0.5, 2.0])
            case _:
                claim = book.take(rng.choice([NAME, b"other"]), now_s)
                if claim is not None:
                    news = [*claim.legs, *claim.strays]
                    assert all(one.deadline_s > now_s for one in news)
                    claimed += news
        book.check()
    assert len(claimed) == len(set(map(id, claimed))), "claimed twice"
    assert {id(one) for one in claimed} <= {id(one) for one in added}
    book.expire(now_s + 3.0)
    assert len(book) == 0
