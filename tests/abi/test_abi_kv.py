# SPDX-License-Identifier: Apache-2.0
"""K and V quantized once: the plan, the launches of both halves, and that they are those of the one call."""

import itertools

import pytest

from tests.abi.test_abi_wgmma import NAMES as WGMMA_NAMES
from tests.kit import abi, fake_build
from tests.kit.stub import calls

NAMES = {
    90: fake_build.portable_parameters(fake_build.PLAIN_KERNELS),
    100: WGMMA_NAMES,
    110: fake_build.mma_parameters(),
}
TILED = (100, 110)  # families in which a call quantizes of V what it needs, and no more
WORKSPACE, KV = 1 << 40, 1 << 42
POINTERS = [
    "KSum", "VStats", "PartBad", "PartFirst", "VAmax", "VBad", "KShift", "KNorm", "K8", "KScale", "KBad", "VOut", "V8",
    "VScale", "VMean", "VFirst", "HeadFlags", "Q8", "QScale", "QShift", "PartOut", "PartLse", "NextTile",
]  # fmt: skip

RUN = """
case = {case!r}
changes = {changes!r}  # of the attention call
args = abi.attention_args(**case)
status, info = lib.kv_plan(args)
result = [status, info.bytes, info.row, info.reads_v, lib.error()]
if status == OK:
    args.kv, args.kv_size, args.row = 1 << 42, info.bytes, info.row + 1
    result.append(lib.attention(args, "sagert_quantize_kv"))
    args.flags |= QUANTIZED_KV
    args.k.data = None
    if not info.reads_v:
        args.v.data = None
    for name, value in changes.items():
        setattr(args, name, value)
    result += [lib.workspace_size(args), lib.attention(args), lib.error()]
"""


def launches_of(log, capability):
    """[(role, {parameter: value})] in the log's order; a tensor map is given by what it describes."""
    maps = {}
    found = []
    for line in log.read_text().splitlines():
        words = line.split()
        if words[0] == "cuTensorMapEncodeTiled":
            maps[int(words[1])] = " ".join(words[2:])
        if words[0] != "cuLaunchKernelEx":
            continue
        role = next(role for role in NAMES[capability] if f"_{role}_" in words[1])
        start = words.index("params") + 1
        values = [float(word) if "." in word or "e" in word else int(word) for word in words[start:]]
        names = list(NAMES[capability][role])
        if capability == 100 and role == "attention" and "int8_fp16" in words[1]:
            names[names.index("V8")] = "VMap"
        parameters = dict(zip(names, values, strict=True))
        if "VMap" in parameters:
            parameters["VMap"] = maps[parameters["VMap"]]
        fields = ("grid", "height", "block", "shared", "stream", "cluster", "dependent")
        found.append((role, {field: words[words.index(field) + 1] for field in fields} | parameters))
    return found


def run(stub, library, tmp_path, capability, case, changes=None):
    """The plan as (bytes, row, reads_v), the workspace, launches of both calls."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    result = stub.run(library, RUN.format(case=case, changes=changes or {}), log=log, STUB_CAPABILITY=capability)
    assert result[0] == abi.OK, result[4]
    assert (result[5], result[6][0], result[7]) == (abi.OK, abi.OK, abi.OK), result[8]
    return tuple(result[1:4]), result[6][1], launches_of(log, capability)


def run_whole(stub, library, tmp_path, capability, case):
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    code = f"""
args = abi.attention_args(**{case!r})
result = [lib.attention(args), lib.workspace_size(args)[1], lib.error()]
"""
    status, size, text = stub.run(library, code, log=log, STUB_CAPABILITY=capability)
    assert status == abi.OK, text
    return size, launches_of(log, capability)


CASES = [
    (capability, dict(zip(("precision", "seqlen_q", "seqlen_k", "head_dim", "flags"), case, strict=True)))
    for capability, precisions in ((90, (abi.INT8_FP16, abi.INT8_FP8)), (100, (1, 2, 3)), (110, (1, 2, 3)))
    for case in itertools.product(precisions, (1, 1000), (1, 129, 5000), (40, 128), (0, abi.LSE | abi.CAUSAL))
]


@pytest.mark.parametrize(("capability", "case"), CASES[::3], ids=str)
def test_both_halves_are_the_one_call(fake_library, stub, tmp_path, capability, case):
    """Same kernels, grids and parameters, but for where buffers lie and what only other calls would read of V."""
    (size, _, reads_v), workspace, launches = run(stub, fake_library, tmp_path, capability, case)
    whole_size, whole = run_whole(stub, fake_library, tmp_path, capability, case)
    assert [role for role, _ in launches] == [role for role, _ in whole]
    assert workspace < whole_size
    io = case["precision"] == abi.INT8_FP16
    causal = bool(case["flags"] & abi.CAUSAL)
    if causal or not io:  # then the one call has room for all of V's statistics, too
        assert size + workspace == whole_size
    ignored = {*POINTERS, "Lse", "V"}
    # wgmma's attention finds itself where V is not finite; the others' pre-passes say so, where a mask asks.
    without_v = io and (capability == 100 or (capability in TILED and not causal))
    if without_v:
        ignored |= {"v_jobs", "v_stats"}
    for (role, mine), (_, theirs) in zip(launches, whole, strict=True):
        assert mine.keys() == theirs.keys()
        skip = set(ignored)
        if "V8" in mine or "VMap" in mine or role == "quantize_kv":
            skip |= {"VMap"} if not reads_v else set()
        if role in ("kv_stats", "quantize_kv") and without_v:
            skip.add("grid")
            jobs, other = (int(x["grid"]) // int(x["cluster"]) // x.get("parts", 1) for x in (mine, theirs))
            assert jobs == 2 * 2 * 4
            assert other in (2 * 4, 2 * 2 * 4)
        if role == "attention":  # nothing of its own runs before it
            skip |= {"dependent"} if capability == 100 else set()
        assert {n: x for n, x in mine.items() if n not in skip} == {n: x for n, x in theirs.items() if n not in skip}


@pytest.mark.parametrize(("capability", "case"), CASES[1::5], ids=str)
def test_what_stays_and_what_does_not(fake_library, stub, tmp_path, capability, case):
    """Everything that K and V become lies in kv, everything else in the workspace."""
    (size, _, _), workspace, launches = run(stub, fake_library, tmp_path, capability, case)
    kept = POINTERS[: POINTERS.index("Q8")]
    for role, launch in launches:
        if role in ("kv_stats", "quantize_kv"):
            assert not any(WORKSPACE <= launch.get(n, 0) < KV for n in POINTERS)
        for name in kept:
            if name in launch:
                assert KV <= launch[name] < KV + size, (role, name)
        for name in POINTERS[len(kept) :]:
            if launch.get(name):  # not all calls have a counter of tiles
                assert WORKSPACE <= launch[name] <= WORKSPACE + workspace, (role, name)
        assert launch.get("K", 2 << 32) == 2 << 32


@pytest.mark.parametrize("capability", [90, 100, 110])
@pytest.mark.parametrize("precision", [abi.INT8_FP16, abi.INT8_FP8])
def test_queries_do_not_matter(fake_library, stub, capability, precision):
    cases = [
        {"seqlen_q": 1}, {"seqlen_q": 0}, {"seqlen_q": 9000}, {"heads_q": 4}, {"heads_q": 64}, {"scale": 7.0},
        {"lse": None}, {"q": [1, None]}, {"out": [1, None]}, {"workspace": 1}, {"flags": abi.CAUSAL},
        {"flags": abi.QUANTIZED_KV | abi.LSE}, {"heads_q": 3, "scale": float("inf")}, {"k": [None, [0, 0, 0, 0]]},
    ]  # fmt: skip
    code = f"""
inf = float("inf")
result = []
for case in {cases!r}:
    status, info = lib.kv_plan(abi.attention_args(precision={precision}, **case))
    result.append([status, info.bytes, info.row, info.reads_v])
"""
    found = stub.run(fake_library, code, STUB_CAPABILITY=capability)
    assert found == [found[0]] * len(cases)
    assert found[0][0] == abi.OK


@pytest.mark.parametrize("capability", [90, 100, 110])
def test_sixteen_bit_v_is_read_where_it_is_or_copied(fake_library, stub, tmp_path, capability):
    case = {"precision": abi.INT8_FP16, "flags": abi.LSE}
    (small, _, reads_v), _, launches = run(stub, fake_library, tmp_path, capability, case)
    assert reads_v == 1
    attention = dict(launches)["attention"]
    assert attention.get("V", 3 << 32) == 3 << 32
    assert f"address {3 << 32} " in attention.get("VMap", f"address {3 << 32} ")
    odd = {**case, "v": [(3 << 32) + 2, None]}
    (large, _, reads_v), _, launches = run(stub, fake_library, tmp_path, capability, odd)
    assert reads_v == 0
    assert large - small >= 2 * 4 * 1100 * 128 * 2
    prepass, attention = dict(launches)["quantize_kv"], dict(launches)["attention"]
    assert prepass["copy_v"] == 1
    if capability != 100:
        assert attention["V"] == prepass["VOut" if capability == 90 else "V8"]
    else:
        assert f"address {prepass['V8']} " in attention["VMap"]


@pytest.mark.parametrize("capability", [90, 100, 110])
def test_the_lse_of_unsmoothed_keys(fake_library, stub, tmp_path, capability):
    """The buffer holds the shift, 0 without smoothing: the flag counts when K is quantized, and not again."""
    case = {"precision": abi.INT8_FP8, "flags": abi.NO_SMOOTH_K}
    _, _, launches = run(
        stub, fake_library, tmp_path, capability, case, {"flags": abi.LSE | abi.QUANTIZED_KV | abi.NO_SMOOTH_K}
    )
    assert dict(launches)["quantize_kv"]["smooth_k"] == 0
    assert dict(launches)["attention"].get("shift_lse", 1) == 1


def test_the_kernels_that_serve_every_call_of_the_row_quantize(fake_library, stub, tmp_path):
    """Where full and causal attention have pre-passes of their own, the causal ones leave more behind."""
    log = tmp_path / "log"
    run(stub, fake_library, tmp_path, 90, {"precision": abi.INT8_FP16})
    names = [line.split()[1] for line in calls(log, "cuLaunchKernelEx")]
    assert [name[-2:] for name in names if "_kv" in name] == ["c1", "c1"]
    assert [name[-2:] for name in names if "_kv" not in name] == ["c0", "c0"]


def test_in_three_steps(fake_library, stub, tmp_path):
    """sagert_quantize is what is left of the pre-pass then, sagert_attend the rest."""
    log = tmp_path / "log"
    code = (
        RUN.format(case={"precision": abi.INT8_FP8}, changes={})
        + """
result.append([lib.attention(args, "sagert_quantize"), lib.attention(args, "sagert_attend")])
"""
    )
    assert stub.run(fake_library, code, log=log, STUB_CAPABILITY=90)[-1] == [abi.OK, abi.OK]
    roles = [role for role, _ in launches_of(log, 90)]
    assert roles == ["kv_stats", "quantize_kv", "quantize_q", "attention", "quantize_q", "attention"]


def test_every_row_quantizes_for_every_call(any_library, stub):
    code = """
import itertools
devices = ctypes.c_int32()
lib.c.sagert_device_count(ctypes.byref(devices))
result = []
served = 0
options = itertools.product(range(devices.value), range(1, 4), (FP16, BF16), (40, 64, 128), (0, CAUSAL))
for dev, precision, dtype, d, causal in options:
    args = abi.attention_args(device=dev, precision=precision, dtype=dtype, head_dim=d)
    if lib.workspace_size(args)[0] == UNSUPPORTED:
        continue
    status, info = lib.kv_plan(args)
    args.kv, args.kv_size, args.row = 1 << 42, info.bytes, info.row + 1
    quantized = lib.attention(args, "sagert_quantize_kv")
    args.flags |= QUANTIZED_KV | causal | LSE
    attended = lib.attention(args)
    served += 1
    if (status, quantized, attended) != (OK, OK, OK):
        result.append(lib.error())
result.append(served)
"""
    *errors, served = stub.run(any_library, code, STUB_CAPABILITY="80,86,89,90,100,103,120", STUB_DRIVER=13000)
    assert errors == []
    assert served >= 7 * 2 * 3 * 2


BAD = [
    # the function, changes to a good call of it, words of the message
    ("sagert_kv_plan", {"heads_kv": 0}, "heads_kv is 0"),
    ("sagert_kv_plan", {"seqlen_k": -1}, "seqlen_k is -1"),
    ("sagert_kv_plan", {"dtype": 77}, "dtype is 77"),
    ("sagert_kv_plan", {"struct_size": 8}, "args.struct_size is 8"),
    ("sagert_kv_plan", {"row": 1 << 20}, "row is 1048576"),
    ("sagert_quantize_kv", {"kv": None}, "kv is NULL"),
    ("sagert_quantize_kv", {"kv": (1 << 42) + 128}, "kv is not aligned to 256"),
    ("sagert_quantize_kv", {"kv_size": 1000}, "kv_size is 1000 bytes, but"),
    ("sagert_quantize_kv", {"seqlen_k": 1300}, "exactly"),
    ("sagert_quantize_kv", {"k_data": None}, "k.data is NULL"),
    ("sagert_quantize_kv", {"v_data": None}, "v.data is NULL"),
    ("sagert_quantize_kv", {"v_data": (3 << 32) + 1}, "v.data is not aligned"),
    ("sagert_attention", {"row": 0}, "row is 0, but kv holds"),
    ("sagert_attention", {"kv": None}, "kv is NULL"),
    ("sagert_attention", {"kv": 128}, "kv is not aligned"),
    ("sagert_attention", {"kv_size": 0}, "kv_size is 0"),
    ("sagert_attention", {"seqlen_k": 900}, "pass kv_size as sagert_kv_plan gave it"),
    ("sagert_attention", {"heads_kv": 8}, "kv_size"),
    ("sagert_attention", {"q_data": None}, "q.data is NULL"),
    ("sagert_attention", {"workspace": 0, "splits": True}, "workspace is NULL"),
]


@pytest.mark.parametrize("capability", [90, 100, 110])
def test_bad(fake_library, stub, tmp_path, capability):
    cases = [case for case in BAD if capability != 110 or "splits" not in case[1]]  # mma needs no workspace beside kv
    code = f"""
result = []
for function, changes, _ in {cases!r}:
    args = abi.attention_args(precision=INT8_FP8)
    if changes.pop("splits", False):  # both families need a workspace then
        args.seqlen_q, args.seqlen_k, args.batch, args.heads_q, args.heads_kv = 1, 65536, 1, 1, 1
    status, info = lib.kv_plan(args)
    assert status == OK
    args.kv, args.kv_size, args.row = 1 << 42, info.bytes, info.row + 1
    if function == "sagert_attention":
        args.flags |= QUANTIZED_KV
    for name, value in changes.items():
        if name.endswith("_data"):
            getattr(args, name[0]).data = value
        else:
            setattr(args, name, value)
    status = lib.kv_plan(args)[0] if function == "sagert_kv_plan" else lib.attention(args, function)
    result.append([status, lib.error()])
"""
    log = tmp_path / "log"
    found = stub.run(fake_library, code, log=log, STUB_CAPABILITY=capability)
    for (function, changes, words), (status, text) in zip(cases, found, strict=True):
        assert status == abi.INVALID_ARGUMENT, (function, changes)
        assert words in text, (function, changes)
    assert not calls(log, "cuLaunchKernelEx")


def test_another_row_than_the_one_that_quantized(fake_library, stub):
    """V's scales tell the rows apart, and V where it stays as it is."""
    code = f"""
args = abi.attention_args(precision={abi.INT8_FP8})
info = lib.kv_plan(args)[1]
args.kv, args.kv_size, args.flags = 1 << 42, info.bytes, QUANTIZED_KV
result = []
for precision in (INT8_FP16, INT8_INT8):
    args.precision = precision
    other = lib.kv_plan(args)[1]
    args.row = other.row + 1
    result.append([lib.attention(args), lib.error()])
args.row = info.row + 1
result.append([lib.attention(args), lib.error()])
"""
    found = stub.run(fake_library, code, STUB_CAPABILITY=100)
    assert [status for status, _ in found] == [abi.INVALID_ARGUMENT, abi.INVALID_ARGUMENT, abi.UNSUPPORTED]
    assert "kv_size" in found[0][1]
    assert "is not the row asked for" in found[2][1]


def test_v_that_attention_reads_must_be_given(fake_library, stub):
    code = (
        RUN.format(case={"precision": abi.INT8_FP16}, changes={})
        + """
args.v.data = None
result = [info.reads_v, lib.attention(args), lib.error()]
"""
    )
    for capability in (90, 100, 110):
        reads_v, status, text = stub.run(fake_library, code, STUB_CAPABILITY=capability)
        assert (reads_v, status) == (1, abi.INVALID_ARGUMENT)
        assert "its v" in text


def test_packed_sequences_are_refused(fake_library, stub):
    code = """
status, info = lib.kv_plan(abi.attention_args(flags=VARLEN))
result = [status, info.row, info.bytes, lib.error()]
"""
    status, row, size, text = stub.run(fake_library, code)
    assert (status, row, size) == (abi.UNSUPPORTED, -1, 0)
    assert "quantized before" in text


@pytest.mark.parametrize("case", [{"batch": 0}, {"seqlen_k": 0}])
@pytest.mark.parametrize("capability", [90, 100, 110])
def test_nothing_to_quantize(fake_library, stub, tmp_path, capability, case):
    """Without batches nothing is launched; without keys one block of padding still gets its scales."""
    (size, _, _), _, launches = run(stub, fake_library, tmp_path, capability, {"precision": abi.INT8_FP8, **case})
    assert bool(size) == bool(launches) == ("seqlen_k" in case)
