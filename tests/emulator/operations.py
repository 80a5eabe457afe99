# SPDX-License-Identifier: Apache-2.0
"""Instructions that read registers and write one: a table from the opcode to types and C++.

In the code, {0}, {1}, ... are the operands in the C++ type of their PTX type; see runtime/arithmetic.h.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Operation(NamedTuple):
    """What an opcode reads and computes."""

    result: str
    operands: tuple[str, ...]
    code: str


TABLE: dict[str, Operation] = {}
CXX = {"pred": "bool", "f32": "float", "f64": "double", "f16": "uint16_t", "bf16": "uint16_t"}
CXX |= {"f16x2": "uint32_t", "bf16x2": "uint32_t"}
CXX |= {f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)}
CXX |= {f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)}
SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
WIDER = {"16": "32", "32": "64"}
MODES = {"rm": "m", "rp": "p", "rz": "z"}


def _put(opcode: str, result: str, operands: tuple[str, ...], code: str) -> None:
    TABLE[opcode] = Operation(result, operands, code)


def _integers() -> None:
    for t in (*SIGNED, *UNSIGNED):
        two, three = (t, t), (t, t, t)
        c, wide = CXX[t], CXX.get(t[0] + WIDER.get(t[1:], ""), "")
        _put(f"add.{t}", t, two, "{0} + {1}")
        _put(f"sub.{t}", t, two, "{0} - {1}")
        _put(f"mul.lo.{t}", t, two, "{0} * {1}")
        _put(f"mad.lo.{t}", t, three, "{0} * {1} + {2}")
        big = {"64": "__int128" if t[0] == "s" else "unsigned __int128"}.get(t[1:], wide)
        _put(f"mul.hi.{t}", t, two, f"multiply_high<{big}, {c}>({{0}}, {{1}})")
        _put(f"mad.hi.{t}", t, three, f"multiply_high<{big}, {c}>({{0}}, {{1}}) + {{2}}")
        if wide:
            w = t[0] + WIDER[t[1:]]
            _put(f"mul.wide.{t}", w, two, f"({wide}){{0}} * ({wide}){{1}}")
            _put(f"mad.wide.{t}", w, (t, t, w), f"({wide}){{0}} * ({wide}){{1}} + {{2}}")
        _put(f"div.{t}", t, two, "divided({0}, {1})")
        _put(f"rem.{t}", t, two, "remainder({0}, {1})")
        _put(f"min.{t}", t, two, "{0} < {1} ? {0} : {1}")
        _put(f"max.{t}", t, two, "{0} > {1} ? {0} : {1}")
        _put(f"shr.{t}", t, (t, "u32"), "shift_right({0}, {1})")
    for t in SIGNED:
        _put(f"abs.{t}", t, (t,), "{0} < 0 ? -{0} : {0}")
        _put(f"neg.{t}", t, (t,), "-{0}")
    for t, s in (("s32", "s32"), ("u32", "u32"), ("s64", "s64"), ("u64", "u64")):
        _put(f"bfe.{t}", t, (t, "u32", "u32"), f"extract_bits<{CXX[s]}>({{0}}, {{1}}, {{2}})")
    for bits in ("16", "32", "64"):
        t = f"b{bits}"
        _put(f"shl.{t}", t, (t, "u32"), "shift_left({0}, {1})")
        _put(f"shr.{t}", t, (t, "u32"), "shift_right({0}, {1})")
    for t in ("pred", "b16", "b32", "b64"):
        _put(f"and.{t}", t, (t, t), "{0} & {1}")
        _put(f"or.{t}", t, (t, t), "{0} | {1}")
        _put(f"xor.{t}", t, (t, t), "{0} ^ {1}")
        _put(f"not.{t}", t, (t,), "!{0}" if t == "pred" else "~{0}")
        _put(f"cnot.{t}", t, (t,), "!{0}")
    for bits, suffix in (("32", ""), ("64", "ll")):
        t = f"b{bits}"
        _put(f"popc.{t}", "u32", (t,), f"__builtin_popcount{suffix}({{0}})")
        _put(f"clz.{t}", "u32", (t,), f"{{0}} == 0 ? {bits} : __builtin_clz{suffix}({{0}})")
        _put(f"bfi.{t}", t, (t, t, "u32", "u32"), "insert_bits({0}, {1}, {2}, {3})")
    _put("prmt.b32", "b32", ("b32",) * 3, "permute_bytes({0}, {1}, {2})")
    _put("lop3.b32", "b32", ("b32",) * 4, "logic3({0}, {1}, {2}, {3})")
    for side, name in (("l", "left"), ("r", "right")):
        _put(f"shf.{side}.wrap.b32", "b32", ("b32",) * 3, f"funnel_{name}({{0}}, {{1}}, {{2}} & 31)")
        _put(f"shf.{side}.clamp.b32", "b32", ("b32",) * 3, f"funnel_{name}({{0}}, {{1}}, {{2}} > 32 ? 32 : {{2}})")
    for a, b in itertools.product(("s32", "u32"), repeat=2):
        cxx = {"s32": "int8_t", "u32": "uint8_t"}
        result = "u32" if (a, b) == ("u32", "u32") else "s32"
        _put(f"dp4a.{a}.{b}", result, ("b32", "b32", "s32"), f"dot4<{cxx[a]}, {cxx[b]}>({{0}}, {{1}}, {{2}})")
    for name, t in itertools.product(("min", "max"), ("u16", "s16")):
        c, sign = CXX[t], "<" if name == "min" else ">"
        half = f"[](uint16_t a, uint16_t b) {{{{ return ({c})a {sign} ({c})b ? a : b; }}}}"
        _put(f"{name}.{t}x2", "b32", ("b32", "b32"), f"each({half}, {{0}}, {{1}})")
    for to, cxx in (("s8", "int8_t"), ("u8", "uint8_t"), ("s16", "int16_t"), ("u16", "uint16_t")):
        third = ("b32",) if to.endswith("8") else ()
        code = f"packed<{cxx}>({{0}}, {{1}}, {'{2}' if third else '0u'})"
        _put(f"cvt.pack.sat.{to}.s32{'.b32' if third else ''}", "b32", ("s32", "s32", *third), code)


def _floats() -> None:
    one, two, three = ("f32",), ("f32",) * 2, ("f32",) * 3
    signs = {"add": "+", "sub": "-", "mul": "*"}
    for flush, sat in itertools.product(("", ".ftz"), ("", ".sat")):
        x, y, z = (f"flushed({{{i}}})" if flush else f"{{{i}}}" for i in range(3))

        def done(code: str, flush: str = flush, sat: str = sat) -> str:
            code = f"flushed({code})" if flush else code
            return f"saturated({code})" if sat else code

        for name, sign in signs.items():
            for mode in ("", ".rn"):
                _put(f"{name}{mode}{flush}{sat}.f32", "f32", two, done(f"({x} {sign} {y})"))
            for mode, letter in MODES.items():
                code = f"t.services->rounded('{sign}', '{letter}', {x}, {y}, 0.f)"
                _put(f"{name}.{mode}{flush}{sat}.f32", "f32", two, done(code))
        _put(f"fma.rn{flush}{sat}.f32", "f32", three, done(f"__builtin_fmaf({x}, {y}, {z})"))
        for mode, letter in MODES.items():
            code = f"t.services->rounded('f', '{letter}', {x}, {y}, {z})"
            _put(f"fma.{mode}{flush}{sat}.f32", "f32", three, done(code))
    for flush in ("", ".ftz"):
        x, y = (f"flushed({{{i}}})" if flush else f"{{{i}}}" for i in range(2))
        end = ("flushed(", ")") if flush else ("", "")
        for name in ("rn", "full", "approx"):
            _put(f"div.{name}{flush}.f32", "f32", two, f"{end[0]}({x} / {y}){end[1]}")
        for name in ("rn", "approx"):
            _put(f"rcp.{name}{flush}.f32", "f32", one, f"{end[0]}(1.f / {x}){end[1]}")
            _put(f"sqrt.{name}{flush}.f32", "f32", one, f"{end[0]}__builtin_sqrtf({x}){end[1]}")
        _put(f"rsqrt.approx{flush}.f32", "f32", one, f"{end[0]}(1.f / __builtin_sqrtf({x})){end[1]}")
        _put(f"ex2.approx{flush}.f32", "f32", one, f"{end[0]}exp2f({x}){end[1]}")
        _put(f"lg2.approx{flush}.f32", "f32", one, f"{end[0]}log2f({x}){end[1]}")
        for name in ("min", "max"):
            _put(f"{name}{flush}.f32", "f32", two, f"{name}_float({x}, {y})")
            _put(f"{name}{flush}.NaN.f32", "f32", two, f"{name}_nan({x}, {y})")
        _put(f"abs{flush}.f32", "f32", one, f"__builtin_fabsf({x})")
        _put(f"neg{flush}.f32", "f32", one, f"-{x}")
    _put("tanh.approx.f32", "f32", one, "tanhf({0})")
    # The sign of the first operand goes to the second.
    _put("copysign.f32", "f32", two, "__builtin_copysignf({1}, {0})")
    for name, sign in signs.items():
        for mode in ("", ".rn"):
            _put(f"{name}{mode}.f64", "f64", ("f64",) * 2, f"{{0}} {sign} {{1}}")
    _put("fma.rn.f64", "f64", ("f64",) * 3, "__builtin_fma({0}, {1}, {2})")
    _put("div.rn.f64", "f64", ("f64",) * 2, "{0} / {1}")


def _halves() -> None:
    for kind in ("f16", "bf16"):
        for pairs in (False, True):
            t = kind + "x2" * pairs

            def put(opcode: str, name: str, count: int, t: str = t, pairs: bool = pairs) -> None:
                arguments = ", ".join(f"{{{i}}}" for i in range(count))
                code = f"each({name}, {arguments})" if pairs else f"{name}({arguments})"
                _put(f"{opcode}.{t}", t, (t,) * count, code)

            for name, mode in itertools.product(("add", "sub", "mul"), ("", ".rn")):
                put(name + mode, f"{name}_{kind}", 2)
            put("fma.rn", f"fma_{kind}", 3)
            for name in ("min", "max"):
                put(name, f"{name}_{kind}", 2)
                put(f"{name}.NaN", f"{name}_nan_{kind}", 2)
            put("ex2.approx" + ".ftz" * (kind == "bf16"), f"ex2_{kind}", 1)
            ones = "0x80008000u" if pairs else "0x8000"
            _put(f"neg.{t}", t, (t,), f"{{0}} ^ {ones}")
            _put(f"abs.{t}", t, (t,), f"{{0}} & ~{ones}")


def _conversions() -> None:
    integers = [f"{kind}{bits}" for kind in "su" for bits in (8, 16, 32, 64)]
    for a, b in itertools.product(integers, repeat=2):
        _put(f"cvt.{a}.{b}", a, (b,), "{0}")
        if int(a[1:]) <= 32:
            _put(f"cvt.sat.{a}.{b}", a, (b,), f"clamped<{CXX[a]}>({{0}})")
    ways = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
    narrow = {"f16": "from_f16({0})", "bf16": "from_bf16({0})", "f32": "{0}", "f64": "{0}"}
    for (way, function), (source, value), flush in itertools.product(ways.items(), narrow.items(), ("", ".ftz")):
        for to in integers:
            for sat in ("", ".sat"):
                code = f"to_integer<{CXX[to]}>({function}({value}))"
                _put(f"cvt.{way}{flush}{sat}.{to}.{source}", to, (source,), code)
        if source == "f32":
            _put(f"cvt.{way}{flush}.f32.f32", "f32", ("f32",), f"{function}({{0}})")
    for source in integers:
        _put(f"cvt.rn.f32.{source}", "f32", (source,), "(float){0}")
        _put(f"cvt.rn.f64.{source}", "f64", (source,), "(double){0}")
        _put(f"cvt.rn.f16.{source}", "f16", (source,), "to_f16((double){0})")
        _put(f"cvt.rn.bf16.{source}", "bf16", (source,), "to_bf16((double){0})")
    for source in ("f16", "bf16"):
        _put(f"cvt.f32.{source}", "f32", (source,), narrow[source])
        _put(f"cvt.rn.{source}.f32", source, ("f32",), f"to_{source}({{0}})")
        # The first operand goes to the upper half.
        _put(f"cvt.rn.{source}x2.f32", "b32", ("f32", "f32"), f"pair(to_{source}({{1}}), to_{source}({{0}}))")
        relu = f"pair(to_{source}(max_nan({{1}}, 0.f)), to_{source}(max_nan({{0}}, 0.f)))"
        _put(f"cvt.rn.relu.{source}x2.f32", "b32", ("f32", "f32"), relu)
    _put("cvt.f64.f32", "f64", ("f32",), "{0}")
    _put("cvt.rn.f32.f64", "f32", ("f64",), "(float){0}")
    _put("cvt.sat.f32.f32", "f32", ("f32",), "saturated({0})")
    for kind in ("e4m3", "e5m2"):
        both = f"(uint16_t)(to_{kind}({{1}}) | to_{kind}({{0}}) << 8)"
        _put(f"cvt.rn.satfinite.{kind}x2.f32", "b16", ("f32", "f32"), both)
        halves = f"(uint16_t)(to_{kind}(from_f16(low({{0}}))) | to_{kind}(from_f16(high({{0}}))) << 8)"
        _put(f"cvt.rn.satfinite.{kind}x2.f16x2", "b16", ("b32",), halves)
        back = f"pair(to_f16(from_{kind}((uint8_t){{0}})), to_f16(from_{kind}((uint8_t)({{0}} >> 8))))"
        _put(f"cvt.rn.f16x2.{kind}x2", "b32", ("b16",), back)


def _selections() -> None:
    for t in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"):
        _put(f"selp.{t}", t, (t, t, "pred"), "{2} ? {0} : {1}")
    for t in ("pred", "b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64", "f16"):
        _put(f"mov.{t}", t, (t,), "{0}")


for _fill in (_integers, _floats, _halves, _conversions, _selections):
    _fill()
