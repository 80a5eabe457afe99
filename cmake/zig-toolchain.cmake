# SPDX-License-Identifier: Apache-2.0
# zig (PyPI: ziglang) as the C++ compiler: a low glibc floor on any build machine. build_tools/zig_cxx.py runs it.
set(SAGERT_ZIG_TARGET "x86_64-linux-gnu.2.28" CACHE STRING "zig's target triple, with the lowest glibc")
if(NOT SAGERT_PYTHON)
  if(Python_EXECUTABLE)  # set by the wheel's build
    set(SAGERT_PYTHON "${Python_EXECUTABLE}")
  else()
    find_program(SAGERT_PYTHON NAMES python3 python REQUIRED)
  endif()
endif()
# Without this the compiler checks would not see the two.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES SAGERT_ZIG_TARGET SAGERT_PYTHON)

set(CMAKE_CXX_COMPILER "${SAGERT_PYTHON}" "${CMAKE_CURRENT_LIST_DIR}/../build_tools/zig_cxx.py" -target ${SAGERT_ZIG_TARGET})
set(CMAKE_SYSTEM_NAME Linux)
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${SAGERT_ZIG_TARGET}")
