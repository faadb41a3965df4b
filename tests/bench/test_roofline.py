"""Ceilings: what is counted, on how many threads, and which probe counts."""

import torch

from bench.roofline import (
    PRECISIONS,
    Probe,
    Rates,
    bandwidth_probes,
    ceilings,
    gemm_probes,
    measure,
    table,
)

SHAPE = (16, 64, 96)


def test_probes_run_on_their_threads_and_leave_the_number_as_it_was() -> None:
    before = torch.get_num_threads()
    seen: dict[int, set[int]] = {1: set(), 2: set()}

    def probe(count: int) -> Probe:
        return Probe("read", count, 1, lambda: seen[count].add(torch.get_num_threads()))

    Rates([probe(1), probe(2)]).take_round()
    assert seen == {1: {1}, 2: {2}}
    assert torch.get_num_threads() == before


def test_the_faster_of_two_probes_is_the_ceiling() -> None:
    work = [Probe("read", 1, amount, lambda: None) for amount in (1.0, 1e6)]
    rates = Rates(work)
    for _ in range(20):
        rates.take_round()
    alone = Rates(work[:1])
    alone.take_round()
    assert rates.best("read", 1) > 100 * alone.best("read", 1)


def test_bytes_are_those_of_the_buffer_whatever_is_done_with_it() -> None:
    size = 1 << 20
    assert [probe.amount for probe in bandwidth_probes(size, 1)] == [size] * 3


def test_operations_are_two_for_each_product() -> None:
    probes = gemm_probes(PRECISIONS, 1, (SHAPE,))
    assert [probe.ceiling for probe in probes] == list(PRECISIONS)
    assert {probe.amount for probe in probes} == {2.0 * 16 * 64 * 96}


def test_products_are_those_of_their_precision() -> None:
    results = [probe.call() for probe in gemm_probes(PRECISIONS, 1, (SHAPE,))]
    kinds = [result.dtype for result in results if isinstance(result, torch.Tensor)]
    assert kinds == [torch.float32, torch.bfloat16, torch.int32]


def test_each_number_of_threads_has_ceilings_of_its_own() -> None:
    found = measure(1 << 20, (1, 2), rounds=1)
    assert [one.threads for one in found] == [1, 2]
    for one in found:
        assert min(one.read, one.copy, *one.gemm.values()) > 0
        assert set(one.gemm) == set(PRECISIONS)
    assert table(found).count("\n") == 3


def test_a_ceiling_is_asked_for_by_its_threads() -> None:
    probes = bandwidth_probes(1 << 16, 2) + gemm_probes(("float32",), 2, (SHAPE,))
    rates = Rates(probes)
    rates.take_round()
    assert ceilings(rates, 2, 1 << 16, ("float32",)).gemm.keys() == {"float32"}
