# SPDX-License-Identifier: Apache-2.0
"""Malformed arguments are refused before anything is launched, naming the argument and its value."""

import json
import math

import pytest

from tests.kit import abi

BIG = 2**62
NORMAL = [8 * 1000 * 128, 1000 * 128, 128, 1]

# changes to a good call, and words of the message
BAD = [
    ({"heads_q": 0}, "heads_q is 0"),
    ({"heads_q": -8}, "heads_q is -8"),
    ({"heads_kv": 0}, "heads_kv is 0"),
    ({"heads_kv": -1}, "heads_kv is -1"),
    ({"heads_kv": 3}, "multiple of heads_kv"),
    ({"batch": -1}, "batch is -1"),
    ({"seqlen_q": -5}, "seqlen_q is -5"),
    ({"seqlen_k": -5}, "seqlen_k is -5"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": -64, "head_dim_v": 64}, "head_dim is -64"),
    ({"head_dim_v": 0}, "head_dim_v is 0"),
    ({"batch": 2**40, "seqlen_q": 2**40}, "overflows 64 bits"),
    ({"seqlen_k": 2**60}, "overflows 64 bits"),
    ({"dtype": 0}, "dtype is 0"),
    ({"dtype": 9}, "dtype is 9"),
    ({"precision": -1}, "precision is -1"),
    ({"precision": 8}, "precision is 8"),
    ({"flags": 1 << 10}, "bits that this library does not know: 1024"),
    ({"flags": 1 << 31}, "does not know"),
    ({"flags": abi.MASK}, "mask_dtype is 0"),
    ({"flags": abi.MASK, "mask_dtype": 5}, "mask_dtype is 5"),
    ({"flags": abi.WINDOW, "window_left": -2}, "window_left is -2"),
    ({"flags": abi.WINDOW, "window_right": -7}, "window_right is -7"),
    ({"row": -1}, "row is -1"),
    ({"row": 1 << 20}, "row is 1048576"),
    ({"scale": math.nan}, "scale is nan"),
    ({"scale": math.inf}, "scale is inf"),
    ({"scale": -math.inf}, "scale is -inf"),
    ({"scale": 1e39}, "scale is 1e+39"),
    ({"device": 1}, "the only device is 0"),
    ({"device": -1}, "device is -1"),
    ({"q": [1, NORMAL]}, "q.data is not aligned"),
    ({"v": [(3 << 32) + 1, None]}, "v.data is not aligned"),
    ({"out": [(4 << 32) + 1, None]}, "out.data is not aligned"),
    ({"q": [None, [BIG, 128, 128, 1]], "batch": 9}, "q.stride[0]"),
    ({"k": [None, [0, BIG, 128, 1]]}, "k.stride[1]"),
    ({"v": [None, [0, 0, -BIG, 1]]}, "v.stride[2]"),
    ({"out": [None, [0, 128000, 128, 1]]}, "out.stride[0] is 0"),
    ({"out": [None, [1024000, 0, 128, 1]]}, "out.stride[1] is 0"),
    ({"out": [None, [1024000, 128000, 0, 1]]}, "out.stride[2] is 0"),
    ({"out": [None, [1024000, 128000, 128, 0]]}, "out.stride[3] is 0"),
    ({"flags": abi.LSE, "lse": None}, "lse is NULL"),
    ({"flags": abi.LSE, "lse": 6}, "lse is not aligned"),
    ({"workspace": None}, "workspace is NULL"),
    ({"workspace": (1 << 40) + 128}, "workspace is not aligned to 256"),
    ({"workspace_size": 1000}, "workspace_size is 1000 bytes, but"),
]

GOOD = [
    {"batch": 0},
    {"seqlen_q": 0},
    {"batch": 0, "q": [0, None]},
    {"seqlen_k": 0},
    {"batch": 1, "out": [None, [0, 128000, 128, 1]]},
    {"q": [None, [0, 0, 0, 0]]},
    {"k": [None, [-1024000, -128000, -128, -1]]},
    {"k": [2, None]},
    {"lse": None},
    {"scale": 0.0},
    {"scale": -1.0},
    {"head_dim": 1},
    {"head_dim": 72, "flags": abi.CAUSAL | abi.LSE | abi.NO_SMOOTH_K},
    {"heads_kv": 1},
    {"heads_kv": 8},
]


def _run(stub, library, cases, log=None):
    code = f"""
result = []
nan, inf = float("nan"), float("inf")
for case in {cases!r}:
    status = lib.attention(abi.attention_args(**case))
    result.append([status, lib.error() if status else ""])
"""
    return stub.run(library, code, log=log)


@pytest.fixture(scope="module")
def refusals(fake_library, stub, tmp_path_factory):
    log = tmp_path_factory.mktemp("bad") / "log"
    results = _run(stub, fake_library, [case for case, _ in BAD], log)
    return results, log.read_text()


@pytest.mark.parametrize("index", range(len(BAD)), ids=[json.dumps(case[0]) for case in BAD])
def test_bad(refusals, index):
    status, text = refusals[0][index]
    assert status == abi.INVALID_ARGUMENT
    assert BAD[index][1] in text


def test_bad_launches_nothing(refusals):
    assert "cuLaunchKernelEx" not in refusals[1]


def test_good(fake_library, stub):
    assert _run(stub, fake_library, GOOD) == [[abi.OK, ""]] * len(GOOD)


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_null_tensors(fake_library, stub, name):
    code = f"""
args = abi.attention_args()
args.{name}.data = None
result = [lib.attention(args), lib.error(), lib.workspace_size(args)[0]]
"""
    result = stub.run(fake_library, code)
    assert result[0] == abi.INVALID_ARGUMENT
    assert f"{name}.data is NULL" in result[1]
    assert result[2] == abi.OK


@pytest.mark.parametrize("case", [{"batch": 0}, {"seqlen_q": 0}])
def test_nothing_to_compute_launches_nothing(fake_library, stub, tmp_path, case):
    code = f"""
args = abi.attention_args(**{case!r}, workspace=None, workspace_size=0)
result = [lib.workspace_size(args), lib.attention(args)]
"""
    assert stub.run(fake_library, code, log=tmp_path / "log") == [[abi.OK, 0], abi.OK]
    assert "cuLaunchKernelEx" not in (tmp_path / "log").read_text()


def test_workspace_size_is_exactly_what_is_accepted(fake_library, stub):
    code = """
result = []
for case in ({}, {"seqlen_q": 1, "seqlen_k": 1}, {"flags": LSE}, {"precision": INT8_FP16}, {"head_dim": 40}):
    size = lib.workspace_size(abi.attention_args(**case))[1]
    exact = lib.attention(abi.attention_args(**case, workspace_size=size))
    result.append([size > 0, exact, lib.attention(abi.attention_args(**case, workspace_size=size - 1))])
"""
    assert stub.run(fake_library, code) == [[True, abi.OK, abi.INVALID_ARGUMENT]] * 5


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [("capability", 0, "capability is 0"), ("capability", 9000, "such as 90"), ("driver_version", 12, "such as 12080"),
     ("reserved", 1, "device.reserved is 1")],
)  # fmt: skip
def test_bad_device(lib, field, value, text):
    dev = abi.device()
    setattr(dev, field, value)
    assert lib.select(abi.request(), dev)[0] == abi.INVALID_ARGUMENT
    assert text in lib.error()


def test_bad_request_reserved(lib):
    assert lib.select(abi.request(reserved=1), abi.device())[0] == abi.INVALID_ARGUMENT
    assert "request.reserved is 1" in lib.error()
