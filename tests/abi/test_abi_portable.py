# SPDX-License-Identifier: Apache-2.0
"""What the portable family passes to its kernels: grids, workspace layout, strides and switches."""

import itertools
import math

import pytest

from tests.kit import abi, fake_build
from tests.kit.stub import calls

WORKSPACE = 1 << 40
NAMES = fake_build.portable_parameters(fake_build.PLAIN_KERNELS)


def run(stub, library, tmp_path, function="sagert_attention", **case):
    """Launches by role: {"grid": ..., parameter name: value, ...}."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    code = f"""
args = abi.attention_args(**{case!r})
result = [lib.attention(args, {function!r}), lib.workspace_size(args)[1], lib.error()]
"""
    status, size, text = stub.run(library, code, log=log)
    assert status == abi.OK, text
    out = {"workspace": size}
    for line in calls(log, "cuLaunchKernelEx"):
        words = line.split()
        role = next(role for role in NAMES if f"_{role}_" in words[1])
        values = [
            float(word) if "." in word or "e" in word else int(word) for word in words[words.index("params") + 1 :]
        ]
        assert len(values) == len(NAMES[role])
        out[role] = {"grid": int(words[3]), "block": int(words[5]), "stream": words[9]}
        out[role] |= dict(zip(NAMES[role], values, strict=True))
    return out


def ceil(a, b):
    return -(-a // b)


CASES = [
    dict(zip(("precision", "seqlen_q", "seqlen_k", "head_dim", "flags"), case, strict=True))
    for case in itertools.product(
        (abi.INT8_FP16, abi.INT8_FP8), (1, 1000), (1, 128, 513, 20000), (40, 64, 128), (0, abi.LSE | abi.CAUSAL)
    )
]


@pytest.mark.parametrize("case", CASES[::3] + CASES[1::7], ids=str)
def test_grids_and_layout(fake_library, stub, tmp_path, case):
    launches = run(stub, fake_library, tmp_path, **case)
    b, h, hk, s, sk, d = 2, 8, 4, case["seqlen_q"], case["seqlen_k"], case["head_dim"]
    dp, skp = (64 if d <= 64 else 128), ceil(sk, 128) * 128
    fp8, lse = case["precision"] == abi.INT8_FP8, bool(case["flags"] & abi.LSE)
    stats, kv, q, attend = (launches[role] for role in ("kv_stats", "quantize_kv", "quantize_q", "attention"))
    for launch in (stats, kv, q, attend):
        assert launch["block"] == 256
        assert launch["stream"] == "0x77"
        assert launch["hidden0"] == launch["hidden1"] == 0

    parts = stats["parts"]
    assert 1 <= parts <= 32
    assert stats["part_rows"] % 64 == 0
    assert (parts - 1) * stats["part_rows"] < sk <= parts * stats["part_rows"]  # every part has keys
    assert kv["parts"] == parts
    assert stats["grid"] == b * hk * parts
    assert kv["grid"] == b * hk * skp // 64
    assert q["grid"] == b * h * ceil(s, 64)
    assert attend["grid"] == b * h * ceil(s, 128)
    assert kv["seqlen_pad"] == kv["k_rows"] == attend["seqlen_pad"] == skp
    assert q["q_rows"] == s
    assert stats["varlen"] == kv["varlen"] == kv["keep_bad"] == q["varlen"] == 0
    assert q["group"] == attend["group"] == h // hk
    assert math.isclose(q["scale_log2"], 0.125 * math.log2(math.e), rel_tol=1e-6)
    assert attend["write_lse"] == lse
    assert attend["shift_lse"] == q["shift_lse"] == lse
    assert attend["Lse"] == (5 << 32 if lse else WORKSPACE)
    assert attend["Out"] == 4 << 32

    direct = not fp8 and d == dp
    assert kv["copy_v"] == (not fp8 and not direct)
    if direct:
        assert attend["V"] == 3 << 32
        assert attend["v_ss"] == (0 if sk == 1 else d)
    elif fp8:
        assert attend["V"] == kv["VOut"]
        assert [attend[n] for n in ("v_sb", "v_sh", "v_ss")] == [hk * dp * skp, dp * skp, skp]
    else:
        assert attend["V"] == kv["VOut"]
        assert [attend[n] for n in ("v_sb", "v_sh", "v_ss")] == [hk * skp * dp, skp * dp, dp]

    sizes = {
        "KSum": b * hk * parts * dp * 4, "VBad": b * hk * parts * 2 * dp * 4, "KShift": b * hk * dp * 4,
        "K8": b * hk * skp * dp, "KScale": b * hk * skp * 4, "VFirst": b * hk * 2 * dp * 4,
        "Q8": b * h * s * dp, "QScale": b * h * s * 4, "KBad": b * hk * parts * 4, "HeadFlags": b * hk * 4,
    }  # fmt: skip
    if fp8:
        sizes |= {"VAmax": b * hk * parts * dp * 4, "VOut": b * hk * skp * dp, "VScale": b * hk * dp * 4}
    if kv["copy_v"]:
        sizes["VOut"] = b * hk * skp * dp * 2
    if lse:
        sizes["QShift"] = b * h * s * 4
    merged = stats | kv | q | attend
    for launch in (stats, kv, q, attend):  # all agree on where a buffer is
        assert all(launch[name] == merged[name] for name in sizes if name in launch)
    end = WORKSPACE
    for name in sorted(sizes, key=lambda name: merged[name]):
        assert merged[name] % 256 == 0, name
        assert merged[name] >= end, name
        end = merged[name] + sizes[name]
    assert end <= WORKSPACE + launches["workspace"] < end + 256


def test_two_steps_are_the_whole(fake_library, stub, tmp_path):
    whole = run(stub, fake_library, tmp_path, flags=abi.LSE)
    first = run(stub, fake_library, tmp_path, "sagert_quantize", flags=abi.LSE)
    second = run(stub, fake_library, tmp_path, "sagert_attend", flags=abi.LSE)
    assert "attention" not in first
    assert set(second) == {"attention", "workspace"}
    assert first | second == whole


def test_no_smoothing(fake_library, stub, tmp_path):
    launches = run(stub, fake_library, tmp_path, flags=abi.LSE | abi.NO_SMOOTH_K)
    assert launches["quantize_kv"]["smooth_k"] == 0
    assert launches["attention"]["shift_lse"] == launches["quantize_q"]["shift_lse"] == 0
    assert launches["attention"]["write_lse"] == 1


@pytest.mark.parametrize("precision", [abi.INT8_FP16, abi.INT8_FP8])
def test_no_keys(fake_library, stub, tmp_path, precision):
    """The pre-pass still defines every scale that attention reads, from one block of padding."""
    launches = run(stub, fake_library, tmp_path, seqlen_k=0, precision=precision, flags=abi.LSE)
    assert launches["quantize_kv"]["seqlen_k"] == launches["attention"]["seqlen_k"] == 0
    assert launches["quantize_kv"]["seqlen_pad"] == 128
    assert launches["attention"]["shift_lse"] == 0
    assert launches["attention"]["write_lse"] == 1
    assert launches["attention"]["V"] == launches["quantize_kv"]["VOut"]


BSHD = [8 * 1000 * 128, 128, 8 * 128, 1]
KV_BSHD = [4 * 1100 * 128, 128, 4 * 128, 1]


@pytest.mark.parametrize(
    ("tensor", "parameter", "role", "address", "strides", "vector"),
    [
        ("q", "q_vec", "quantize_q", None, None, 1),
        ("q", "q_vec", "quantize_q", None, BSHD, 1),
        ("q", "q_vec", "quantize_q", (1 << 32) + 8, None, 0),
        ("q", "q_vec", "quantize_q", None, [8 * 1000 * 136, 1000 * 136, 136, 1], 0),
        ("q", "q_vec", "quantize_q", None, [8 * 1000 * 144, 1000 * 144, 144, 1], 1),
        ("q", "q_vec", "quantize_q", None, [2048000, 256000, 256, 2], 0),
        ("k", "k_vec", "kv_stats", None, KV_BSHD, 1),
        ("k", "k_vec", "quantize_kv", (2 << 32) + 2, None, 0),
        ("k", "k_vec", "quantize_kv", None, [0, 0, 128, 1], 1),
        ("v", "v_vec", "kv_stats", None, KV_BSHD, 1),
        ("v", "v_vec", "quantize_kv", None, [563201, 140800, 128, 1], 0),
        ("out", "o_vec", "attention", None, BSHD, 1),
        ("out", "o_vec", "attention", (4 << 32) + 2, None, 0),
        ("out", "o_vec", "attention", None, [1024000, 128000, 1, 1000], 0),
    ],
)
def test_vector_switches(fake_library, stub, tmp_path, tensor, parameter, role, address, strides, vector):
    launches = run(stub, fake_library, tmp_path, **{tensor: [address, strides]}, precision=abi.INT8_FP16)
    assert launches[role][parameter] == vector
    if tensor == "v":
        assert launches["quantize_kv"]["copy_v"] == 1 - vector


def test_strides_of_single_element_dimensions_do_not_matter(fake_library, stub, tmp_path):
    odd = [12345, 12345, 12345, 1]
    case = {"batch": 1, "heads_q": 1, "heads_kv": 1, "seqlen_q": 1, "seqlen_k": 1, "precision": abi.INT8_FP16}
    launches = run(stub, fake_library, tmp_path, **case, **{name: [None, odd] for name in ("q", "k", "v", "out")})
    assert launches["quantize_q"]["q_vec"] == launches["kv_stats"]["k_vec"] == launches["attention"]["o_vec"] == 1
    assert launches["quantize_kv"]["copy_v"] == 0
    assert launches["attention"]["v_sb"] == launches["attention"]["o_ss"] == 0
