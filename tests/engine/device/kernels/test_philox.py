"""The device's random numbers are the host's."""

import torch

from engine.device import philox
from engine.device.kernels import uniforms


def test_numbers_are_the_hosts_bit_for_bit(device: torch.device) -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF] * 20
    positions = [(7919 * index**3) % 2**41 for index in range(len(seeds))]
    positions[:4] = [0, 1, 2**32 - 1, 2**32]
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    seen = uniforms(
        torch.tensor(signed, device=device), torch.tensor(positions, device=device)
    ).tolist()
    wanted = [
        float(philox.uniforms(seed, position, 1)[0])
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert seen == wanted
    assert len(set(seen)) == len(seen)
