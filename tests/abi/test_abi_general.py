# SPDX-License-Identifier: Apache-2.0
"""What the portable family passes to the kernels of its general rows: masks, windows, packed sequences, head dims."""

import pytest

from tests.kit import abi, fake_build
from tests.kit.stub import calls

WORKSPACE, MASK, CU_Q, CU_K = 1 << 40, 6 << 32, 7 << 32, 8 << 32
FAR = 1 << 30
NAMES = fake_build.portable_parameters(fake_build.GENERAL_KERNELS)
BASE = {"precision": abi.INT8_FP16, "flags": abi.WINDOW}
TILE, BLOCK = 128, 64  # of the invented attention and scan kernels


def ceil(a, b):
    return -(-a // b)


def run(stub, library, tmp_path, function="sagert_attention", mask=None, **case):
    """Launches in order, [(role, {"grid": ..., parameter name: value, ...})], and the workspace's size."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    case = {**BASE, **case}
    mask = mask or [MASK, [0, 0, 0, 1]]
    code = f"""
args = abi.attention_args(**{case!r})
args.mask = abi.Tensor({mask[0]!r}, (ctypes.c_int64 * 4)(*{mask[1]!r}))
args.cu_seqlens_q, args.cu_seqlens_k = {CU_Q}, {CU_K}
result = [lib.attention(args, {function!r}), lib.workspace_size(args)[1], lib.error()]
"""
    status, size, text = stub.run(library, code, log=log, STUB_CAPABILITY=89)
    assert status == abi.OK, text
    launches = []
    for line in calls(log, "cuLaunchKernelEx"):
        words = line.split()
        role = next(role for role in NAMES if f"_{role}_" in words[1])
        numbers = words[words.index("params") + 1 :]
        values = [float(word) if "." in word or "e" in word else int(word) for word in numbers]
        launches.append((role, {"grid": int(words[3]), **dict(zip(NAMES[role], values, strict=True))}))
    return launches, size


def masked(**case):
    return {"flags": abi.MASK, "mask_dtype": abi.BOOL, "seqlen_q": 1000, "seqlen_k": 1104, **case}


def test_order_and_phases(fake_library, stub, tmp_path):
    whole, _ = run(stub, fake_library, tmp_path, **masked())
    roles = [role for role, _ in whole]
    assert roles == ["kv_stats", "quantize_kv", "quantize_q", "scan_mask", "list_blocks", "attention", "repair"]
    first, _ = run(stub, fake_library, tmp_path, "sagert_quantize", **masked())
    second, _ = run(stub, fake_library, tmp_path, "sagert_attend", **masked())
    assert first + second == whole
    plain, _ = run(stub, fake_library, tmp_path)
    assert [role for role, _ in plain] == ["kv_stats", "quantize_kv", "quantize_q", "attention", "repair"]


WINDOWS = [  # flags, window, left, right
    (abi.BOTTOM_RIGHT | abi.CAUSAL, (7, 7), FAR, 0),
    (abi.WINDOW, (5, 9), 5, 9),
    (abi.WINDOW, (-1, 3), FAR, 3),
    (abi.WINDOW | abi.CAUSAL, (5, -1), 5, 0),
    (abi.WINDOW | abi.CAUSAL, (5, 9), 5, 0),
    (abi.WINDOW | abi.BOTTOM_RIGHT, (1 << 40, 1 << 40), FAR, FAR),
    (abi.BOTTOM_RIGHT, (5, 5), FAR, FAR),
]


@pytest.mark.parametrize(("flags", "window", "left", "right"), WINDOWS, ids=str)
def test_windows(fake_library, stub, tmp_path, flags, window, left, right):
    for changes in ({}, masked(window_left=window[0], window_right=window[1])):
        case = {"window_left": window[0], "window_right": window[1], **changes}
        case["flags"] = flags | case.get("flags", 0)
        launches = dict(run(stub, fake_library, tmp_path, **case)[0])
        for role in ("attention", "repair", "scan_mask") if changes else ("attention", "repair"):
            found = [launches[role][name] for name in ("left", "right", "bottom_right")]
            assert found == [left, right, int(bool(flags & abi.BOTTOM_RIGHT))]


@pytest.mark.parametrize("precision", [abi.INT8_FP16, abi.INT8_FP8])
def test_without_a_mask(fake_library, stub, tmp_path, precision):
    found, size = run(stub, fake_library, tmp_path, precision=precision, head_dim=192, head_dim_v=128)
    launches = dict(found)
    attend = launches["attention"]
    assert attend["grid"] == 16 * ceil(1000, TILE)  # one part of 128 channels
    assert launches["repair"]["grid"] == 16 * 16
    assert launches["repair"]["parts"] == 16
    assert launches["quantize_kv"]["keep_bad"] == 1
    assert attend["mask_kind"] == attend["varlen"] == attend["m_ss"] == 0
    assert attend["HeadFlags"] == launches["repair"]["HeadFlags"] == launches["quantize_kv"]["HeadFlags"]
    assert attend["k_rows"] == launches["quantize_kv"]["k_rows"] == 1152
    assert attend["direct_v"] == 0  # narrower than the keys: copied and padded
    assert attend["V"] == launches["repair"]["V"] == launches["quantize_kv"]["VOut"]
    assert size < 2 * (16 * 1000 * 264 + 8 * 1152 * (264 + 512))


@pytest.mark.parametrize(("dims", "parts"), [((256, 256), 2), ((64, 256), 2), ((256, 64), 1), ((129, 128), 1)])
def test_channels_are_split_where_values_are_wide(fake_library, stub, tmp_path, dims, parts):
    launches = dict(run(stub, fake_library, tmp_path, head_dim=dims[0], head_dim_v=dims[1])[0])
    assert launches["attention"]["v_parts"] == parts
    assert launches["attention"]["grid"] == 16 * ceil(1000, TILE) * parts
    assert launches["attention"]["direct_v"] == int(dims[1] == 256)


MASKS = [  # strides, address, dtype, what attention reads: kind, copied how, masks, strides
    ([0, 0, 0, 1], MASK, abi.BOOL, (1, 0, 1, [0, 0, 0])),
    ([0, 0, 1104, 1], MASK, abi.BF16, (2, 0, 1, [0, 0, 1104])),
    ([1104 * 8000, 1104 * 1000, 1104, 1], MASK, abi.FP32, (3, 0, 16, [1104 * 8000, 1104 * 1000, 1104])),
    ([1104 * 1000, 0, 1104, 1], MASK, abi.BOOL, (1, 0, 2, [1104 * 1000, 0, 1104])),
    ([0, 1104, 0, 1], MASK, abi.FP32, (3, 0, 8, [0, 1104, 0])),
    ([0, 0, -1104, 1], MASK, abi.FP32, (3, 0, 1, [0, 0, -1104])),
    ([0, 0, 1104, 1], MASK, abi.FP16, (3, 2, 1, [0, 0, 1104])),  # the inputs are bf16
    ([0, 0, 1104, 1], MASK + 8, abi.BF16, (2, 1, 1, [0, 0, 1104])),
    ([0, 0, 1105, 1], MASK, abi.BOOL, (1, 1, 1, [0, 0, 1104])),
    ([0, 0, 1, 1000], MASK, abi.FP32, (3, 1, 1, [0, 0, 1104])),
    ([0, 0, 0, 0], MASK, abi.FP32, (3, 1, 1, [0, 0, 0])),
    ([9, 0, 0, 1], MASK, abi.BOOL, (1, 1, 2, [1104, 0, 0])),
    ([0, 7, 3, 1], MASK, abi.BOOL, (1, 1, 8, [0, 1104 * 1000, 1104])),
    ([0, 0, 1 << 30, 1], MASK, abi.BOOL, (1, 1, 1, [0, 0, 1104])),
]


@pytest.mark.parametrize(("strides", "address", "dtype", "expected"), MASKS, ids=str)
def test_masks(fake_library, stub, tmp_path, strides, address, dtype, expected):
    kind, copy, masks, read = expected
    launches, size = run(stub, fake_library, tmp_path, mask=[address, strides], **masked(mask_dtype=dtype))
    launches = dict(launches)
    scan, lists, attend, repair = (launches[role] for role in ("scan_mask", "list_blocks", "attention", "repair"))
    tiles, blocks = ceil(1000, TILE), ceil(1104, BLOCK)
    assert (scan["tiles"], scan["blocks"], lists["blocks"]) == (tiles, blocks, blocks)
    assert lists["grid"] == masks * tiles
    assert scan["grid"] == masks * tiles * scan["chunks"]
    assert (scan["chunks"] - 1) * scan["chunk"] < blocks <= scan["chunks"] * scan["chunk"]
    assert scan["mask_dtype"] == dtype
    assert scan["copy_mask"] == copy
    assert attend["mask_kind"] == repair["mask_kind"] == kind
    assert [attend[name] for name in ("m_sb", "m_sh", "m_ss")] == read
    assert [repair[name] for name in ("m_sb", "m_sh", "m_ss")] == read
    heads = scan["heads"]
    assert attend["list_size"] == lists["list_size"] == blocks + 4
    assert attend["list_sb"] == (tiles * heads if masks > heads else 0)
    assert attend["list_sh"] == (tiles if heads > 1 else 0)
    for launch in (attend, repair):
        for name in ("Mask8", "Mask16", "Mask32"):
            assert launch[name] == (scan["Copy8"] if copy else address)
    sizes = {"Classes": masks * tiles * blocks, "Lists": masks * tiles * (blocks + 4) * 4}
    element = {abi.BOOL: 1, abi.BF16: 2}.get(dtype, 4)
    if copy:
        sizes["Copy8"] = masks * (1 if read[2] == 0 else 1000) * 1104 * element
        assert scan["c_ss"] == read[2]
    merged = scan | lists
    end = max(launches["quantize_q"][name] for name in ("Q8", "QScale"))
    for name in sorted(sizes, key=lambda name: merged[name]):
        assert merged[name] >= end
        assert merged[name] % 256 == 0
        end = merged[name] + sizes[name]
    assert end <= WORKSPACE + size < end + 256


def test_single_queries_and_keys(fake_library, stub, tmp_path):
    odd = [[MASK, [5, 5, 5, 5]]]
    for mask in odd:
        case = masked(batch=1, heads_q=1, heads_kv=1, seqlen_q=1, seqlen_k=1)
        launches = dict(run(stub, fake_library, tmp_path, mask=mask, **case)[0])
        assert [launches["scan_mask"][name] for name in ("m_sb", "m_sh", "m_ss", "m_sk")] == [0, 0, 0, 0]


def test_no_keys_need_no_mask(fake_library, stub, tmp_path):
    launches = dict(run(stub, fake_library, tmp_path, **masked(seqlen_k=0))[0])
    assert "scan_mask" not in launches
    assert launches["attention"]["mask_kind"] == 0


@pytest.mark.parametrize("precision", [abi.INT8_FP16, abi.INT8_FP8])
@pytest.mark.parametrize("d", [64, 100, 256])
def test_packed(fake_library, stub, tmp_path, precision, d):
    total_q, total_k, longest_q, longest_k, batch, h, hk = 2500, 3000, 1000, 1100, 5, 8, 4
    q, kv = [999, d, h * d, 1], [999, d, hk * d, 1]
    case = {"batch": batch, "seqlen_q": longest_q, "seqlen_k": longest_k, "head_dim": d, "precision": precision}
    case |= {"total_q": total_q, "total_k": total_k, "flags": abi.VARLEN | abi.LSE | abi.CAUSAL}
    case |= {"q": [None, q], "out": [None, q], "k": [None, kv], "v": [None, kv]}
    found, size = run(stub, fake_library, tmp_path, **case)
    launches = dict(found)
    stats, kv_call, q_call, attend = (launches[r] for r in ("kv_stats", "quantize_kv", "quantize_q", "attention"))
    dp = next(padded for padded in (64, 128, 256) if d <= padded)
    k_rows = (total_k // 128 + batch) * 128
    for launch in (stats, kv_call, q_call, attend, launches["repair"]):
        assert launch["varlen"] == 1
    assert stats["CuK"] == kv_call["CuK"] == attend["CuK"] == CU_K
    assert q_call["CuQ"] == attend["CuQ"] == CU_Q
    assert stats["k_sb"] == kv_call["v_sb"] == q_call["q_sb"] == attend["o_sb"] == attend["v_sb"] == 0
    assert kv_call["k_rows"] == attend["k_rows"] == k_rows
    assert q_call["q_rows"] == attend["q_rows"] == total_q
    assert q_call["seqlen_q"] == attend["seqlen_q"] == longest_q
    assert kv_call["grid"] == batch * hk * ceil(longest_k, 128) * 2
    assert q_call["grid"] == batch * h * ceil(longest_q, 64)
    assert attend["grid"] == batch * h * ceil(longest_q, TILE) * attend["v_parts"]
    assert attend["Lse"] == 5 << 32
    fp8 = precision == abi.INT8_FP8
    assert attend["direct_v"] == (not fp8 and d == dp)
    if not attend["direct_v"]:
        assert [attend["v_sh"], attend["v_ss"]] == ([dp * k_rows, k_rows] if fp8 else [k_rows * dp, dp])
    # Sized from the totals, however long the longest sequence is.
    rows = {"K8": hk * k_rows * dp, "KScale": hk * k_rows * 4, "Q8": h * total_q * dp, "QScale": h * total_q * 4}
    merged = kv_call | q_call
    ends = sorted(merged[name] + bytes_ for name, bytes_ in rows.items())
    assert ends[-1] <= WORKSPACE + size
    assert size < sum(rows.values()) * 1.2 + h * total_q * 4 + hk * k_rows * dp * 2 + batch * hk * dp * 4 * 60


@pytest.mark.parametrize("precision", [abi.INT8_FP16, abi.INT8_FP8])
def test_keys_quantized_once(fake_library, stub, tmp_path, precision):
    """Whatever the mask and the window of a call, K and V are those of the plan."""
    log = tmp_path / "log"
    code = f"""
args = abi.attention_args(**{masked(precision=precision)!r})
args.mask = abi.Tensor({MASK}, (ctypes.c_int64 * 4)(0, 0, 1105, 1))
status, info = lib.kv_plan(args)
args.kv, args.kv_size, args.row = 1 << 42, info.bytes, info.row + 1
result = [status, lib.attention(args, "sagert_quantize_kv")]
args.k.data = None
for flags in (MASK, WINDOW, CAUSAL | BOTTOM_RIGHT, 0):
    args.flags = QUANTIZED_KV | flags
    result.append(lib.attention(args))
result.append([bool(info.reads_v), lib.error()])
"""
    result = stub.run(fake_library, code, log=log, STUB_CAPABILITY=89)
    assert result[:-1] == [abi.OK] * 6, result
    assert result[-1][0] == (precision == abi.INT8_FP16)
    found = [next(r for r in NAMES if f"_{r}_" in line.split()[1]) for line in calls(log, "cuLaunchKernelEx")]
    mask, rest = ["scan_mask", "list_blocks"], ["quantize_q", "attention", "repair"]
    assert found == ["kv_stats", "quantize_kv", rest[0], *mask, *rest[1:], *rest * 3]


REFUSED = [
    ({"total_q": -1}, "total_q is -1"),
    ({"total_k": -7}, "total_k is -7"),
    ({"total_q": 2001}, "total_q is 2001, but 2 sequences of at most seqlen_q = 1000"),
    ({"cu_seqlens_q": None}, "cu_seqlens_q is NULL"),
    ({"cu_seqlens_k": None}, "cu_seqlens_k is NULL"),
    ({"cu_seqlens_k": 6}, "cu_seqlens_k is not aligned"),
    ({"q": [None, [0, 1 << 62, 128, 1]]}, "q.stride[1]"),
    ({"flags": abi.VARLEN | abi.MASK, "mask_dtype": abi.BOOL}, "FLAG_MASK and FLAG_VARLEN"),
]
MASK_REFUSED = [
    ([MASK + 2, [0, 0, 0, 1]], abi.FP32, "mask.data is not aligned to its 32-bit elements"),
    ([MASK + 1, [0, 0, 0, 1]], abi.BF16, "mask.data is not aligned to its 16-bit elements"),
    ([MASK, [0, 0, 1 << 62, 1]], abi.BOOL, "mask.stride[2]"),
    ([MASK, [1 << 62, 1 << 62, 0, 1]], abi.BOOL, "mask.stride[1]"),
    ([None, [0, 0, 0, 1]], abi.BOOL, "mask.data is NULL"),
]


def test_refusals(fake_library, stub, tmp_path):
    packed = {"flags": abi.VARLEN, "total_q": 1500, "total_k": 1500, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    code = f"""
result = []
for case, _ in {REFUSED!r}:
    args = abi.attention_args(**{ ({**BASE, **packed})!r} | case)
    result.append([lib.attention(args), lib.error()])
for mask, dtype, _ in {MASK_REFUSED!r}:
    args = abi.attention_args(**{masked(precision=abi.INT8_FP16)!r} | {{"mask_dtype": dtype}})
    args.mask = abi.Tensor(mask[0], (ctypes.c_int64 * 4)(*mask[1]))
    result.append([lib.attention(args), lib.error()])
"""
    log = tmp_path / "log"
    results = stub.run(fake_library, code, log=log, STUB_CAPABILITY=89)
    for (status, text), expected in zip(results, [*REFUSED, *MASK_REFUSED], strict=True):
        assert status == abi.INVALID_ARGUMENT, expected
        assert expected[-1] in text
    assert calls(log, "cuLaunchKernelEx") == []


def test_more_packed_keys_than_offsets_reach(fake_library, stub):
    code = f"""
args = abi.attention_args(precision={abi.INT8_FP8}, flags={abi.VARLEN}, batch=4, seqlen_q=10, seqlen_k=8388608,
    total_q=40, total_k=20000000)
result = [lib.workspace_size(args)[0], lib.error()]
"""
    status, text = stub.run(fake_library, code, STUB_CAPABILITY=89)
    assert status == abi.UNSUPPORTED
    assert "total_k is 20000000 in 4 sequences" in text


def test_nothing_packed_launches_nothing(fake_library, stub, tmp_path):
    launches, size = run(stub, fake_library, tmp_path, flags=abi.VARLEN, total_q=0, total_k=100)
    assert launches == []
    assert size == 0
