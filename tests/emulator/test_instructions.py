# SPDX-License-Identifier: Apache-2.0
"""Single instructions, executed from a few lines of PTX."""

import numpy as np
import pytest
import torch

from tests.emulator.ptx_text import PtxError
from tests.emulator.translate import translate

HEAD = ".version 8.8\n.target sm_89\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .f32 %f<40>; .reg .b64 %d<20>;
"""
# %r0: the thread; %d0: where its input is; %d1: where its output goes.
START = """
mov.u32 %r0, %tid.x;
ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out];
mul.wide.u32 %d2, %r0, IN; add.s64 %d0, %d0, %d2;
mul.wide.u32 %d2, %r0, OUT; add.s64 %d1, %d1, %d2;
"""


def kernel(body, bytes_in=4, bytes_out=4, declarations=""):
    start = START.replace("IN", str(bytes_in)).replace("OUT", str(bytes_out))
    head = f"{HEAD}.visible .entry k(.param .u64 in, .param .u64 out)\n"
    return f"{head}{{{REGISTERS}{declarations}{start}{body}\nret;\n}}\n"


def run(emulated, body, given, wanted, *, declarations="", **options):
    """The output of a kernel whose threads have rows of `given`; `wanted`: what the output is like."""
    threads = options.setdefault("block", len(given))
    bytes_in, bytes_out = given.nbytes // threads, np.asarray(wanted).nbytes // threads
    out = np.zeros_like(wanted)
    made = emulated(kernel(body, bytes_in, bytes_out, declarations), "k", [np.ascontiguousarray(given), out], **options)
    assert made.status == 0, made.error
    return made.arrays[1]


def words(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)


def fragments(matrix, bits):
    """Rows of 8 lines, `matrix` [lines, k], as lanes have them: [32, registers]."""
    per = 32 // bits
    lines, k = matrix.shape
    packed = np.zeros((lines, k // per), np.uint32)
    for e in range(per):
        packed |= (matrix[:, e::per].astype(np.uint32) & ((1 << bits) - 1)) << np.uint32(bits * e)
    lane = np.arange(32)
    columns = [
        packed[lane // 4 + 8 * (i % (lines // 8)), lane % 4 + 4 * (i // (lines // 8))] for i in range(packed.size // 32)
    ]
    return np.stack(columns, 1)


def accumulators(matrix):
    lane = np.arange(32)
    return np.stack([matrix[lane // 4 + 8 * (e // 2), lane % 4 * 2 + e % 2] for e in range(matrix.size // 32)], 1)


def draw(kind, shape, seed):
    """Values, and their bits."""
    rng = np.random.default_rng(seed)
    if kind in ("s8", "u8", "s4", "u4"):
        bits = int(kind[1])
        low, high = (-(1 << bits - 1), 1 << bits - 1) if kind[0] == "s" else (0, 1 << bits)
        values = rng.integers(low, high, shape)
        return values, values & ((1 << bits) - 1), bits
    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    made = torch.from_numpy(rng.standard_normal(shape)).to(dtypes[kind])
    size = made.element_size()
    return made.double().numpy(), made.view({1: torch.uint8, 2: torch.uint16}[size]).numpy(), 8 * size


MULTIPLIES = [
    (16, 32, "s8", "s8", "s32"), (16, 32, "u8", "s8", "s32"), (16, 16, "s8", "s8", "s32"), (8, 16, "s8", "u8", "s32"),
    (16, 64, "s4", "s4", "s32"), (16, 64, "u4", "s4", "s32"), (8, 32, "s4", "s4", "s32"), (16, 16, "f16", "f16", "f32"),
    (16, 16, "bf16", "bf16", "f32"), (16, 8, "f16", "f16", "f32"), (16, 8, "bf16", "bf16", "f32"),
    (16, 16, "f16", "f16", "f16"), (16, 8, "f16", "f16", "f16"), (16, 32, "e4m3", "e4m3", "f32"),
    (16, 32, "e5m2", "e4m3", "f32"), (16, 32, "e4m3", "e4m3", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("m", "k", "a_kind", "b_kind", "c_kind"), MULTIPLIES)
def test_mma(emulated, m, k, a_kind, b_kind, c_kind):
    a, a_bits, bits = draw(a_kind, (m, k), 1)
    b, b_bits, _ = draw(b_kind, (8, k), 2)
    rng = np.random.default_rng(3)
    if c_kind == "s32":
        c = rng.integers(-1000, 1000, (m, 8)).astype(np.int32)
        c_words = accumulators(c).view(np.uint32)
    elif c_kind == "f32":
        c = rng.standard_normal((m, 8)).astype(np.float32)
        c_words = accumulators(c).view(np.uint32)
    else:
        c = rng.standard_normal((m, 8)).astype(np.float16)
        c_words = np.ascontiguousarray(accumulators(c)).view(np.uint32)
    parts = [fragments(a_bits, bits), fragments(b_bits, bits), c_words]
    given = np.concatenate([x.astype(np.uint32) for x in parts], 1)
    names = iter(range(1, given.shape[1] + 1))
    load = "".join(f"ld.global.u32 %r{i + 1}, [%d0+{4 * i}];" for i in range(given.shape[1]))
    groups = ["{" + ", ".join(f"%r{next(names)}" for _ in range(x.shape[1])) + "}" for x in parts]
    count = c_words.shape[1]
    result = "{" + ", ".join(f"%r{40 + i}" for i in range(count)) + "}"
    store = "".join(f"st.global.u32 [%d1+{4 * i}], %r{40 + i};" for i in range(count))
    opcode = f"mma.sync.aligned.m{m}n8k{k}.row.col.{c_kind}.{a_kind}.{b_kind}.{c_kind}"
    text = f"{load} {opcode} {result}, {', '.join(groups)}; {store}"
    found = run(emulated, text, given, c_words)
    want = a.astype(np.float64) @ b.astype(np.float64).T + c
    if c_kind == "s32":
        assert np.array_equal(found.view(np.int32), accumulators(want.astype(np.int32)))
    elif c_kind == "f32":
        assert np.array_equal(found.view(np.float32), accumulators(want.astype(np.float32)))
    else:
        assert np.array_equal(found.view(np.float16), accumulators(want.astype(np.float16)))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(emulated, count, transposed):
    """Each lane stores 16 bytes to shared memory; matrix i is what lanes 8 i to 8 i + 7 stored."""
    given = words(128).reshape(32, 4)
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    body = f"""
    ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d0];
    mov.u32 %r5, place; shl.b32 %r6, %r0, 4; add.s32 %r5, %r5, %r6;
    st.shared.v4.u32 [%r5], {{%r1, %r2, %r3, %r4}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 {{{names}}}, [%r5];
    """ + "".join(f"st.global.u32 [%d1+{4 * i}], %r{10 + i};" for i in range(count))
    found = run(
        emulated, body, given, np.zeros((32, count), np.uint32), declarations=".shared .align 16 .b8 place[512];"
    )
    matrices = given.view(np.uint16).reshape(4, 8, 8)[:count]
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    want = np.ascontiguousarray(matrices).view(np.uint32).reshape(count, 32).T
    assert np.array_equal(found, want)


COPY = """
mov.u32 %r5, place; shl.b32 %r6, %r0, 4; add.s32 %r5, %r5, %r6;
cp.async.cg.shared.global [%r5], [%d0], 16, SIZE;
cp.async.commit_group;
WAIT
ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r5];
st.global.v4.u32 [%d1], {%r1, %r2, %r3, %r4};
"""


@pytest.mark.parametrize(
    ("wait", "there"),
    [("cp.async.wait_group 0;", 1), ("cp.async.wait_all;", 1), ("", 0), ("cp.async.wait_group 1;", 0)],
)
@pytest.mark.parametrize("size", [16, 4, 0])
def test_copies_come_as_late_as_they_may(emulated, wait, there, size):
    given = words(128).reshape(32, 4)
    body = COPY.replace("SIZE", str(size)).replace("WAIT", wait)
    found = run(emulated, body, given, given, declarations=".shared .align 16 .b8 place[512];")
    want = np.where(np.arange(4) < size // 4, given, 0) if there else np.full_like(given, 0xFFFFFFFF)
    assert np.array_equal(found, want)


def _interleaved(a, b, c):
    return a & 0xFF | (b & 0xFF) << 8 | (a >> 8 & 0xFF) << 16 | (b >> 8 & 0xFF) << 24


def _dot(a, b, c):
    return sum((a >> s & 255) * (b >> s & 255) for s in (0, 8, 16, 24)) + c & 0xFFFFFFFF


def _signed(x):
    return x - (x >> 31 << 32)


INTEGERS = [
    ("prmt.b32 %r4, %r1, %r2, 0x5140;", _interleaved),
    ("prmt.b32 %r4, %r1, %r2, 0x8888;", lambda a, b, c: 0xFFFFFFFF if a & 0x80 else 0),
    ("lop3.b32 %r4, %r1, %r2, %r3, 0xe8;", lambda a, b, c: a & b | a & c | b & c),
    ("shf.l.wrap.b32 %r4, %r1, %r2, 7;", lambda a, b, c: (b << 7 | a >> 25) & 0xFFFFFFFF),
    ("shf.r.wrap.b32 %r4, %r1, %r2, 7;", lambda a, b, c: (b << 25 | a >> 7) & 0xFFFFFFFF),
    ("shl.b32 %r4, %r1, 32;", lambda a, b, c: 0),
    ("shr.s32 %r4, %r1, 40;", lambda a, b, c: 0xFFFFFFFF if a >> 31 else 0),
    ("bfe.u32 %r4, %r1, 4, 8;", lambda a, b, c: a >> 4 & 0xFF),
    ("bfe.s32 %r4, %r1, 4, 8;", lambda a, b, c: ((a >> 4 & 0xFF) ^ 0x80) - 0x80 & 0xFFFFFFFF),
    ("bfi.b32 %r4, %r1, %r2, 8, 4;", lambda a, b, c: b & ~0xF00 | (a & 15) << 8),
    ("dp4a.u32.u32 %r4, %r1, %r2, %r3;", _dot),
    ("mul.hi.u32 %r4, %r1, %r2;", lambda a, b, c: a * b >> 32),
    ("mad.lo.s32 %r4, %r1, %r2, %r3;", lambda a, b, c: a * b + c & 0xFFFFFFFF),
    ("min.s32 %r4, %r1, %r2;", lambda a, b, c: min(a, b, key=_signed)),
    ("popc.b32 %r4, %r1;", lambda a, b, c: bin(a).count("1")),
    ("setp.gt.s32 %p1|%p2, %r1, %r2; selp.b32 %r4, %r1, %r2, %p2;", lambda a, b, c: min(a, b, key=_signed)),
    ("{.reg .pred q; setp.lt.u32 q, %r1, %r2; mov.u32 %r4, 1; @!q mov.u32 %r4, 2;}", lambda a, b, c: 1 if a < b else 2),
    ("cvt.pack.sat.s8.s32.b32 %r4, 300, -300, %r1;", lambda a, b, c: (a << 16 | 0x7F80) & 0xFFFFFFFF),
]  # fmt: skip


@pytest.mark.parametrize(("text", "function"), INTEGERS, ids=lambda x: x if isinstance(x, str) else "")
def test_integers(emulated, text, function):
    given = words(96).reshape(32, 3)
    read = "ld.global.u32 %r1, [%d0]; ld.global.u32 %r2, [%d0+4]; ld.global.u32 %r3, [%d0+8];"
    body = f"{read} {text} st.global.u32 [%d1], %r4;"
    found = run(emulated, body, given, np.zeros(32, np.uint32))
    assert found.tolist() == [function(*map(int, row)) for row in given]


NAN, INF = float("nan"), float("inf")
FLOATS = [
    ("max.f32 %f3, %f1, %f2;", 1.0, NAN, 1.0), ("max.NaN.f32 %f3, %f1, %f2;", 1.0, NAN, NAN),
    ("min.f32 %f3, %f1, %f2;", 0.0, -0.0, -0.0), ("copysign.f32 %f3, %f1, %f2;", -1.0, 5.0, -5.0),
    ("ex2.approx.ftz.f32 %f3, %f1;", 3.0, 0.0, 8.0), ("ex2.approx.ftz.f32 %f3, %f1;", -140.0, 0.0, 0.0),
    ("ex2.approx.ftz.f32 %f3, %f1;", -INF, 0.0, 0.0), ("fma.rn.sat.f32 %f3, %f1, %f2, %f1;", 2.0, 3.0, 1.0),
    ("fma.rn.sat.f32 %f3, %f1, %f2, %f1;", NAN, 3.0, 0.0), ("sub.rm.f32 %f3, %f1, %f2;", 1.0, 1e-30, 1 - 2.0**-24),
    ("add.rp.f32 %f3, %f1, %f2;", 1.0, 1e-30, 1 + 2.0**-23), ("lg2.approx.f32 %f3, %f1;", 8.0, 0.0, 3.0),
    ("cvt.rzi.s32.f32 %r1, %f1; cvt.rn.f32.s32 %f3, %r1;", -7.9, 0.0, -7.0),
    ("cvt.rni.s32.f32 %r1, %f1; cvt.rn.f32.s32 %f3, %r1;", 2.5, 0.0, 2.0),
    ("cvt.rni.s32.f32 %r1, %f1; cvt.rn.f32.s32 %f3, %r1;", NAN, 0.0, 0.0),
    ("mul.ftz.f32 %f3, %f1, %f2;", 1e-38, 0.5, 0.0),
    ("setp.ltu.f32 %p1, %f1, %f2; selp.f32 %f3, 0f3F800000, 0f00000000, %p1;", NAN, 1.0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "a", "b", "want"), FLOATS)
def test_floats(emulated, text, a, b, want):
    given = np.array([[a, b]], np.float32)
    body = f"ld.global.v2.f32 {{%f1, %f2}}, [%d0]; {text} st.global.f32 [%d1], %f3;"
    found = run(emulated, body, given, np.zeros(1, np.float32))
    assert np.array_equal(found, np.array([want], np.float32), equal_nan=True)
    assert want != want or np.signbit(found[0]) == np.signbit(np.float32(want))


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("cvt.rn.f16x2.f32 %r1, %f2, %f1;", torch.float16),
        ("cvt.rn.bf16x2.f32 %r1, %f2, %f1;", torch.bfloat16),
        ("cvt.rn.satfinite.e4m3x2.f32 %h1, %f2, %f1; cvt.u32.u16 %r1, %h1;", torch.float8_e4m3fn),
        ("cvt.rn.satfinite.e5m2x2.f32 %h1, %f2, %f1; cvt.u32.u16 %r1, %h1;", torch.float8_e5m2),
    ],
)
def test_narrow_formats(emulated, text, dtype):
    """Values of every magnitude, ties among them, as torch converts them."""
    rng = np.random.default_rng(5)
    given = (rng.standard_normal(2048) * 2.0 ** rng.integers(-30, 18, 2048)).astype(np.float32)
    given[::3] = given[::3].view(np.uint32).__and__(np.uint32(0xFFF80000)).view(np.float32)
    given[:6] = [0.0, -0.0, 448.0, 464.0, 65504.0, 1e-8]
    body = f"ld.global.v2.f32 {{%f1, %f2}}, [%d0]; {text} st.global.u32 [%d1], %r1;"
    found = run(emulated, body, given.reshape(1024, 2), np.zeros(1024, np.uint32))
    limit = torch.finfo(dtype).max if dtype.itemsize == 1 else INF
    want = torch.from_numpy(given).clamp(-limit, limit).to(dtype)
    size = {1: np.uint8, 2: np.uint16}[dtype.itemsize]
    halves = np.stack([found & (1 << 8 * dtype.itemsize) - 1, found >> 8 * dtype.itemsize], 1).flatten().astype(size)
    assert np.array_equal(halves, want.view(torch.uint8 if size is np.uint8 else torch.uint16).numpy())


def test_lanes_of_a_warp_together(emulated):
    given = words(32)
    body = """
    ld.global.u32 %r1, [%d0];
    shfl.sync.bfly.b32 %r2|%p1, %r1, 5, 31, -1;
    shfl.sync.up.b32 %r3|%p2, %r1, 3, 0, -1;
    shfl.sync.idx.b32 %r4, %r1, 2, 0x181f, -1;
    and.b32 %r5, %r1, 1; setp.ne.u32 %p3, %r5, 0;
    vote.sync.ballot.b32 %r6, %p3, -1;
    redux.sync.max.u32 %r7, %r1, -1;
    selp.b32 %r8, 1, 0, %p2;
    st.global.v4.u32 [%d1], {%r2, %r3, %r4, %r6}; st.global.v2.u32 [%d1+16], {%r7, %r8};
    """
    found = run(emulated, body, given, np.zeros((32, 8), np.uint32))
    lane = np.arange(32)
    up = np.where(lane >= 3, given[np.maximum(lane - 3, 0)], given)
    ballot = sum(int(x & 1) << i for i, x in enumerate(given))
    want = [given[lane ^ 5], up, given[lane // 8 * 8 + 2], np.full(32, ballot), np.full(32, given.max()), lane >= 3]
    for i, column in enumerate(want):
        assert np.array_equal(found[:, i], column), i


EXCHANGE = """
ld.global.u32 %r1, [%d0];
mov.u32 %r5, place; shl.b32 %r6, %r0, 2; add.s32 %r6, %r6, %r5; st.shared.u32 [%r6], %r1;
BARRIER
xor.b32 %r7, %r0, 96; shl.b32 %r7, %r7, 2; add.s32 %r7, %r7, %r5; ld.shared.u32 %r2, [%r7];
st.global.u32 [%d1], %r2;
"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.sync 3, 128;", "barrier.sync 3, 128;", ""])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_missing_barrier_shows(emulated, barrier, seed):
    given = words(128)
    body = EXCHANGE.replace("BARRIER", barrier)
    found = run(emulated, body, given, given, declarations=".shared .align 4 .b8 place[512];", seed=seed)
    assert np.array_equal(found, given[np.arange(128) ^ 96]) == bool(barrier)


def test_divergence(emulated):
    """A loop whose length differs from lane to lane, and a branch that half of the lanes take."""
    body = """
    ld.global.u32 %r1, [%d0]; mov.u32 %r2, 0;
    again:
    setp.ge.u32 %p1, %r2, %r0; @%p1 bra done;
    add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra again;
    done:
    and.b32 %r3, %r0, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra even;
    shfl.sync.bfly.b32 %r1, %r1, 2, 31, 0xaaaaaaaa; bra.uni end;
    even: add.u32 %r1, %r1, 1000;
    end: bar.warp.sync -1; st.global.u32 [%d1], %r1;
    """
    given = np.arange(32, dtype=np.uint32)
    found = run(emulated, body, given, given)
    total = given + given * (given - 1) // 2
    assert np.array_equal(found, np.where(given % 2, total[given ^ 2], total + 1000))


def failure(emulated, body, threads=64, declarations="", **options):
    made = emulated(
        kernel(body, declarations=declarations), "k", [words(threads), words(threads)], block=threads, **options
    )
    assert made.status == 719
    return made.error


def test_a_deadlock_names_who_waits(emulated):
    error = failure(emulated, "setp.lt.u32 %p1, %r0, 32; @%p1 bra l;\nbar.sync 1, 64;\nl: bar.sync 2, 64;")
    assert error.startswith("k: deadlock")
    assert "warp 0, lane 0 waits at line" in error
    assert "bar.sync 2, 64" in error
    assert "warp 1, lane 0 waits at line" in error


def test_an_endless_wait_ends(emulated):
    body = "l: ld.shared.u32 %r1, [place]; nanosleep.u32 1; setp.ne.u32 %p1, %r1, 7; @%p1 bra l;"
    assert "nothing moves" in failure(emulated, body, declarations=".shared .align 4 .b8 place[4];")


def test_shared_memory_has_bounds(emulated):
    error = failure(
        emulated, "mov.u32 %r1, place; st.shared.u32 [%r1+16], %r0;", declarations=".shared .align 4 .b8 place[16];"
    )
    assert "outside shared memory" in error
    assert "st.shared.u32 [%r1+16], %r0" in error
    assert "not a multiple" in failure(emulated, "mov.u32 %r1, 1026; st.shared.u32 [%r1], %r0;", shared=64)


def test_part_of_a_warp_cannot_multiply(emulated):
    load = "mov.u32 %r1, place; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];"
    body = f"setp.gt.u32 %p1, %r0, 3; @%p1 bra l; {load} l:"
    error = failure(emulated, body, 32, declarations=".shared .align 16 .b8 place[512];")
    assert "deadlock" in error
    assert "ldmatrix" in error


@pytest.mark.parametrize(
    "text", ["tex.1d.v4.s32.s32 {%r1}, [%r2];", "add.weird.s32 %r1, %r2, %r3;", "add.s32 %r1, %x, %r2;"]
)
def test_unknown_instructions_are_named(text):
    with pytest.raises(PtxError, match="k, line") as error:
        translate(kernel(text))
    assert text.split()[0] in str(error.value)
