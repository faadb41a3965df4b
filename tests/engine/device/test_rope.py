"""Rope tables do not depend on when their rows were asked for."""

import torch

from engine.device.rope import RopeTable
from engine.device.spec import RopeSpec


def test_a_grown_table_has_the_rows_of_one_made_at_once() -> None:
    rope = RopeSpec("default", 10_000.0)
    positions = torch.tensor([0, 1, 1023, 1024, 5000, 9999])
    grown, whole = RopeTable(rope, 32, 10_000), RopeTable(rope, 32, 10_000)
    grown.at(torch.tensor([3]), 3)
    grown.at(torch.tensor([2000]), 2000)
    for ours, theirs in zip(grown.at(positions, 9999), whole.at(positions, 9999), strict=True):
        assert torch.equal(ours, theirs)


def test_a_position_is_turned_by_its_angle() -> None:
    cosine, sine = RopeTable(RopeSpec("default", 100.0), 4, 64).at(torch.tensor([5]), 5)
    angles = torch.tensor([5.0, 0.5])
    assert torch.allclose(cosine[0, 0], torch.cat([angles.cos(), angles.cos()]))
    assert torch.allclose(sine[0, 0], torch.cat([-angles.sin(), angles.sin()]))
