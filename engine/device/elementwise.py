"""Exponentials whose rows do not depend on who shares the batch, with any number of threads (V16).

torch computes most of a range in vectors and what is left over one by one, by another
approximation of exp.  With several threads it cuts a large tensor into as many ranges, wherever
the cut falls, so that a row's last bit could depend on how many rows there are.  Below torch's
own limit for going parallel nothing is cut: larger tensors are computed in pieces of that size,
whose borders are rows.  The threads are for the matrix products.
"""

import torch
from torch import Tensor
from torch.nn import functional

# Torch goes parallel from 32768 elements on.  A multiple of every vector's length.
_SERIAL_ELEMENTS = 16384


def silu(rows: Tensor) -> Tensor:
    """Give ``rows * sigmoid(rows)`` of [row_count, width]."""
    if torch.get_num_threads() == 1:
        return functional.silu(rows)
    count = max(1, _SERIAL_ELEMENTS // rows.shape[1])
    starts = range(0, len(rows), count)
    return torch.cat([functional.silu(rows[start : start + count]) for start in starts])


def exp2_(scores: Tensor) -> None:
    """Replace contiguous scores, a multiple of 32 of them in a row, by two to their power."""
    if torch.get_num_threads() == 1:
        scores.exp2_()
        return
    flat = scores.view(-1)
    for start in range(0, len(flat), _SERIAL_ELEMENTS):
        flat[start : start + _SERIAL_ELEMENTS].exp2_()
