# SPDX-License-Identifier: Apache-2.0
"""The package over the real library and a stub of the driver: the library takes what the package packs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("torch")

# CPU tensors take the CUDA path; memory is aligned as CUDA's allocator aligns it.
PROGRAM = """
import json, torch, sagert
from sagert import ops, plans, quantized

def aligned(size):
    memory = torch.empty(int(size) + 256, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    return memory[start : start + int(size)]

new_empty, empty_strided = torch.Tensor.new_empty, torch.empty_strided
torch.Tensor.new_empty = lambda t, size, **o: (
    aligned(size) if o.get("dtype") is torch.uint8 else new_empty(t, size, **o)
)
plans._empty_strided = lambda size, stride, dtype, device: (
    aligned(size[0]) if dtype is torch.uint8 else empty_strided(size, stride, dtype=dtype)
)
plans.Plan.allocate, plans._free = lambda plan, size, stream: 1 << 20, lambda address: None  # the stub reads no memory
plans.stream_of, plans.index_of, plans._raw_stream = lambda index: 0, lambda tensor: 0, None
ops.is_direct = lambda *tensors: True
quantized.autocast = lambda place, *tensors: tensors

class Place:
    type, index = "cuda", 0

class OnDevice(torch.Tensor):
    device = Place()

    def clone(self, **options):
        return self.as_subclass(torch.Tensor).clone(**options).as_subclass(OnDevice)

def plain(tensor):
    return None if tensor is None else tensor.as_subclass(torch.Tensor)

rows = sagert.kernels()
results = {}
for precision in ("auto", "int8_fp16", "int8_fp8", "int8_int8"):
    q, k, v = (torch.randn(1, 4, length, 64, dtype=torch.bfloat16) for length in (128, 300, 300))
    shapes = [tuple(sagert.attention(q, k, v, precision=precision).shape) for _ in range(2)]
    kv = sagert.quantize_kv(k.as_subclass(OnDevice), v.as_subclass(OnDevice), precision=precision)
    kv.data, kv.v = plain(kv.data), plain(kv.v)
    shapes += [tuple(sagert.attention(q, kv, is_causal=causal).shape) for causal in (False, True, True)]
    results[precision] = {
        "shapes": shapes, "row": rows[kv.row].precision, "precision": kv.precision, "bytes": kv.nbytes,
        "plans": len(plans.PLANS.by_key), "keeps_v": kv.v is not None,
    }
    plans.PLANS.by_key.clear()
print(json.dumps(results))
"""


def test_every_precision_on_a_stub_of_the_driver(stub, library, subprocess_environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**subprocess_environment, "LD_LIBRARY_PATH": str(stub.folder), "STUB_CAPABILITY": "90"},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    keys = 4 * 300
    for precision, result in results.items():
        assert result["shapes"] == [[1, 4, 128, 64]] * 5
        assert result["row"] == result["precision"]
        assert precision in ("auto", result["precision"])
        # Of a call and of the two ways to use quantized keys; of quantizing them, unless V is copied.
        assert result["plans"] == (3 if result["keeps_v"] else 4)
        assert result["keeps_v"] == (result["precision"] == "int8_fp16")
        assert keys * 64 * 2 < result["bytes"] < keys * 64 * 4
