# SPDX-License-Identifier: Apache-2.0
"""Compiles one Triton kernel in a process of its own, because a compiler assertion ends the process.

Reads a job as JSON on standard input, writes kernel.cubin, kernel.ptx and meta.json into the job's `out` folder.
The environment (ptxas, line info, cache) comes from compile_triton.py.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# What Triton passes to ptxas itself, so that code assembled here does not differ.
_PTXAS_FLAGS = ("-lineinfo", "-suppress-debug-info", "-v", "--regAllocOptLevel=2")


def _check(function: Any, job: dict[str, Any]) -> None:
    runtime = [param.name for param in function.params if not param.is_constexpr]
    constexprs = [param.name for param in function.params if param.is_constexpr]
    if runtime != [name for name, _ in job["args"]]:
        raise SystemExit(
            f"the function's run-time parameters are {runtime}, the manifest's args {[n for n, _ in job['args']]}"
        )
    differing = sorted(set(constexprs) ^ {name for name, _ in job["constants"]})
    if differing:
        raise SystemExit(f"the function's constexpr parameters and the manifest's constants differ in {differing}")


def compile_job(job: dict[str, Any]) -> None:
    """Compiles `job` (expand.Job as a dictionary, plus folder, out and ptxas)."""
    sys.path.insert(0, job["folder"])
    import triton
    import triton.runtime.cache as triton_cache
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import sm_arch_from_capability
    from triton.compiler import ASTSource

    file, _, name = job["source"].partition(":")
    module = importlib.import_module(Path(file).stem)
    original = getattr(module, name, None)
    if not isinstance(original, triton.runtime.JITFunction):
        raise SystemExit(f"{file} has no @triton.jit function {name}")
    _check(original, job)
    # Half of the time of a small kernel: Triton hashes itself, hundreds of megabytes, to name a cache entry that nobody
    # will look for (every job has a cache folder of its own).
    triton_cache.triton_key = lambda: triton.__version__
    symbol = job["symbol"]
    function = triton.jit(original.fn, repr=lambda _: symbol)
    constants = dict(job["constants"])
    kinds = dict(job["args"])
    signature = {param: kinds.get(param, "constexpr") for param in function.arg_names}
    attrs = {(function.arg_names.index(param),): [["tt.divisibility", 16]] for param in job["aligned"]}
    options: dict[str, Any] = {"num_warps": job["num_warps"], "num_ctas": job["num_ctas"]}
    if job["num_stages"] is not None:
        options["num_stages"] = job["num_stages"]
    if job["max_registers"] is not None:
        options["maxnreg"] = job["max_registers"]
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", job["capability"], 32),
        options=options,
    )
    out = Path(job["out"])
    ptx = out / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    cubin = out / "kernel.cubin"
    assembled_for = sm_arch_from_capability(job["capability"])
    if assembled_for == job["target"]:
        cubin.write_bytes(compiled.asm["cubin"])
    else:
        # ptxas wants the PTX to name the target; it still refuses instructions the target lacks.
        text = compiled.asm["ptx"].replace(f".target {assembled_for}", f".target {job['target']}")
        ptx.write_text(text)
        command = [job["ptxas"], *_PTXAS_FLAGS, f"--gpu-name={job['target']}", str(ptx), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"ptxas refused Triton's PTX for {job['target']}:\n{done.stderr}")
    meta = compiled.metadata
    facts = {
        "symbol": meta.name,
        "num_warps": meta.num_warps,
        "shared": meta.shared,
        "global_scratch": meta.global_scratch_size,
        "profile_scratch": meta.profile_scratch_size,
        "tensor_descriptors": bool(getattr(meta, "tensordesc_meta", None)),
    }
    (out / "meta.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    compile_job(json.load(sys.stdin))
