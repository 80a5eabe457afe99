# SPDX-License-Identifier: Apache-2.0
"""What the public functions share: autocast, and what no kernel and no operator can carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagert import fallback, ops
from sagert.codes import PRECISIONS, precision_code
from sagert.errors import UnsupportedError
from sagert.settings import SETTINGS

_AUTO = PRECISIONS[SETTINGS.precision or "auto"]


def precision_of(name: str) -> int:
    """Number of a precision; "auto" is what SAGERT_PRECISION says."""
    return _AUTO if name == "auto" else precision_code(name)


def autocast(place: Any, *tensors: Any) -> tuple[Any, ...]:
    """The tensors as scaled_dot_product_attention would take them under torch.autocast of q's device."""
    if not isinstance(place, Tensor):
        return tensors  # named by the checks of form
    kind = place.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible and tensor.device.type == kind else tensor

    return tuple(cast(tensor) for tensor in tensors)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether the result would have to be differentiable."""
    given = [t for t in tensors if t is not None]
    asked = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return asked or ops.has_tangent(*given)


def obstacles(dropout_p: float, grad: bool) -> list[tuple[str, str]]:
    """What the operators cannot carry and this call asks for, each with the change that helps."""
    asked = []
    if dropout_p > 0:
        asked.append((f"dropout_p={dropout_p}", "set dropout_p to 0"))
    if grad:
        what = "a differentiable result (an input requires grad and backward is not implemented)"
        asked.append((what, "call under torch.no_grad()"))
    if ops.in_transform():
        asked.append((ops.NO_TRANSFORM, "give the mapped dimension as the batch dimension"))
    return asked


def refuse(
    asked: list[tuple[str, str]],
    sdpa: Callable[[], Tensor] | None,
    explain: Callable[[], Any] | None,
    advice: str = 'or pass fallback="sdpa"',
) -> Tensor:
    """`sdpa`'s result, counted as a fallback, or UnsupportedError with the reasons: on CUDA the library's too."""
    summary = "no kernel row serves " + " or ".join(what for what, _ in asked)
    reason = f"{summary}: {', '.join(fix for _, fix in asked)}" + (f", {advice}" if advice else "")
    if sdpa is not None:
        if not torch.compiler.is_compiling():
            fallback.record(reason)
        return sdpa()
    if explain is not None and not torch.compiler.is_compiling() and not ops.in_transform():
        reason = f"{reason}\n{explain()}"
    raise UnsupportedError(reason)
