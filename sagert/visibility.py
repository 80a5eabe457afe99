# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see: causality, alignment and window as two limits on the distance between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sagert.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

ALIGNMENTS = ("top_left", "bottom_right")


class Pattern(NamedTuple):
    """Causality and window of a call; -1 is an unbounded side of the window."""

    is_causal: bool = False
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False

    @property
    def sees_all(self) -> bool:
        """Whether no key is hidden from any query."""
        return not self.is_causal and self.window_left < 0 and self.window_right < 0

    def limits(self, seqlen_q: int, seqlen_k: int) -> tuple[int | None, int | None]:
        """(low, high): query i sees key j where i + low <= j <= i + high; None is no limit."""
        shift = seqlen_k - seqlen_q if self.bottom_right else 0
        low = shift - self.window_left if self.window_left >= 0 else None
        high = shift + self.window_right if self.window_right >= 0 else None
        if self.is_causal:
            high = shift  # no window reaches less far to the right
        return low, high

    def hidden(self, queries: Tensor, keys: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor | None:
        """bool [queries, keys], True where a query may not see a key; None where nothing is hidden.

        `queries` and `keys` are 1-D tensors of positions in sequences of the given lengths.
        """
        low, high = self.limits(seqlen_q, seqlen_k)
        distance = keys[None, :] - queries[:, None]
        hidden = None if low is None else distance < low
        if high is not None:
            beyond = distance > high
            hidden = beyond if hidden is None else hidden | beyond
        return hidden


def pattern(is_causal: bool, window: Any, causal_alignment: str) -> Pattern:
    """The Pattern of a call's arguments; InvalidArgumentError for a malformed one."""
    if causal_alignment not in ALIGNMENTS:
        raise InvalidArgumentError(
            f"causal_alignment={causal_alignment!r} is not an alignment: use 'top_left' or 'bottom_right'"
        )
    left = right = -1
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise InvalidArgumentError(
                f"window={window!r}: give (left, right), keys before and after the query's own; None or -1 is unbounded"
            )
        left, right = (_side(name, side) for name, side in zip(("left", "right"), window, strict=True))
    return Pattern(bool(is_causal), left, right, causal_alignment == "bottom_right")


def _side(name: str, value: Any) -> int:
    """One side of a window; -1 for None."""
    if value is None:
        return -1
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < -1:
        raise InvalidArgumentError(
            f"window's {name} is {value!r}: give a whole number of keys, 0 or more, or None or -1 for no limit"
        )
    side: int = value  # symbolic under torch.compile, so not converted
    return side


def segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The packed rows of q and of k that belong to each sequence; waits for the device."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        yield slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
