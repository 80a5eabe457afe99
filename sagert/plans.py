# SPDX-License-Identifier: Apache-2.0
"""Plans: calls prepared once, for others of the same shapes, strides, options and device."""

from __future__ import annotations

import ctypes
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagert import native
from sagert.errors import InvalidArgumentError
from sagert.settings import SETTINGS

_STRICT = SETTINGS.strict
_VECTOR = 15  # low bits of an address that decide how a kernel may load
_PLANS_MAX = 512  # per thread, of some 2 KB each

_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
increment_version: Any = getattr(getattr(torch.autograd, "graph", None), "increment_version", None)

_empty_strided = torch.empty_strided
_current_device: Any = getattr(torch._C, "_cuda_getDevice", lambda: -1)  # no tensor is on device -1


def _empty_on_current(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _empty_strided(shape, stride, dtype=dtype, device="cuda")


# What the code that torch.compile makes allocates with: half of torch.empty_strided's cost, on the current device only.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_current: Any = getattr(_guards, "_empty_strided_cuda", _empty_on_current)
# torch.cuda.caching_allocator_alloc without its choice of a device and a stream: a workspace need be no tensor.
_allocate_current: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)
_free: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", None)


def stream_of(index: int) -> int:
    """CUstream of torch's current stream on a device."""
    return int(torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index))


def index_of(tensor: Tensor) -> int:
    """CUDA ordinal of a tensor's device."""
    index: int = tensor.device.index
    return index


def workspace_size(arguments: native.Arguments) -> int:
    """Bytes of workspace. The row is selected for it, so a refusal surfaces here, before anything is launched."""
    need = ctypes.c_uint64()
    status = (native._lib or native.library()).sagert_workspace_size(arguments.address, ctypes.addressof(need))
    if status:
        raise native.error(status)
    return need.value


class Plan:
    """One prepared call: validated, selected and packed; its pointers and stream change from call to call.

    The workspace's size depends on shapes, strides, options and device, which the plan's key holds, and on the
    alignment of the inputs: the plan's is for aligned ones, and the library is asked for others.
    """

    __slots__ = (
        "address", "alone", "arguments", "details", "device", "extents", "half", "index", "lse", "memory", "out",
        "place", "run", "size", "words",
    )  # fmt: skip

    def __init__(
        self,
        arguments: native.Arguments,
        size: int,
        tensors: tuple[tuple[int, Tensor], ...],
        out: Tensor,
        lse: Tensor | None,
        index: int,
        *,
        place: int = native.OUT,
        run: str = "sagert_attention",
        details: Any = None,
    ) -> None:
        """`tensors` are the inputs and the words their addresses go to; `out` is in the caller's layout.

        Another entry point `run` writes what belongs in another `place`. `details` are the caller's own.
        """
        self.arguments, self.size, self.index = arguments, size, index
        self.address, self.memory = arguments.address, arguments.words
        self.words, self.place, self.details = tuple(word for word, _ in tensors), place, details
        self.device = out.device
        self.alone = out.is_cuda and torch.cuda.device_count() == 1
        self.half = tensors[0][1].dtype is torch.float16
        self.out = (tuple(out.shape), out.stride(), out.dtype)
        self.extents = tuple(_extent(tensor) for tensor in (out, *(tensor for _, tensor in tensors)))
        self.lse = None if lse is None else (tuple(lse.shape), lse.stride(), lse.dtype)
        self.run = getattr(native.library(), run)

    def empty(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the plan's device, whatever the current one."""
        return _empty_strided(shape, stride, dtype=dtype, device=self.device)

    def allocate(self, size: int, stream: int) -> int:
        """Address of torch's memory on the plan's device, whatever the current one: for work on the stream."""
        address: int = torch.cuda.caching_allocator_alloc(size, self.index, stream)
        return address

    def launch(self, tensors: tuple[Tensor, ...], out: Tensor | None = None) -> Any:
        """The call with other tensors of the same key; `out` too is of the key."""
        memory = self.memory
        is_current = self.alone or _current_device() == self.index
        empty = _empty_current if is_current else self.empty
        low_bits = 0
        for word, tensor in zip(self.words, tensors):  # noqa: B905 - equally long by the key; strict costs
            memory[word] = address = tensor.data_ptr()
            low_bits |= address
        if out is None:
            out = empty(*self.out)
            memory[self.place] = out.data_ptr()
        else:
            memory[self.place] = start = out.data_ptr()
            end = start + self.extents[0]
            for word, extent in zip(self.words, self.extents[1:]):  # noqa: B905
                first = memory[word]
                if first < end and start < first + extent:
                    raise InvalidArgumentError("out shares memory with an input: give it memory of its own")
            if increment_version is not None and not out.is_inference():
                increment_version(out)
        lse = None
        if self.lse is not None:
            lse = empty(*self.lse)
            memory[28] = lse.data_ptr()  # native.LSE and so on, written out because this is the hot path
        size = workspace_size(self.arguments) if low_bits & _VECTOR else self.size
        memory[31] = stream = stream_of(self.index) if _raw_stream is None else _raw_stream(self.index)
        workspace = 0
        try:
            if size:
                workspace = (_allocate_current if is_current else self.allocate)(size, stream)
                memory[29], memory[30] = workspace, size
            status = self.run(self.address)
        finally:  # what the stream's later work is given, it gets after this call's kernels
            if workspace:
                _free(workspace)
        if status:
            raise native.error(status)
        if _STRICT:
            torch.cuda.synchronize(self.device)
        return out if lse is None else (out, lse)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Plans(threading.local):
    """The plans of one thread by their keys: their structs may not be shared."""

    def __init__(self) -> None:
        self.by_key: dict[Any, Plan] = {}


PLANS = _Plans()


def tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """What a plan's key holds of a tensor.

    A contiguous tensor's strides follow from its shape, but for those of single-element dimensions, which mean nothing.
    """
    return tensor.shape, tensor.is_contiguous() or tensor.stride(), tensor.dtype, tensor.get_device()


def is_aligned(*tensors: Tensor) -> bool:
    """Whether a plan, which is made for tensors at aligned addresses, also is for these."""
    low_bits = 0
    for tensor in tensors:
        low_bits |= tensor.data_ptr()
    return not low_bits & _VECTOR


class Keep(NamedTuple):
    """The caller's wish to keep a call as a Plan: under `key`, which stands for all but what the tensors hold."""

    key: Any
    layout: str = "BHSD"
    details: Any = None

    def plan(
        self,
        arguments: native.Arguments,
        size: int,
        tensors: tuple[tuple[int, Tensor | None], ...],
        out: Tensor,
        lse: Tensor | None = None,
        **target: Any,
    ) -> None:
        """Keeps a call that was just made, if its tensors are aligned, as most are. `target`: Plan's place and run."""
        given = tuple((word, tensor) for word, tensor in tensors if tensor is not None)
        if not is_aligned(*(tensor for _, tensor in given)):
            return
        plans = PLANS.by_key
        if len(plans) >= _PLANS_MAX:  # lengths that grow call by call leave plans that no call needs again
            plans.clear()
        made = out.transpose(1, 2) if self.layout == "BSHD" else out
        plans[self.key] = Plan(arguments, size, given, made, lse, index_of(out), details=self.details, **target)
