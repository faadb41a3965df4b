"""Linear layers whose rows do not depend on who shares the batch (V16).

A row of ``x @ w`` is bit-equal in every batch only if the library adds its products in one
order whatever the number of rows.  Measured with torch 2.13's MKL and oneDNN (AVX-512,
2026-11):

- ``functional.linear`` (weights [out, in]) changes its order below 6 to 16 rows;
- a product with weights stored [in, out] keeps it from 2 rows up while in <= 384 (one panel
  of the reduction), and is 4 to 7 times faster than oneDNN on small layers;
- oneDNN's packed weights keep it for every shape, at 50 us per call, but not in bfloat16 where
  the processor has AMX tiles: there the order changes with the number of rows, for most shapes
  at one number or another, and never with a row's place among a given number.

So small layers take the product and large ones packed weights; a probe at load holds the
product to it on this processor.  Where tiles are, bfloat16 rows go in panels of one size.  One
row is never computed alone: the caller pads to ``ROWS_MIN``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROWS_MIN = 2
_PANEL_MAX = 384
_PACK_ROWS = 8
_TILED_ROWS = 32
_PROBE_ROWS = (ROWS_MIN, 3, 5, 8, 16, 33)


# The packing is not public API of torch; where it is missing, plain layers serve.
_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_RUN_PACKED: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear:
    """``x @ weight.T + bias``, from weights [out, in]; holds its own copy of them."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        assert weight.dim() == 2, f"weight of {weight.dim()} dimensions"
        self._bias = bias
        self.kind = _choose(weight)
        self._is_tiled = weight.dtype == torch.bfloat16 and _has_tiles()
        self._out_count = weight.shape[0]
        if self.kind == "product":
            self._weight = weight.t().contiguous()
        elif self.kind == "packed":
            self._weight = _PACK(weight, _PACK_ROWS)
        else:
            self._weight = weight

    def __call__(self, rows: Tensor) -> Tensor:
        """Map [token_count, in] to [token_count, out]."""
        if self.kind == "product":
            if self._bias is None:
                return torch.mm(rows, self._weight)
            return torch.addmm(self._bias, rows, self._weight)
        if self.kind == "packed":
            return self._in_panels(rows) if self._is_tiled else self._packed(rows)
        return functional.linear(rows, self._weight, self._bias)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """Give ``residual + self(rows)``."""
        if self.kind == "product" and self._bias is None:
            return torch.addmm(residual, rows, self._weight)
        return residual + self(rows)

    def _packed(self, rows: Tensor) -> Tensor:
        mapped: Tensor = _RUN_PACKED(rows, self._weight, self._bias, "none", [], "")
        return mapped

    def _in_panels(self, rows: Tensor) -> Tensor:
        mapped = rows.new_empty(rows.shape[0], self._out_count)
        for start in range(0, rows.shape[0], _TILED_ROWS):
            panel = rows[start : start + _TILED_ROWS]
            count = panel.shape[0]
            if count < _TILED_ROWS:
                panel = functional.pad(panel, (0, 0, 0, _TILED_ROWS - count))
            mapped[start : start + count] = self._packed(panel)[:count]
        return mapped


def _has_tiles() -> bool:
    # Not public API of torch; where it is missing the order of additions is taken for unsafe.
    probe: Any = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    return bool(probe())


def _choose(weight: Tensor) -> str:
    if weight.dtype == torch.float32 and weight.shape[1] <= _PANEL_MAX and _is_invariant(weight):
        return "product"
    return (
        "packed"
        if _PACK is not None and _RUN_PACKED is not None and _can_run_packed(weight)
        else "plain"
    )


def _can_run_packed(weight: Tensor) -> bool:
    rows = weight.new_zeros(ROWS_MIN, weight.shape[1])
    try:
        _RUN_PACKED(rows, _PACK(weight[:1].contiguous(), _PACK_ROWS), None, "none", [], "")
    except RuntimeError:  # a build or a processor without it
        return False
    return True


def _is_invariant(weight: Tensor) -> bool:
    turned = weight.t().contiguous()
    rows = torch.sin(torch.arange(64 * weight.shape[1], dtype=torch.float32)).view(64, -1)
    whole = torch.mm(rows, turned)
    return all(torch.equal(torch.mm(rows[:count], turned), whole[:count]) for count in _PROBE_ROWS)
