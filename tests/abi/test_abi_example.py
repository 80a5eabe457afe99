# SPDX-License-Identifier: Apache-2.0
"""examples/c: it builds as strict C99 without a CUDA toolkit, and makes the calls it shows."""

import os
import struct
import subprocess

import pytest

from tests.kit import c_example, fake_build
from tests.kit.stub import calls


@pytest.fixture(scope="module")
def program(fake_library, compiler, tmp_path_factory):
    return c_example.build(fake_library, compiler, tmp_path_factory.mktemp("example"))


def run(program, stub, log, *arguments, **env):
    environment = {**os.environ, "STUB_LOG": str(log), "LD_LIBRARY_PATH": str(stub.folder)}
    environment |= {name: str(value) for name, value in env.items()}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("capability", "kernels"), [(90, 4), (100, 2)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_it_runs_and_sees_that_nothing_computed(program, stub, tmp_path, capability, kernels, dtype, mask):
    log = tmp_path / "log"
    done = run(program, stub, log, "int8_fp8", dtype, mask, STUB_CAPABILITY=capability)
    assert done.stderr == ""
    assert f"row         sm{capability}.fake.int8_fp8" in done.stdout
    assert "relative L1 1.00000" in done.stdout  # the output stays 0
    assert "give the same output" in done.stdout
    assert done.returncode == 1
    names = [line.split()[1] for line in calls(log, "cuLaunchKernelEx")]
    assert len(names) == 2 * kernels
    assert all(f"_{dtype}_d128_" in name for name in names)
    attends = [name for name in names if "_attention_" in name]
    assert [name[-2:] for name in attends] == ["c1" if mask == "causal" else "c0"] * 2


def test_errors_are_shown(program, stub, tmp_path):
    refused = run(program, stub, tmp_path / "log", "int8_int8", STUB_CAPABILITY=90)
    assert refused.returncode == 2
    assert "sagert_select: no kernel row serves precision int8_int8" in refused.stderr
    failed = run(program, stub, tmp_path / "log", "int8_fp8", STUB_LAUNCH=719)
    assert failed.returncode == 2
    assert "(719, stub error) while launching kernel" in failed.stderr
    absent = run(program, stub, tmp_path / "log", LD_LIBRARY_PATH=tmp_path)
    assert absent.returncode == 2
    assert "no NVIDIA driver" in absent.stderr
    assert "there is no such precision: fp4" in run(program, stub, tmp_path / "log", "fp4").stderr


def test_its_sixteen_bit_numbers(fake_library, compiler, tmp_path):
    """Every code decodes as it should, and encodes to itself; ties go to the even neighbour."""
    source = f"""
#define main example_main
#include "{c_example.SOURCE}"
#undef main
int main(void) {{
  const format formats[] = {{kBf16, kFp16}};
  for (int i = 0; i < 2; ++i) {{
    for (int code = 0; code < 65536; ++code) {{
      if ((code & (i ? 0x7c00 : 0x7f80)) == (i ? 0x7c00 : 0x7f80)) continue; /* infinities and NaN */
      const double x = decode((uint16_t)code, formats[i]);
      printf("%d %d %a %d\\n", i, code, x, encode(x, formats[i]));
    }}
    printf("ties %d %d\\n", encode(1.0 + 0.5 * ldexp(1.0, -formats[i].fraction_bits), formats[i]),
           encode(1.0 + 1.5 * ldexp(1.0, -formats[i].fraction_bits), formats[i]));
  }}
  return 0;
}}
"""
    (tmp_path / "probe.c").write_text(source)
    command = [*fake_build.c_compiler(compiler), "-std=c99", f"-I{fake_build.ROOT}/include", str(tmp_path / "probe.c")]
    command += ["-o", str(tmp_path / "probe"), f"-L{fake_library.parent}", "-lsagert", "-lm", "-ldl"]
    subprocess.run([*command, f"-Wl,-rpath,{fake_library.parent}"], check=True)
    ties = []
    for line in subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True).stdout.splitlines():
        words = line.split()
        if words[0] == "ties":
            ties.append([int(word) for word in words[1:]])
            continue
        number, code, again = int(words[0]), int(words[1]), int(words[3])
        value = struct.unpack("<e", struct.pack("<H", code))[0]
        if number == 0:
            value = struct.unpack("<f", struct.pack("<I", code << 16))[0]
        assert float.fromhex(words[2]) == value
        assert again == code or value == 0.0  # -0 is not worth a special case
    assert ties == [[0x3F80, 0x3F82], [0x3C00, 0x3C02]]
