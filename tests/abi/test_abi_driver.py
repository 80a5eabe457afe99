# SPDX-License-Identifier: Apache-2.0
"""libsagert against a driver that is absent, old, incomplete or failing, and against one that works."""

import re
from pathlib import Path

import pytest

from tests.kit import abi, fake_build
from tests.kit.stub import Stub, calls

ATTENTION = "result = [lib.attention(abi.attention_args()), lib.error()]"
SYMBOLS = sorted(set(re.findall(r'^  X\(\w+, "(\w+)"', (fake_build.ROOT / "host/driver.h").read_text(), re.M)))


def test_the_symbol_list_was_found():
    assert len(SYMBOLS) > 15


def test_no_driver(fake_library, stub, tmp_path):
    result = stub.run(fake_library, ATTENTION, LD_LIBRARY_PATH=tmp_path)
    assert result[0] == abi.NO_DRIVER
    assert "libcuda.so.1" in result[1]
    assert "R525" in result[1]


@pytest.mark.parametrize("symbol", [*SYMBOLS, "cuDriverGetVersion"])
def test_missing_symbol(fake_library, compiler, tmp_path, symbol):
    result = Stub(tmp_path, compiler, missing=symbol).run(fake_library, ATTENTION)
    assert result[0] == abi.NO_DRIVER
    assert f"has no symbol {symbol}" in result[1]


def test_loading_the_library_touches_no_driver(fake_library, stub, tmp_path):
    code = """
maps = open("/proc/self/maps").read()
result = [lib.select(abi.request(), abi.device())[0], len(lib.rows()), "libcuda" in maps]
"""
    assert stub.run(fake_library, code, log=tmp_path / "log") == [abi.OK, len(fake_build.ROWS), False]
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("version", [10020, 11080])
def test_old_driver(fake_library, stub, version):
    code = """
version = ctypes.c_int32()
status = lib.c.sagert_driver_version(ctypes.byref(version))
result = [status, version.value, lib.attention(abi.attention_args()), lib.error()]
"""
    result = stub.run(fake_library, code, STUB_DRIVER=version)
    assert result[:3] == [abi.OK, version, abi.NO_DRIVER]
    assert "update the driver to R525 or later" in result[3]


@pytest.mark.parametrize(
    ("error", "text"), [(100, "finds no device"), (803, "does not start"), (999, "does not start")]
)
def test_init_error(fake_library, stub, error, text):
    result = stub.run(fake_library, ATTENTION, STUB_INIT=error)
    assert result[0] == abi.NO_DRIVER
    assert text in result[1]


def test_no_device(fake_library, stub):
    result = stub.run(fake_library, ATTENTION, STUB_CAPABILITY="")
    assert result[0] == abi.NO_DRIVER
    assert "CUDA_VISIBLE_DEVICES" in result[1]


@pytest.mark.parametrize("where", ["LOAD", "GET_KERNEL", "FUNCTION", "ATTRIBUTE", "LAUNCH", "RETAIN"])
@pytest.mark.parametrize(("error", "status"), [(2, abi.OUT_OF_MEMORY), (209, abi.CUDA), (719, abi.CUDA)])
def test_driver_errors_are_reported_and_the_context_restored(fake_library, stub, tmp_path, where, error, status):
    code = """
cuda = ctypes.CDLL("libcuda.so.1")
cuda.cuInit(0)
cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(0x9999))
status = lib.attention(abi.attention_args())
text = lib.error()
context, mode = ctypes.c_void_p(), ctypes.c_int(0)
cuda.cuCtxGetCurrent(ctypes.byref(context))
cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
again = lib.attention(abi.attention_args())
result = [status, text, context.value, mode.value, again]
"""
    result = stub.run(fake_library, code, log=tmp_path / "log", **{f"STUB_{where}": error})
    assert result[0] == result[4] == status
    assert f"({error}, " in result[1]
    assert "while" in result[1]
    assert result[2] == 0x9999
    assert result[3] == 0
    if where != "LAUNCH":
        assert not calls(tmp_path / "log", "cuLaunchKernelEx")


def test_a_failed_load_is_tried_again(fake_library, stub, tmp_path):
    code = "result = [lib.attention(abi.attention_args()) for _ in range(3)]"
    result = stub.run(fake_library, code, log=tmp_path / "log", STUB_LOAD=2, STUB_FAIL_ONCE=1)
    assert result == [abi.OUT_OF_MEMORY, abi.OK, abi.OK]
    assert len(calls(tmp_path / "log", "cuLibraryLoadData")) == 5


def test_context_and_capture_mode_are_as_before(fake_library, stub, tmp_path):
    code = """
cuda = ctypes.CDLL("libcuda.so.1")
cuda.cuInit(0)
mode = ctypes.c_int(1)
cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # as a thread that is capturing
result = []
for context in (None, 0x1000, 0x9999):
    cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(context))
    status = lib.attention(abi.attention_args())
    now, mode = ctypes.c_void_p(), ctypes.c_int(1)
    cuda.cuCtxPopCurrent_v2(ctypes.byref(now))
    cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    result.append([status, now.value, mode.value])
"""
    result = stub.run(fake_library, code, log=tmp_path / "log")
    assert result == [[abi.OK, context, 1] for context in (None, 0x1000, 0x9999)]
    assert len(calls(tmp_path / "log", "cuLaunchKernelEx")) == 12


def test_eight_threads_load_each_kernel_once(any_library, fake_library, stub, tmp_path):
    code = """
import threading
barrier = threading.Barrier(8)
def work():
    barrier.wait()
    args = abi.attention_args(precision=abi.INT8_FP16)
    statuses.extend(lib.attention(args) for _ in range(20))
statuses = []
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
result = statuses
"""
    kernels = 4 if any_library == fake_library else 3  # of the row that serves it
    assert stub.run(any_library, code, log=tmp_path / "log", STUB_CAPABILITY="89") == [abi.OK] * 160
    assert len(calls(tmp_path / "log", "cuLibraryLoadData")) == kernels
    assert len(calls(tmp_path / "log", "cuKernelGetFunction")) == kernels
    assert len(calls(tmp_path / "log", "cuDevicePrimaryCtxRetain")) == 1
    assert len(calls(tmp_path / "log", "cuLaunchKernelEx")) == 160 * kernels


def test_two_devices(fake_library, stub, tmp_path):
    code = """
result = []
for ordinal in (0, 1, 2, 0, 1):
    dev = abi.Device()
    lib.c.sagert_device_get(min(ordinal, 1), ctypes.byref(dev))
    result.append([lib.attention(abi.attention_args(device=ordinal)), dev.capability, dev.name.decode()])
result.append(lib.attention(abi.attention_args(device=3)))
result.append(lib.error())
result.append(lib.attention(abi.attention_args(device=-1)))
"""
    log = tmp_path / "log"
    result = stub.run(fake_library, code, log=log, STUB_CAPABILITY="90,90,89")
    assert [r[0] for r in result[:5]] == [abi.OK] * 5
    assert result[0][1:] == [90, "Stub GPU 0"]
    assert result[1][1:] == [90, "Stub GPU 1"]
    assert result[5] == result[7] == abi.INVALID_ARGUMENT
    assert "devices are 0 to 2" in result[6]
    assert len(calls(log, "cuLibraryLoadData")) == 8  # devices 0 and 1 share code
    assert len(calls(log, "cuKernelGetFunction")) == 12
    assert [line.split()[-1] for line in calls(log, "cuKernelSetAttribute")] == ["0", "1"]  # the sm89 row needs none
    for line in calls(log, "cuLaunchKernelEx"):
        assert ("sm89" in line) == ("context 0x1002" in line)


def test_mixed_devices_report_themselves(fake_library, stub):
    code = """
devices = [abi.Device() for _ in range(2)]
statuses = [lib.c.sagert_device_get(i, ctypes.byref(d)) for i, d in enumerate(devices)]
count = ctypes.c_int32()
lib.c.sagert_device_count(ctypes.byref(count))
facts = [[d.ordinal, d.capability, d.driver_version, d.memory, d.shared_memory] for d in devices]
result = [statuses, count.value, facts]
"""
    result = stub.run(fake_library, code, STUB_CAPABILITY="75,121", STUB_DRIVER=13000)
    assert result == [[0, 0], 2, [[0, 75, 13000, 80 << 30, 232448], [1, 121, 13000, (80 << 30) + 1, 232448]]]


def test_close_unloads_and_the_next_call_loads_again(fake_library, stub, tmp_path):
    code = """
c = lib.c
result = [c.sagert_close(), c.sagert_open(), c.sagert_open(), lib.attention(abi.attention_args()), c.sagert_close()]
result += [lib.attention(abi.attention_args()), c.sagert_close(), lib.attention(abi.attention_args())]
"""
    log = tmp_path / "log"
    assert stub.run(fake_library, code, log=log) == [abi.INVALID_ARGUMENT] + [abi.OK] * 7
    order = [line.split()[0] for line in log.read_text().splitlines()]
    assert order.count("cuLibraryLoadData") == 8
    assert order.count("cuLibraryUnload") == 4
    assert order.count("cuDevicePrimaryCtxRetain") == 2
    assert order.count("cuDevicePrimaryCtxRelease") == 1


def test_fork_is_named(fake_library, stub):
    code = """
first = lib.attention(abi.attention_args())
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    status = lib.attention(abi.attention_args())
    os.write(writer, json.dumps([status, lib.error()]).encode())
    os._exit(0)
os.waitpid(child, 0)
result = [first, *json.loads(os.read(reader, 65536))]
"""
    result = stub.run(fake_library, code)
    assert result[:2] == [abi.OK, abi.CUDA]
    assert "CUDA cannot be used after fork; use spawn" in result[2]


def test_unsupported_launches_nothing(fake_library, stub, tmp_path):
    result = stub.run(fake_library, ATTENTION, log=tmp_path / "log", STUB_CAPABILITY="75")
    assert result[0] == abi.UNSUPPORTED
    assert "nearest row" in result[1]
    assert "compute capability 7.5" in result[1]
    assert not calls(tmp_path / "log", "cuLaunchKernelEx")


def test_hot_path_is_cheap(fake_library, stub):
    """Far above what it takes, to pass on a busy machine; prints nothing, needs no GPU."""
    code = """
import time
args = abi.attention_args()
ref = ctypes.byref(args)
call = lib.c.sagert_attention
times = []
for _ in range(30):
    start = time.perf_counter()
    for _ in range(200):
        call(ref)
    times.append((time.perf_counter() - start) / 200)
result = min(times) * 1e6
"""
    assert stub.run(fake_library, code) < 8.0


def test_every_variant_runs(any_library, stub, tmp_path):
    """Kernel signatures equal the order of the parameters the family packs, for every kernel of every row."""
    code = """
import itertools
result = []
devices = ctypes.c_int32()
lib.c.sagert_device_count(ctypes.byref(devices))
options = itertools.product(range(devices.value), range(6), (FP16, BF16), (64, 128), (0, CAUSAL))
for dev, precision, dtype, d, causal in options:
    args = abi.attention_args(device=dev, precision=precision, dtype=dtype, head_dim=d, flags=causal)
    status = lib.attention(args)
    if status not in (OK, UNSUPPORTED):
        result.append(lib.error())
"""
    capabilities = "75,80,86,87,89,90,100,103,110,120,121"
    log = tmp_path / "log"
    assert stub.run(any_library, code, log=log, STUB_CAPABILITY=capabilities, STUB_DRIVER=13000) == []
    if (any_library.parent.parent / "types.txt").exists():  # the invented rows
        launched = {line.split()[1] for line in calls(log, "cuLaunchKernelEx")}
        loaded = {Path(name).stem for name in launched}
        assert len(loaded) >= 8 * 4 * 6


def test_damage_is_found_before_the_driver_sees_it(fake_library, stub, tmp_path):
    """See test_abi_damage for every kind of damage to every file; this is the order of events."""
    copy = tmp_path / "copy"
    import shutil

    shutil.copytree(fake_library.parent.parent, copy)
    for path in copy.rglob("sm90_int8_fp8_attention_bf16_d128_c0.cubin"):
        path.write_bytes(path.read_bytes()[:-1])
    result = stub.run(copy / "lib/libsagert.so", ATTENTION, log=tmp_path / "log")
    assert result[0] == abi.INTEGRITY
    assert "sm90_int8_fp8_attention_bf16_d128_c0.cubin" in result[1]
    assert len(calls(tmp_path / "log", "cuLibraryLoadData")) == 3
    assert not calls(tmp_path / "log", "cuLaunchKernelEx")
