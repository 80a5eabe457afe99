# SPDX-License-Identifier: Apache-2.0
"""What a call asks beyond its tensors: the trailing arguments of every operator, in the operators' order."""

from __future__ import annotations

from typing import NamedTuple

from sagert import codes
from sagert.visibility import Pattern

SCHEMA = (
    "float scale, bool is_causal, int precision, bool smooth_k, bool return_lse, bool fallback_sdpa=False, "
    "SymInt window_left=-1, SymInt window_right=-1, bool bottom_right=False"
)


class Options(NamedTuple):
    """The arguments of SCHEMA; torch leaves out those that have their default value."""

    scale: float
    is_causal: bool
    precision: int
    smooth_k: bool
    return_lse: bool
    fallback_sdpa: bool = False
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False

    @property
    def pattern(self) -> Pattern:
        """Which keys a query may see."""
        return Pattern(self.is_causal, self.window_left, self.window_right, self.bottom_right)

    @property
    def has_window(self) -> bool:
        """Whether a side of the window is bounded."""
        return self.window_left >= 0 or self.window_right >= 0

    @property
    def flags(self) -> int:
        """SAGERT_FLAG_* of these options."""
        # Without causality or a window there is nothing to align.
        aligned = self.bottom_right and (self.is_causal or self.has_window)
        return (
            (codes.FLAG_CAUSAL if self.is_causal else 0)
            | (codes.FLAG_LSE if self.return_lse else 0)
            | (0 if self.smooth_k else codes.FLAG_NO_SMOOTH_K)
            | (codes.FLAG_WINDOW if self.has_window else 0)
            | (codes.FLAG_BOTTOM_RIGHT if aligned else 0)
        )
