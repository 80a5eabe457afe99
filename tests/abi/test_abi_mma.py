# SPDX-License-Identifier: Apache-2.0
"""What the mma family passes to its kernels: launches, grids, workspace layout, V as attention reads it."""

import itertools
import math

import pytest

from tests.kit import abi, fake_build
from tests.kit.stub import calls

WORKSPACE = 1 << 40
CAPABILITY = 110
SCALED = 111  # of a row whose V is fp16 with scales
NAMES = fake_build.mma_parameters()
ROLES = ["kv_stats", "quantize_kv", "attention"]
PRECISIONS = (abi.INT8_FP16, abi.INT8_FP8, abi.INT8_INT8)
IN_BOTH = ("K", "V", "KSum", "VStats", "PartBad", "PartFirst", "seqlen_k", "parts", "part_rows", "v_stats", "k_vec")


def run(stub, library, tmp_path, function="sagert_attention", l2=60 << 20, capability=CAPABILITY, **case):
    """Launches in order, {role: {"grid": ..., parameter name: value, ...}}, and the workspace's size."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    code = f"""
args = abi.attention_args(**{case!r})
result = [lib.attention(args, {function!r}), lib.workspace_size(args)[1], lib.error()]
"""
    status, size, text = stub.run(library, code, log=log, STUB_CAPABILITY=capability, STUB_L2=l2)
    assert status == abi.OK, text
    launches = {}
    for line in calls(log, "cuLaunchKernelEx"):
        words = line.split()
        role = next(role for role in NAMES if f"_{role}_" in words[1])
        start = words.index("params") + 1
        values = [float(word) if "." in word or "e" in word else int(word) for word in words[start:]]
        fields = ("grid", "height", "stream", "cluster", "dependent")
        launches[role] = {field: words[words.index(field) + 1] for field in fields}
        launches[role] |= dict(zip(NAMES[role], values, strict=True))
    return launches, size


def ceil(a, b):
    return -(-a // b)


CASES = [
    dict(zip(("precision", "seqlen_q", "seqlen_k", "head_dim", "flags"), case, strict=True))
    for case in itertools.product(
        PRECISIONS, (1, 1000, 5000), (1, 64, 65, 1000, 40000), (40, 64, 128), (0, abi.LSE | abi.CAUSAL)
    )
]


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_grids_and_layout(fake_library, stub, tmp_path, case):
    launches, size = run(stub, fake_library, tmp_path, **case)
    assert list(launches) == ROLES
    stats, kv, attend = launches.values()
    b, h, hk, s, sk, d = 2, 8, 4, case["seqlen_q"], case["seqlen_k"], case["head_dim"]
    dp, blocks = (64 if d <= 64 else 128), ceil(sk, 64)
    precision, causal = case["precision"], bool(case["flags"] & abi.CAUSAL)
    io = precision == abi.INT8_FP16
    assert all(
        (x["height"], x["cluster"], x["dependent"], x["stream"]) == ("1", "1", "0", "0x77") for x in launches.values()
    )

    # Parts cover the keys, each of them some, in steps of 128 keys.
    parts, rows = kv["parts"], kv["part_rows"]
    assert rows % 128 == 0
    assert (parts - 1) * rows < sk <= parts * rows
    assert 1 <= parts <= 32
    assert all(stats[name] == kv[name] for name in IN_BOTH)
    with_v = not io or causal
    copy = io and d != dp  # attention reads whole rows of its own size
    v_jobs = with_v or copy
    assert [kv[name] for name in ("v_jobs", "v_stats", "copy_v", "smooth_k")] == [v_jobs, with_v, copy, 1]
    assert [int(x["grid"]) for x in (stats, kv)] == [b * hk * parts * (1 + jobs) for jobs in (with_v, v_jobs)]
    assert kv["blocks"] == attend["blocks"] == blocks
    assert (attend["tiles"], attend["heads_total"]) == (ceil(s, 128), b * h)
    assert int(attend["grid"]) == b * h * ceil(s, 128)
    kv_bytes = blocks * 64 * dp * (3 if io else 2)
    assert attend["section"] == min(max(1, (24 << 20) // kv_bytes) * 2, b * h)
    assert (kv["heads_kv"], attend["heads_q"], attend["group"]) == (hk, h, 2)
    assert kv["head_dim"] == kv["head_dim_v"] == attend["head_dim"] == attend["head_dim_v"] == d
    assert math.isclose(attend["scale_log2"], 0.125 * math.log2(math.e), rel_tol=1e-6)
    assert attend["write_lse"] == causal
    assert attend["Lse"] == (5 << 32 if causal else WORKSPACE)
    assert (attend["Q"], kv["K"], kv["V"], attend["Out"]) == (1 << 32, 2 << 32, 3 << 32, 4 << 32)
    assert [attend[f"q_s{axis}"] for axis in "bhsd"] == [h * s * d, s * d, 0 if s == 1 else d, 1]
    assert [kv[f"k_s{axis}"] for axis in "bhsd"] == [hk * sk * d, sk * d, 0 if sk == 1 else d, 1]

    heads = b * hk
    sizes = {
        "K8": heads * blocks * 64 * dp, "KScale": heads * blocks * 16, "KBad": heads * blocks * 16,
        "KShift": heads * dp * 4, "HeadFlags": heads * 8, "KSum": heads * parts * dp * 4,
    }  # fmt: skip
    if io:
        sizes["KNorm"] = heads * 32 * 4  # bounds of the keys' norms
    if copy:
        sizes["V8"] = heads * blocks * 64 * dp * 2
    if not io:
        sizes |= {"V8": heads * blocks * 64 * dp, "VMean": heads * dp * 4, "VScale": heads * dp * 4}
    if precision == abi.INT8_INT8:
        sizes["VScale"] = heads * blocks * dp * 2
    if with_v:
        sizes |= {"VFirst": heads * 2 * dp * 4, "VStats": heads * parts * 4 * dp * 4}
        sizes |= {"PartFirst": heads * parts * 2 * dp * 4, "PartBad": heads * parts * 4}
    assert all(attend[name] == kv[name] for name in sizes if name in attend)
    end = WORKSPACE
    for name in sorted(sizes, key=kv.__getitem__):
        assert kv[name] % 256 == 0, name
        assert kv[name] >= end, name
        end = kv[name] + sizes[name]
    assert end <= WORKSPACE + size < end + 256


@pytest.mark.parametrize(
    ("head_dim", "stored"), [(40, 64), (64, 64), (80, 128), (96, 128), (104, 128), (128, 128), (136, 256), (256, 256)]
)
def test_scaled_values_stand_in_rows(fake_library, stub, tmp_path, head_dim, stored):
    """Rows of K8 and of V in fp16 have as many channels as the pre-pass stores: attention multiplies fewer of 96."""
    case = {"precision": abi.INT8_FP16, "seqlen_k": 1000, "head_dim": head_dim, "capability": SCALED}
    launches, size = run(stub, fake_library, tmp_path, **case)
    stats, kv, attend = launches.values()
    assert (stats["v_stats"], kv["v_jobs"], kv["v_stats"], kv["copy_v"]) == (1, 1, 1, 0)
    assert attend["V"] == kv["V8"]
    assert attend["VScale"] == kv["VScale"]
    assert [attend[name] for name in ("v_sb", "v_sh", "v_ss")] == [4 * 1024 * stored, 1024 * stored, stored]
    assert kv["VScale"] - kv["V8"] == 2 * 4 * 1024 * stored * 2
    assert kv["VMean"] - kv["VScale"] == 2 * 4 * stored * 4
    vectors = head_dim in (64, 96, 128, 256)
    assert [stats["k_vec"], kv["v_vec"], attend["q_vec"], attend["o_vec"]] == [vectors] * 4
    assert size > 2 * 4 * 1024 * stored * 3


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("seqlen_q", "rows"), [(1, 128), (8192, 128), (8193, 256), (100000, 2048)])
def test_int4(fake_library, stub, tmp_path, head_dim, seqlen_q, rows):
    """Blocks of queries share a mean; their products with K take no more memory than K in 16 bits."""
    case = {"precision": abi.INT4_FP16, "seqlen_q": seqlen_q, "seqlen_k": 1000, "head_dim": head_dim, "flags": abi.LSE}
    launches, size = run(stub, fake_library, tmp_path, capability=SCALED, **case)
    assert list(launches) == ["kv_stats", "quantize_kv", "quantize_q", "attention"]
    _, kv, smooth, attend = launches.values()
    stored = {96: 128}.get(head_dim, head_dim)
    if head_dim == 128:
        assert smooth["q_block_rows"] == rows
    assert ceil(seqlen_q, smooth["q_block_rows"]) == smooth["q_blocks"] <= stored // 2
    assert smooth["q_block_rows"] % 128 == 0
    assert int(smooth["grid"]) == 16 * ceil(smooth["q_blocks"], 16)
    for name in ("Q", "QMean", "Bias", "q_blocks", "q_block_rows", "scale_log2", "q_ss", "q_vec", "group", "blocks"):
        assert smooth[name] == attend[name], name
    for name in ("K", "KShift", "HeadFlags", "k_sh"):
        assert smooth[name] == kv[name], name
    assert kv["KScale"] - kv["K8"] == 2 * 4 * 1024 * (64 if stored <= 128 else stored // 2)
    assert smooth["Bias"] - smooth["QMean"] >= 16 * smooth["q_blocks"] * stored * 2
    assert WORKSPACE + size >= smooth["Bias"] + 16 * smooth["q_blocks"] * 1024 * 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_steps_are_the_whole(fake_library, stub, tmp_path, precision):
    case = {"precision": precision, "flags": abi.LSE, "head_dim": 100}
    whole, _ = run(stub, fake_library, tmp_path, **case)
    first, _ = run(stub, fake_library, tmp_path, "sagert_quantize", **case)
    second, _ = run(stub, fake_library, tmp_path, "sagert_attend", **case)
    assert list(first) == ROLES[:2]
    assert list(second) == ROLES[2:]
    assert first | second == whole


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_keys(fake_library, stub, tmp_path, precision):
    """One block of padding is quantized; V that stays in 16 bits is a copy of nothing but padding."""
    launches, _ = run(stub, fake_library, tmp_path, seqlen_k=0, precision=precision)
    kv, attend = launches["quantize_kv"], launches["attention"]
    assert (kv["seqlen_k"], kv["blocks"], attend["blocks"], kv["parts"]) == (0, 1, 1, 1)
    assert kv["copy_v"] == (precision == abi.INT8_FP16)
    assert attend["V"] == kv["V8"]


@pytest.mark.parametrize("seqlen", [1, 2048, 8192, 100000])
def test_parts_follow_from_the_length_alone(fake_library, stub, tmp_path, seqlen):
    """The order of the sums is theirs: K and V must become the same bits in every call."""
    found = set()
    for heads, batch, precision, flags in itertools.product((1, 4), (1, 3), PRECISIONS, (0, abi.CAUSAL)):
        case = {"heads_q": 4, "heads_kv": heads, "batch": batch, "precision": precision, "flags": flags}
        kv = run(stub, fake_library, tmp_path, seqlen_k=seqlen, **case)[0]["quantize_kv"]
        found.add((kv["parts"], kv["part_rows"]))
    assert len(found) == 1


V_BSHD = [4 * 1100 * 128, 128, 4 * 128, 1]


@pytest.mark.parametrize(
    ("address", "strides", "head_dim", "direct"),
    [
        (None, None, 128, True),
        (None, V_BSHD, 128, True),
        (None, [0, 0, 128, 1], 128, True),
        (None, [563200, 140800, -128, 1], 128, False),
        (None, [1 << 40, 1 << 38, (1 << 24) - 8, 1], 128, True),
        (None, [1 << 40, 1 << 38, 1 << 24, 1], 128, False),
        (None, None, 120, False),  # rows shorter than the kernel's
        ((3 << 32) + 8, None, 128, False),
        (None, [563200, 140800, 132, 1], 128, False),
        (None, [2 * 563200, 2 * 140800, 256, 2], 128, False),
    ],
)
def test_v_of_sixteen_bits_is_read_or_copied(fake_library, stub, tmp_path, address, strides, head_dim, direct):
    case = {"precision": abi.INT8_FP16, "head_dim": head_dim}
    launches, size = run(stub, fake_library, tmp_path, v=[address, strides], **case)
    stats, kv, attend = launches.values()
    assert (kv["copy_v"], kv["v_jobs"], kv["v_stats"], stats["v_stats"]) == (not direct, not direct, 0, 0)
    assert int(stats["grid"]) == 2 * 4 * kv["parts"]
    assert int(kv["grid"]) == int(stats["grid"]) * (1 if direct else 2)
    found = [attend[name] for name in ("v_sb", "v_sh", "v_ss")]
    if direct:
        assert attend["V"] == 3 << 32
        assert found == list(strides or abi.contiguous((2, 4, 1100, 128)))[:3]
    else:
        keys = ceil(1100, 64) * 64
        assert attend["V"] == kv["V8"]
        assert found == [4 * keys * 128, keys * 128, 128]
        assert size >= 8 * keys * 256 + 8 * keys * 128


@pytest.mark.parametrize(("l2", "heads"), [(6 << 20, 4), (40 << 20, 16), (96 << 20, 16), (1 << 20, 2)])
def test_sections_fit_the_second_level_cache(fake_library, stub, tmp_path, l2, heads):
    """Heads of 1.5 MiB and groups of 2: as many as half of the cache holds, at least one group."""
    case = {"precision": abi.INT8_FP8, "seqlen_k": 6144, "flags": abi.CAUSAL}
    assert run(stub, fake_library, tmp_path, l2=l2, **case)[0]["attention"]["section"] == heads


@pytest.mark.parametrize(
    ("tensor", "role", "address", "strides", "vector"),
    [
        ("q", "attention", None, [8 * 1000 * 128, 128, 8 * 128, 1], 1),
        ("q", "attention", (1 << 32) + 8, None, 0),
        ("k", "quantize_kv", None, [2 * 563200, 2 * 140800, 256, 2], 0),
        ("v", "kv_stats", (3 << 32) + 2, None, 0),
        ("o", "attention", None, [1024000, 128000, 1, 1000], 0),
    ],
)
def test_vector_switches(fake_library, stub, tmp_path, tensor, role, address, strides, vector):
    name = "out" if tensor == "o" else tensor
    launches, _ = run(stub, fake_library, tmp_path, precision=abi.INT8_FP8, **{name: [address, strides]})
    assert launches[role][f"{tensor}_vec"] == vector
