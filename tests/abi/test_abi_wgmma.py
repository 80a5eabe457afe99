# SPDX-License-Identifier: Apache-2.0
"""What the wgmma family passes to its kernels: launch attributes, grids, workspace layout, the tensor map of V."""

import itertools
import math

import pytest

from tests.kit import abi, fake_build
from tests.kit.stub import calls

WORKSPACE = 1 << 40
NAMES = {role: [arg.split(":")[0] for arg in args] for role, args in fake_build.WGMMA_ARGS.items()}
CLUSTERS = {abi.INT8_FP16: 8, abi.INT8_FP8: 4, abi.INT8_INT8: 16}
SMS = 132
SPLITTABLE = (abi.INT8_FP16, abi.INT8_FP8)  # rows with a kernel that joins parts


def run(stub, library, tmp_path, function="sagert_attention", driver=12090, **case):
    """Launches by role: {"grid": ..., parameter name: value, ...}; the tensor map; the log's order of calls."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    code = f"""
args = abi.attention_args(**{case!r})
result = [lib.attention(args, {function!r}), lib.workspace_size(args)[1], lib.error()]
"""
    status, size, text = stub.run(library, code, log=log, STUB_CAPABILITY=100, STUB_DRIVER=driver)
    assert status == abi.OK, text
    out = {"workspace": size}
    for line in calls(log, "cuLaunchKernelEx"):
        words = line.split()
        role = next(role for role in NAMES if f"_{role}_" in words[1])
        start = words.index("params") + 1
        values = [float(word) if "." in word or "e" in word else int(word) for word in words[start:]]
        names = [
            "VMap" if name == "V8" and role == "attention" and "int8_fp16" in words[1] else name for name in NAMES[role]
        ]
        assert len(values) == len(names)
        fields = ("grid", "height", "block", "shared", "stream", "cluster", "dependent")
        out[role] = {field: words[words.index(field) + 1] for field in fields} | dict(zip(names, values, strict=True))
    for line in calls(log, "cuTensorMapEncodeTiled"):
        words = line.split()
        spans = [("sizes", 4), ("strides", 3), ("box", 4), ("steps", 4), ("modes", 4), ("type", 1), ("address", 1)]
        out["map"] = {
            name: [int(word) for word in words[words.index(name) + 1 : words.index(name) + 1 + count]]
            for name, count in spans
        } | {"number": int(words[1])}
    return out


def ceil(a, b):
    return -(-a // b)


def prepass_cluster(jobs, blocks, head_dim, largest):
    """Two blocks per SM are kept busy; K or V of the heads worked on stays within 40 MiB; a power of two."""
    resident = 2 * SMS
    wanted = max(ceil(3 * resident, 4 * jobs), ceil(resident * blocks * 128 * head_dim * 2, 40 << 20))
    wanted = min(wanted, blocks, largest)
    return next(size for size in (1, 2, 4, 8, 16) if size >= wanted or 2 * size > largest)


def parts_of(precision, tiles, blocks):
    """Into how many parts the keys of `tiles` tiles go, each of which sees `blocks` blocks of keys."""
    return max(1, min(SMS // tiles, blocks // 4, 32)) if precision in SPLITTABLE else 1


CASES = [
    dict(zip(("precision", "seqlen_q", "seqlen_k", "head_dim", "flags"), case, strict=True))
    for case in itertools.product(
        CLUSTERS, (1, 1000, 5000), (1, 128, 129, 20000), (40, 64, 128), (0, abi.LSE | abi.CAUSAL)
    )
]


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_grids_and_layout(fake_library, stub, tmp_path, case):
    launches = run(stub, fake_library, tmp_path, **case)
    b, h, hk, s, sk, d = 2, 8, 4, case["seqlen_q"], case["seqlen_k"], case["head_dim"]
    dp, blocks = (64 if d <= 64 else 128), ceil(sk, 128)
    precision, causal = case["precision"], bool(case["flags"] & abi.CAUSAL)
    io = precision == abi.INT8_FP16
    kv, attend = launches["quantize_kv"], launches["attention"]
    for launch in (kv, attend):
        assert (launch["block"], launch["stream"]) == ("256", "0x77")

    v_jobs = not io
    v_stats = 1 if v_jobs else 2 if causal else 0  # 2: attention finds where V is not finite
    assert [kv[name] for name in ("v_jobs", "v_stats", "copy_v", "smooth_k")] == [v_jobs, v_stats, 0, 1]
    jobs = b * hk * (1 + v_jobs)
    cluster = prepass_cluster(jobs, blocks, dp, CLUSTERS[precision])
    assert kv["cluster"] == str(cluster)
    assert int(kv["grid"]) == jobs * cluster
    assert (kv["dependent"], attend["dependent"], attend["cluster"]) == ("1", "1", "1")
    assert kv["blocks"] == attend["blocks"] == blocks
    assert attend["tiles"] == ceil(s, 128)
    assert attend["heads_total"] == b * h
    assert int(attend["grid"]) == min(b * h * ceil(s, 128), SMS * (2 if precision == abi.INT8_INT8 else 1))
    parts = parts_of(precision, b * h * ceil(s, 128), min(blocks, ceil(s, 128)) if causal else blocks)
    assert (kv["height"], attend["height"]) == ("1", str(parts))
    assert ("combine" in launches) == (parts > 1)
    kv_bytes = blocks * 128 * dp * (3 if io else 2)
    assert attend["section"] == min(max(1, (24 << 20) // kv_bytes) * 2, b * h)
    assert attend["group"] == 2
    assert (kv["heads_kv"], attend["heads_q"]) == (hk, h)
    assert kv["head_dim"] == kv["head_dim_v"] == attend["head_dim"] == attend["head_dim_v"] == d
    assert kv["k_vec"] == kv["v_vec"] == attend["q_vec"] == attend["o_vec"] == (d == dp)
    assert math.isclose(attend["scale_log2"], 0.125 * math.log2(math.e), rel_tol=1e-6)
    assert attend["write_lse"] == causal
    assert attend["Lse"] == (5 << 32 if causal else WORKSPACE)
    assert (attend["Q"], kv["K"], kv["V"], attend["Out"]) == (1 << 32, 2 << 32, 3 << 32, 4 << 32)
    assert [attend[f"q_s{axis}"] for axis in "bhsd"] == [h * s * d, s * d, 0 if s == 1 else d, 1]
    assert [kv[f"v_s{axis}"] for axis in "bhsd"] == [hk * sk * d, sk * d, 0 if sk == 1 else d, 1]

    heads = b * hk
    sizes = {
        "K8": heads * blocks * 128 * dp, "KScale": heads * blocks * 16, "KBad": heads * blocks * 16,
        "KShift": heads * dp * 4, "HeadFlags": heads * 8,
    }  # fmt: skip
    if io:
        sizes["KNorm"] = heads * 32 * 4
    else:
        sizes |= {"V8": heads * blocks * 128 * dp, "VMean": heads * dp * 4, "VScale": heads * dp * 4}
    if precision == abi.INT8_INT8:
        sizes["VScale"] = heads * blocks * dp  # of 16 bits for two channels
        sizes["VMean"] = heads * dp * (2 * 4 + 4 * 2)  # means, units and the leading keys' values
    if v_stats:
        sizes["VFirst"] = heads * 2 * dp * 4
    assert all(attend[name] == kv[name] for name in sizes if name in attend)
    places = {name: kv[name] for name in sizes}
    if parts > 1:
        sizes |= {"PartOut": parts * b * h * s * dp * 4, "PartLse": (2 * parts + 1) * b * h * s * 4}
        places |= {name: attend[name] for name in ("PartOut", "PartLse")}
    assert kv["NextTile"] == attend["NextTile"]
    if parts == 1 and b * h * ceil(s, 128) > int(attend["grid"]):  # tiles are taken from a counter
        sizes["NextTile"], places["NextTile"] = 4, attend["NextTile"]
    else:
        assert attend["NextTile"] == 0
    end = WORKSPACE
    for name in sorted(sizes, key=places.__getitem__):
        assert places[name] % 256 == 0, name
        assert places[name] >= end, name
        end = places[name] + sizes[name]
    assert end <= WORKSPACE + launches["workspace"] < end + 256

    assert ("map" in launches) == io
    if io:
        assert attend["VMap"] == launches["map"]["number"]
        assert launches["map"]["sizes"] == [d, sk, hk, b]
        assert launches["map"]["strides"] == [0 if sk == 1 else 2 * d, 2 * sk * d, 2 * hk * sk * d]
        assert launches["map"]["address"] == [3 << 32]
        assert launches["map"]["box"] == [64, 128, 1, 1]
        assert launches["map"]["steps"] == [1, 1, 1, 1]
        assert launches["map"]["modes"] == [0, 3, 2, 0]  # 128-byte swizzle, 128-byte promotion, zero fill
        assert launches["map"]["type"] == [1]


@pytest.mark.parametrize("precision", CLUSTERS)
def test_two_steps_are_the_whole(fake_library, stub, tmp_path, precision):
    """Alone, attention waits for nothing of its own."""
    case = {"precision": precision, "flags": abi.LSE, "head_dim": 100}
    whole = run(stub, fake_library, tmp_path, **case)
    first = run(stub, fake_library, tmp_path, "sagert_quantize", **case)
    second = run(stub, fake_library, tmp_path, "sagert_attend", **case)
    assert set(first) == {"quantize_kv", "workspace"}
    assert second["attention"].pop("dependent") == "0"
    assert whole["attention"].pop("dependent") == "1"
    assert first["quantize_kv"].pop("NextTile") == 0
    assert whole["quantize_kv"].pop("NextTile") == whole["attention"]["NextTile"]
    assert first | second == whole


@pytest.mark.parametrize(
    ("seqlen_q", "function", "cleared"),
    [
        (1100, "sagert_attend", True),
        (1100, "sagert_attention", False),  # the pre-pass does it
        (1100, "sagert_quantize", False),
        (1000, "sagert_attend", False),  # each thread block has one tile
    ],
)
def test_the_counter_of_tiles_is_cleared(fake_library, stub, tmp_path, seqlen_q, function, cleared):
    case = {"precision": abi.INT8_FP8, "seqlen_q": seqlen_q}
    launches = run(stub, fake_library, tmp_path, function, **case)
    lines = (tmp_path / "log").read_text().splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("cuMemset", "cuLaunch"))]
    assert names == ["cuMemsetD32Async"] * cleared + ["cuLaunchKernelEx"] * (1 + (function == "sagert_attention"))
    if cleared:
        address = launches["attention"]["NextTile"]
        assert calls(tmp_path / "log", "cuMemsetD32Async") == [
            f"cuMemsetD32Async {address} value 0 count 1 stream 0x77"
        ]


@pytest.mark.parametrize("precision", CLUSTERS)
@pytest.mark.parametrize(
    ("batch", "heads", "seqlen_q", "seqlen_k", "causal", "parts"),
    [
        (1, 1, 1, 65536, False, 32),
        (1, 8, 128, 65536, False, 16),
        (1, 8, 1024, 65536, False, 2),
        (1, 66, 128, 65536, False, 2),
        (1, 67, 128, 65536, False, 1),
        (2, 4, 128, 1000, False, 2),
        (1, 1, 128, 1023, False, 2),
        (1, 1, 128, 896, False, 1),
        (1, 1, 128, 65536, True, 1),  # one block of keys is all that these queries see
        (1, 1, 4096, 65536, True, 4),
        (1, 1, 4096, 1024, True, 2),
    ],
)
def test_keys_of_small_grids_are_split(
    fake_library, stub, tmp_path, precision, batch, heads, seqlen_q, seqlen_k, causal, parts
):
    case = {"batch": batch, "heads_q": heads, "heads_kv": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    case |= {"precision": precision, "head_dim": 120, "flags": abi.LSE | abi.CAUSAL if causal else 0}
    launches = run(stub, fake_library, tmp_path, **case)
    attend = launches["attention"]
    if precision not in SPLITTABLE:
        parts = 1
    tiles = batch * heads * ceil(seqlen_q, 128)
    assert (int(attend["grid"]), int(attend["height"])) == (min(tiles, SMS), parts)
    if parts == 1:
        assert "combine" not in launches
        return
    combine = launches["combine"]
    assert (int(combine["grid"]), combine["height"]) == (ceil(batch * heads * seqlen_q, fake_build.COMBINE_TILE), "1")
    assert (combine["dependent"], combine["stream"], combine["parts"]) == ("1", "0x77", parts)
    shared = ["PartOut", "PartLse", "Out", "Lse", "heads_q", "heads_total", "seqlen_q", "head_dim_v", "o_vec"]
    for name in (*shared, "write_lse", *(f"o_s{axis}" for axis in "bhsd")):
        assert combine[name] == attend[name], name
    rows = batch * heads * seqlen_q
    assert attend["PartLse"] - attend["PartOut"] >= parts * rows * 128 * 4
    assert WORKSPACE + launches["workspace"] - attend["PartLse"] >= (2 * parts + 1) * rows * 4
    assert (parts + 1) * rows * 130 * 4 < 14 << 20


@pytest.mark.parametrize("precision", SPLITTABLE)
def test_split_keys_in_two_steps(fake_library, stub, tmp_path, precision):
    case = {"precision": precision, "flags": abi.LSE, "head_dim": 100, "seqlen_q": 100, "seqlen_k": 9000}
    whole = run(stub, fake_library, tmp_path, **case)
    first = run(stub, fake_library, tmp_path, "sagert_quantize", **case)
    second = run(stub, fake_library, tmp_path, "sagert_attend", **case)
    assert set(first) == {"quantize_kv", "workspace"}
    assert set(second) == {"attention", "combine", "workspace"} | ({"map"} & set(whole))
    assert second["combine"] == whole["combine"]
    assert whole["combine"]["dependent"] == "1"


@pytest.mark.parametrize(("driver", "dependent"), [(12000, "0"), (12020, "0"), (12030, "1"), (13000, "1")])
def test_dependent_launches_need_a_driver_that_can_capture_them(fake_library, stub, tmp_path, driver, dependent):
    launches = run(stub, fake_library, tmp_path, driver=driver)
    assert [launches[role]["dependent"] for role in ("quantize_kv", "attention")] == [dependent] * 2


@pytest.mark.parametrize(("precision", "large"), [(abi.INT8_FP16, 0), (abi.INT8_INT8, 1)])
def test_large_clusters_are_allowed_once(fake_library, stub, tmp_path, precision, large):
    code = f"result = [lib.attention(abi.attention_args(precision={precision})) for _ in range(3)]"
    log = tmp_path / "log"
    assert stub.run(fake_library, code, log=log, STUB_CAPABILITY=100) == [abi.OK] * 3
    lines = [line for line in calls(log, "cuKernelSetAttribute") if " 14 1 " in line]
    assert len(lines) == large
    assert all("quantize_kv" in line for line in lines)


def test_the_map_of_v_is_encoded_when_v_changes(fake_library, stub, tmp_path):
    code = f"""
args = abi.attention_args(precision={abi.INT8_FP16})
result = []
for address in (3 << 32, 3 << 32, 6 << 32, 6 << 32, 3 << 32):
    args.v.data = address
    result.append(lib.attention(args))
args.v.stride[1] *= 2
result += [lib.attention(args), lib.attention(args)]
"""
    log = tmp_path / "log"
    assert stub.run(fake_library, code, log=log, STUB_CAPABILITY=100) == [abi.OK] * 7
    encoded = [line.split() for line in calls(log, "cuTensorMapEncodeTiled")]
    addresses = [int(words[words.index("address") + 1]) >> 32 for words in encoded]
    assert addresses == [3, 6, 3, 3]
    used = [int(line.split()[line.split().index("params") + 7]) for line in calls(log, "cuLaunchKernelEx")[1::2]]
    assert used == [1, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("precision", "seqlen_q", "failing", "named"),
    [
        (abi.INT8_FP16, 1000, "STUB_TENSOR_MAP", "tensor map of V"),
        (abi.INT8_FP8, 5000, "STUB_MEMSET", "counter of tiles"),
    ],
)
def test_driver_errors(fake_library, stub, tmp_path, precision, seqlen_q, failing, named):
    code = f"""
args = abi.attention_args(precision={precision}, seqlen_q={seqlen_q})
result = [lib.attention(args, "sagert_attend"), lib.error()]
"""
    log = tmp_path / "log"
    status, text = stub.run(fake_library, code, log=log, STUB_CAPABILITY=100, **{failing: 719})
    assert status == abi.CUDA
    assert named in text
    assert not calls(log, "cuLaunchKernelEx")


@pytest.mark.parametrize("precision", CLUSTERS)
def test_no_keys(fake_library, stub, tmp_path, precision):
    """One block of padding is quantized; V that stays in 16 bits is a copy of nothing but padding."""
    launches = run(stub, fake_library, tmp_path, seqlen_k=0, precision=precision)
    kv = launches["quantize_kv"]
    assert (kv["seqlen_k"], kv["blocks"], launches["attention"]["blocks"]) == (0, 1, 1)
    assert kv["copy_v"] == (precision == abi.INT8_FP16)
    if kv["copy_v"]:
        assert launches["map"]["sizes"] == [128, 128, 4, 2]
        assert launches["map"]["address"] == [kv["V8"]]


def test_no_smoothing(fake_library, stub, tmp_path):
    assert run(stub, fake_library, tmp_path, flags=abi.NO_SMOOTH_K)["quantize_kv"]["smooth_k"] == 0


V_BSHD = [4 * 1100 * 128, 128, 4 * 128, 1]


@pytest.mark.parametrize(
    ("address", "strides", "direct"),
    [
        (None, None, True),
        (None, V_BSHD, True),
        (None, [0, 0, 128, 1], True),
        (None, [8 * 140800, 1 << 38, 136, 1], True),
        ((3 << 32) + 8, None, False),
        (None, [563200, 140800, 132, 1], False),
        (None, [563200, 140800, -128, 1], False),
        (None, [563200, 1 << 39, 128, 1], False),
        (None, [2 * 563200, 2 * 140800, 256, 2], False),
    ],
)
def test_v_of_sixteen_bits_is_mapped_or_copied(fake_library, stub, tmp_path, address, strides, direct):
    launches = run(stub, fake_library, tmp_path, precision=abi.INT8_FP16, v=[address, strides])
    kv, v_map = launches["quantize_kv"], launches["map"]
    assert (kv["copy_v"], kv["v_jobs"], kv["v_stats"]) == (not direct, not direct, 0)
    assert int(kv["grid"]) == 2 * 4 * 8 * (1 if direct else 2)
    if direct:
        b, h, s, _ = strides or abi.contiguous((2, 4, 1100, 128))
        assert v_map["address"] == [3 << 32]
        assert (v_map["sizes"], v_map["strides"]) == ([128, 1100, 4, 2], [2 * s, 2 * h, 2 * b])
    else:
        keys = 9 * 128
        assert v_map["address"] == [kv["V8"]]
        assert (v_map["sizes"], v_map["strides"]) == ([128, keys, 4, 2], [256, keys * 256, 4 * keys * 256])
        assert launches["workspace"] >= 8 * keys * 256 + 8 * keys * 128


@pytest.mark.parametrize(
    ("tensor", "role", "address", "strides", "vector"),
    [
        ("q", "attention", None, [8 * 1000 * 128, 128, 8 * 128, 1], 1),
        ("q", "attention", (1 << 32) + 8, None, 0),
        ("q", "attention", None, [8 * 1000 * 136, 1000 * 136, 136, 1], 1),
        ("q", "attention", None, [8 * 1000 * 132, 1000 * 132, 132, 1], 0),
        ("k", "quantize_kv", None, [0, 0, 128, 1], 1),
        ("k", "quantize_kv", None, [2 * 563200, 2 * 140800, 256, 2], 0),
        ("v", "quantize_kv", (3 << 32) + 2, None, 0),
        ("o", "attention", None, [1024000, 128000, 1, 1000], 0),
        ("o", "attention", None, [8 * 1000 * 128, 128, 8 * 128, 1], 1),
    ],
)
def test_vector_switches(fake_library, stub, tmp_path, tensor, role, address, strides, vector):
    name = "out" if tensor == "o" else tensor
    launches = run(stub, fake_library, tmp_path, precision=abi.INT8_FP8, **{name: [address, strides]})
    assert launches[role][f"{tensor}_vec"] == vector
