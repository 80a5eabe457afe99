# SPDX-License-Identifier: Apache-2.0
"""A small kernels folder, with kernels that compile in a second, for the tests of the build tools."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Last, behind the installed wheel: only build_tools is to be found in the clone.
sys.path.append(str(Path(__file__).resolve().parents[3]))

TINY = """# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl
from helper import twice


@triton.jit
def stats(X, Y, n, D: tl.constexpr):
    i = tl.arange(0, D)
    tl.store(Y + i, twice(tl.load(X + i, mask=i < n, other=0.0)).to(tl.float32))


@triton.jit
def attend(Q, K, Out, n, D: tl.constexpr, CAUSAL: tl.constexpr):
    i = tl.arange(0, 64)
    j = tl.arange(0, D)
    q = tl.load(Q + i[:, None] * D + j[None, :])
    k = tl.load(K + i[None, :] * D + j[:, None])
    s = tl.dot(q, k).to(tl.float32)
    if CAUSAL:
        s = tl.where(i[:, None] >= i[None, :], s, 0.0)
    tl.store(Out + i[:, None] * 64 + i[None, :], s.to(Out.dtype.element_ty), mask=i[:, None] < n)


@triton.jit
def spills(Q, K, Out, n, D: tl.constexpr, CAUSAL: tl.constexpr):
    i = tl.arange(0, 4096)
    a = tl.load(Out + i).to(tl.float32)
    b = tl.load(Out + 4096 + i).to(tl.float32)
    for _ in range(n):
        a, b = a * b + tl.sum(b), b * a + tl.sum(a)
    tl.store(Out + i, (a + b).to(Out.dtype.element_ty))
"""
HELPER = """# SPDX-License-Identifier: Apache-2.0
import triton


@triton.jit
def twice(x):
    return x + x
"""
TEMPLATES = """
schema = 1

[[kernel]]
id = "tiny.stats"
role = "kv_stats"
compiler = "triton"
source = "portable/tiny.py:stats"
args = { X = "*io", Y = "*fp32", n = "i32" }
aligned = ["X", "Y"]
constants = { D = "$head_dim" }
tile = 64

[[kernel]]
id = "tiny.attend"
role = "attention"
compiler = "triton"
source = "portable/tiny.py:attend"
args = { Q = "*qk", K = "*qk", Out = "*io", n = "i32" }
aligned = ["Q", "K", "Out"]
constants = { D = "$head_dim", CAUSAL = "$causal" }
tile = "$block_m"

[[kernel]]
id = "tiny.spills"
role = "attention"
compiler = "triton"
source = "portable/tiny.py:spills"
args = { Q = "*qk", K = "*qk", Out = "*io", n = "i32" }
constants = { D = "$head_dim", CAUSAL = "$causal" }
tile = 64
"""
ARCH = """
schema = 1

[arch]
name = "sm80"
target = "sm_80"
triton_capability = 80
runs_on = ["8.0", "8.7"]
driver_min = 12000
shared_limit = 166912

[[row]]
id = "sm80.tiny.int8_fp16"
family = "portable"
precision = "int8_fp16"
rank = 100
accuracy = { class = "high", rel_l1_randn = 0.0135 }
quant = { qk = "int8" }
requires = { head_dim_max = 64, seqlen_max = 1024, flags = ["causal", "lse"] }
axes = { head_dim = [32, 64], causal = [false, true], dtype = ["fp16"] }
options = { qk = "i8" }

[[row.kernel]]
use = "tiny.stats"
num_warps = 4

[[row.kernel]]
use = "tiny.attend"
num_warps = 4
options = { block_m = [{ causal = true, value = 32 }, { value = 64 }] }
gates = { require = ["IMMA"], forbid = ["HMMA", "IGMMA"] }

[[absent]]
precision = "int8_fp8"
reason = "no FP8 tensor cores"
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A kernels folder with one architecture, one row, two triton kernels."""
    folder = tmp_path / "kernels"
    for name, text in {
        "portable/tiny.py": TINY,
        "portable/helper.py": HELPER,
        "portable/manifest.toml": TEMPLATES,
        "sm80/manifest.toml": ARCH,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
