# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the library, which records what it is given."""

from __future__ import annotations

import ctypes

from sagert import native

NONE = (0, 0, 0, 0, 0)  # a sagert_tensor that is not there


class Recorder:
    """Stands in for the library: records the struct, answers as told."""

    def __init__(self, size_status=0, status=0, size=4096, row=6, reads_v=False):
        self.size_status, self.status, self.size, self.row, self.reads_v = size_status, status, size, row, reads_v
        self.seen = []
        self.workspaces, self.held = [], []  # (size, stream) of all that plans took; addresses of those they hold

    def allocate(self, size, stream):
        self.workspaces.append((size, stream))
        self.held.append(1 << 20 | len(self.workspaces) << 8)
        return self.held[-1]

    def free(self, address):
        self.held.remove(address)

    def record(self, name, address):
        plain = native.ARGS.unpack(ctypes.string_at(address, native.ARGS.size))
        features = native.FEATURES.unpack(ctypes.string_at(address + native.ARGS.size, native.FEATURES.size))
        self.seen.append((name, plain, features))

    def sagert_workspace_size(self, address, result):
        self.record("size", address)
        ctypes.c_uint64.from_address(result).value = self.size
        return self.size_status

    def sagert_attention(self, address):
        self.record("run", address)
        return self.status

    def sagert_kv_plan(self, address, info):
        self.record("plan", address)
        info._obj.bytes, info._obj.row, info._obj.reads_v = self.size, self.row, self.reads_v
        return self.size_status

    def sagert_quantize_kv(self, address):
        self.record("quantize", address)
        return self.status

    def sagert_last_error(self):
        return b"every row said no"

    def names(self):
        return [name for name, _, _ in self.seen]
