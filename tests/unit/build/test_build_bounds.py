# SPDX-License-Identifier: Apache-2.0
"""The main loop of a kernel is found in its machine code, its instructions are counted, and bounds follow from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from build_tools import bounds, compile_cuda, expand, mainloop
from build_tools.bounds import Entry, Gpu
from build_tools.cache import Cache
from build_tools.errors import BuildError
from build_tools.expand import Job
from build_tools.mainloop import Counts
from build_tools.manifest import load

ROOT = Path(__file__).resolve().parents[3]
# An outer loop around an inner one, a second inner loop that masks, and a loop without tensor-core instructions.
SASS = """
.text.other:
        /*0000*/                   EXIT ;
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDS.128 R4, [R2] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0040*/                   LDSM.16.MT88.2 R8, [R2+0x100] ;
        /*0050*/                   IMMA.16832.S8.S8 R12, R4.reuse.ROW, R8.COL, RZ ;
        /*0060*/               @P1 IMMA.16832.U8.S8 R16, R4.ROW, R8.COL, R16 ;
        /*0070*/                   I2FP.F32.S32 R12, R12 ;
        /*0080*/                   MUFU.EX2 R12, R12 ;
        /*0090*/                   I2F R13, R13 ;
        /*00a0*/                   FFMA.FTZ R12, R12, R13, R14 ;
        /*00b0*/                   LDGSTS.E.BYPASS.LTC128B.128 [R2], [R20.64] ;
        /*00c0*/                   STS.64 [R2], R8 ;
        /*00d0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0100*/                   IMMA.16832.S8.S8 R12, R4.reuse.ROW, R8.COL, RZ ;
        /*0110*/                   IMMA.16832.U8.S8 R16, R4.ROW, R8.COL, R16 ;
        /*0120*/                   SEL R12, R12, R13, P2 ;
        /*0130*/                   SEL R12, R12, R13, P2 ;
        /*0140*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0150*/               @P0 BRA `(.L_x_0) ;
.L_x_4:
        /*0160*/                   FADD R1, R1, R1 ;
        /*0170*/                   BRA `(.L_x_4);
"""
# A step of its own for the first keys, a mask and a rescaling that most turns jump over, and two ways back.
BRANCHES = """
.text.kernel:
        /*0000*/                   BRA.U UP0, `(.L_x_5) ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   IMMA.16832.S8.S8 R12, R4.reuse.ROW, R8.COL, RZ ;
        /*0040*/                   BRA `(.L_x_4) ;
.L_x_1:
        /*0050*/                   IMMA.16832.S8.S8 R12, R4.reuse.ROW, R8.COL, RZ ;
        /*0060*/                   BRA.DIV ~URZ, `(.L_x_2) ;
        /*0070*/                   SEL R12, R12, R13, P2 ;
        /*0080*/                   SEL R12, R12, R13, P2 ;
.L_x_2:
        /*0090*/                   HMMA.16816.F32 R16, R4, R8, R16 ;
        /*00a0*/              @!P1 BRA `(.L_x_0) ;
        /*00b0*/                   FMUL R16, R16, R17 ;
.L_x_4:
        /*00c0*/               @P2 EXIT ;
        /*00d0*/                   BRA `(.L_x_0) ;
.L_x_5:
        /*00e0*/                   EXIT ;
"""
LOOP = """// SPDX-License-Identifier: Apache-2.0
extern "C" __global__ void __launch_bounds__(32) loop(const int* q, float* out, int blocks) {
  __shared__ int tile[32];
  float sum = 0.0f;
  int a[4] = {q[0], q[1], q[2], q[3]};
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    tile[threadIdx.x] = q[32 * block + threadIdx.x];
    __syncthreads();
    for (int half = 0; half < 2; ++half) {
      int c[4] = {0, 0, 0, 0};
      int b0 = tile[threadIdx.x ^ (1 + half)], b1 = tile[threadIdx.x ^ (4 + half)];
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
      for (int i = 0; i < 4; ++i) {
        float e;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(static_cast<float>(c[i])));
        sum += e;
      }
    }
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}
"""


def test_main_loop_is_the_plainest_of_the_innermost() -> None:
    found = mainloop.functions(SASS)
    assert [len(found[name]) for name in ("other", "kernel")] == [1, 24]
    counts = mainloop.count(mainloop.main_loop(found["kernel"]))
    # The second inner loop has fewer instructions around its two.
    assert counts.pipes == {"alu": 2, "control": 1}
    select = "        /*0120*/                   SEL R12, R12, R13, P2 ;\n"
    longer = mainloop.functions(SASS.replace(select, 20 * select))
    counts = mainloop.count(mainloop.main_loop(longer["kernel"]))
    assert counts == Counts(
        tensor={"IMMA.16832.S8.S8": 1, "IMMA.16832.U8.S8": 1},
        pipes={"memory": 4, "alu": 1, "xu": 2, "fma": 1, "uniform": 1, "control": 2},
        xu={"MUFU": 1, "I2F": 1},
        shared_read=512 + 256,
        shared_written=512 + 256,
        barriers=1,
    )
    assert counts.issued == 13
    with pytest.raises(BuildError, match="no loop with tensor-core instructions"):
        mainloop.main_loop(found["other"])


def test_a_turn_takes_the_shortest_way_with_most_tensor_core_instructions() -> None:
    turn = mainloop.main_loop(mainloop.functions(BRANCHES)["kernel"])
    names = [instruction.opcode.partition(".")[0] for instruction in turn]
    assert names == ["IADD3", "BRA", "IMMA", "BRA", "HMMA", "BRA"]
    unconditional = BRANCHES.replace("BRA.DIV ~URZ, `(.L_x_2)", "NOP").replace("@!P1 BRA `(.L_x_0)", "NOP")
    turn = mainloop.main_loop(mainloop.functions(unconditional)["kernel"])
    names = [instruction.opcode.partition(".")[0] for instruction in turn]
    assert names == ["IADD3", "BRA", "IMMA", "NOP", "SEL", "SEL", "HMMA", "NOP", "FMUL", "EXIT", "BRA"]


@pytest.mark.parametrize(
    ("opcode", "products", "kind", "qk"),
    [
        ("IMMA.16832.S8.S8.SAT", 4096, "int8", True),
        ("IMMA.16832.U8.S8", 4096, "int8", False),
        ("IMMA.16864.S4.S4", 8192, "int4", True),
        ("HMMA.16816.F32.BF16", 2048, "f16_f32", False),
        ("HMMA.16816.F16", 2048, "f16_f16", False),
        ("HMMA.1688.F32", 1024, "f16_f32", False),
        ("QMMA.16832.F16.E4M3.E4M3", 4096, "fp8_f16", False),
        ("QMMA.16832.F32.E4M3.E4M3", 4096, "fp8_f32", False),
    ],
)
def test_tensor_core_instructions(opcode: str, products: int, kind: str, qk: bool) -> None:
    found = (mainloop.multiplications(opcode), mainloop.kind(opcode), mainloop.is_qk(opcode))
    assert found == (products, kind, qk)


def test_other_tensor_core_instructions_are_refused() -> None:
    with pytest.raises(BuildError, match=r"IGMMA\.64x128x32\.S8\.S8: no mma\.sync shape"):
        mainloop.multiplications("IGMMA.64x128x32.S8.S8")
    with pytest.raises(BuildError, match=r"OMMA\.16864\.F32: its rate is unknown"):
        mainloop.kind("OMMA.16864.F32")


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_120"])
def test_compiled_loop(target: str, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.cuda_nvrtc")
    (tmp_path / "loop.cu").write_text(LOOP)
    args = (("q", "*i32"), ("out", "*fp32"), ("blocks", "i32"))
    job = Job(
        "sm80", target, 80, "cuda", "loop.cu:loop", args, (), (), 0, None, 1, None, 32, 0, "loop", "sagert_loop"
    )  # fmt: skip
    found = mainloop.disassemble(compile_cuda.compile_job(job, tmp_path).cubin)
    counts = mainloop.count(mainloop.main_loop(found["loop"]))
    assert counts.tensor == {"IMMA.16832.S8.S8": 2}
    assert (counts.shared_read, counts.shared_written, counts.barriers) == (4 * 128, 128, 2)
    assert counts.xu == {"MUFU": 8} | ({"I2F": 8} if target == "sm_80" else {})


GPU = Gpu("one", ("sm80",), "", 100, 1000, {"fma": 64, "alu": 64, "xu": 16}, 4, 128, {"int8": 2048, "f16_f32": 1024})


def _entry(**changes: Any) -> Entry:
    """16 queries by 32 keys by 64 channels in a turn: 8 Q K^T, 16 P V."""
    counts = Counts(
        {"IMMA.16832.S8.S8": 8, "HMMA.16816.F32": 16}, {"xu": 16, "alu": 20, "fma": 24, "memory": 8}, {"MUFU": 16},
        shared_read=4096, shared_written=0, barriers=1,
    )  # fmt: skip
    return dataclasses.replace(Entry("k", "sm80", 64, False, "bf16", 16, counts), **changes)


def test_clocks_and_bound() -> None:
    entry = _entry()
    assert entry.keys == 32
    assert entry.turns == 2 * 8
    # 128 * 64 * 64 multiplications twice: 256 clocks of INT8 and 512 of FP16 tensor cores
    assert entry.clocks(GPU) == {"tensor": 768, "xu": 512, "issue": 368, "alu": 160, "fma": 192, "shared": 512}
    assert entry.bound(GPU) == pytest.approx(4 * 128 * 64 * 64 / 768 * 100 * 1e9 / 1e12)
    data = entry.to_json([GPU])
    assert data["tensor"] == {"IMMA.16832.S8.S8": 128, "HMMA.16816.F32": 256}
    assert (data["issued"], data["barriers_per_64_keys"], data["shared_read"]) == (1472, 2, 65536)
    assert data["gpus"]["one"]["bound_tflops"] == pytest.approx(273.1)
    text = bounds.markdown([entry], [GPU])
    assert "| k bf16 | sm80 | 64 | full | 128 IMMA.16832.S8.S8, 256 HMMA.16816.F32 | 256 (0) |" in text
    assert "| one | k bf16 | 64 | full | **768** | 512 | 368 | 160 | 192 | 512 | 273 |" in text


def test_channels_are_whole_instructions() -> None:
    """INT4 takes 64 channels at a time: 96 cost as much as 128."""
    counts = dataclasses.replace(_entry().counts, tensor={"IMMA.16864.S4.S4": 8, "HMMA.16816.F32": 24})
    assert _entry(head_dim=96, counts=counts).keys == _entry(head_dim=128, counts=counts).keys == 32
    assert _entry(head_dim=96).keys == pytest.approx(32 * 64 / 96)


def test_what_has_no_rate_or_no_product_is_refused() -> None:
    none = Counts({"QMMA.16832.F32.E4M3.E4M3": 1, "IMMA.16832.S8.S8": 1}, {}, {}, 0, 0, 0)
    with pytest.raises(
        BuildError, match=r"k: QMMA\.16832\.F32\.E4M3\.E4M3 has no rate on one; its rates: int8, f16_f32"
    ):
        _entry(counts=none).clocks(GPU)
    with pytest.raises(BuildError, match=r"k: no integer Q K\^T in its main loop: HMMA\.16816\.F32"):
        _ = _entry(counts=Counts({"HMMA.16816.F32": 1}, {}, {}, 0, 0, 0)).keys


def test_published_rates_are_the_published_totals() -> None:
    totals = {  # dense, TFLOPS or TOPS
        "A100": {"f16_f32": 312, "f16_f16": 312, "int8": 624, "int4": 1248},
        "RTX 3090": {"f16_f32": 71, "f16_f16": 142, "int8": 284, "int4": 568},
        "RTX 4090": {
            "f16_f32": 165.2, "f16_f16": 330.3, "fp8_f32": 330.3, "fp8_f16": 660.6, "int8": 660.6, "int4": 1321,
        },
        "L40S": {"f16_f32": 362, "f16_f16": 362, "fp8_f32": 733, "fp8_f16": 733, "int8": 733, "int4": 1466},
        "RTX 5090": {"f16_f32": 209.5, "f16_f16": 419, "fp8_f32": 419, "fp8_f16": 838, "int8": 838},
    }  # fmt: skip
    gpus = bounds.load_gpus()
    known = {manifest.arch.name for manifest in load(ROOT / "kernels")}
    assert [gpu.name for gpu in gpus] == list(totals)
    for gpu in gpus:
        assert known.issuperset(gpu.archs)
        found = {kind: 2 * rate * gpu.sms * gpu.clock_mhz * 1e-6 for kind, rate in gpu.tensor.items()}
        assert found == pytest.approx(totals[gpu.name], rel=0.02)


def test_rows_and_files(kernels: Path, tmp_path: Path) -> None:
    """The tiny kernel has no loop, which is said; one with a loop is found by its symbol."""
    plan = expand.expand(load(kernels)[0])
    with pytest.raises(BuildError, match="no loop with tensor-core instructions"):
        bounds.of_rows([plan], kernels, Cache(tmp_path / "cache"), 2)
    pytest.importorskip("nvidia.cuda_nvrtc")
    (tmp_path / "loop.cu").write_text(LOOP)
    args = (("q", "*i32"), ("out", "*fp32"), ("blocks", "i32"))
    job = Job(
        "sm80", "sm_80", 80, "cuda", "loop.cu:loop", args, (), (), 0, None, 1, None, 32, 0, "loop", "sagert_loop"
    )  # fmt: skip
    (tmp_path / "loop.cubin").write_bytes(compile_cuda.compile_job(job, tmp_path).cubin)
    entry = {"name": "other", "arch": "sm80", "cubin": "loop.cubin", "symbol": "^loop$", "head_dim": 32,
             "causal": False, "dtype": "fp16", "warp_rows": 16}  # fmt: skip
    (tmp_path / "others.json").write_text(json.dumps([entry]))
    (made,) = bounds.of_file(tmp_path / "others.json", frozenset(("row",)))
    assert (made.name, made.keys, made.counts.tensor) == ("other", 16, {"IMMA.16832.S8.S8": 2})
    written = bounds.to_json([made, dataclasses.replace(made, name="row")], [GPU])
    (tmp_path / "others.json").write_text(json.dumps(written))
    assert bounds.of_file(tmp_path / "others.json", frozenset(("row",))) == [made]
    (tmp_path / "others.json").write_text(json.dumps([entry | {"symbol": "none"}]))
    with pytest.raises(BuildError, match="other: 'none' finds 0 functions, expected 1"):
        bounds.of_file(tmp_path / "others.json", frozenset(("row",)))
