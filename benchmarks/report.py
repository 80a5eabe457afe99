# SPDX-License-Identifier: Apache-2.0
"""What a benchmark run was and what it found: environment, table, JSON, plot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("sagert", "flash_attn", "flash_attn_3", "nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
            "sageattention", "comfy-kitchen", "triton")  # fmt: skip
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,clocks_event_reasons.active"


def command(*words: str) -> str | None:
    """A command's output in one line, or None where it is not there or fails."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def clocks() -> dict[str, str] | None:
    """Clocks, power and temperature of the current device now, as nvidia-smi tells them; None without a device."""
    if not torch.cuda.is_available():
        return None
    index = str(torch.cuda.current_device())
    told = command("nvidia-smi", "-i", index, f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    return dict(zip(CLOCKS.split(","), told.split(", "), strict=False)) if told else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Commit, device, driver and versions: what is needed to repeat the run. Without a CUDA device it is the CPU's."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("SAGERT_COMMIT") or command("git", "rev-parse", "HEAD"),  # set where no clone is
        "dirty": bool(command("git", "status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", *sys.argv]),
        "device": properties.name if properties else "CPU",
        "multiprocessors": properties.multi_processor_count if properties else None,
        "driver": command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {p: v for p in PACKAGES if (v := version(p))},
    }


def table(points: list[dict[str, Any]]) -> str:
    """One block per head dim and mask: contenders down, lengths across, TFLOP/s in the cells."""
    blocks: list[str] = []
    problems = dict.fromkeys((p["head_dim"], p["causal"]) for p in points)
    for head_dim, causal in problems:
        mine = [p for p in points if (p["head_dim"], p["causal"]) == (head_dim, causal)]
        shapes = list(dict.fromkeys(p["shape"] for p in mine))
        lines = [f"head_dim {head_dim}, {'causal' if causal else 'full'}: TFLOP/s (relative L1)"]
        lines.append(f"{'':<36}" + "".join(f"{shape:>24}" for shape in shapes))
        for name, timed in dict.fromkeys((p["name"], p["timed"]) for p in mine):
            cells = {p["shape"]: p for p in mine if (p["name"], p["timed"]) == (name, timed)}
            lines.append(f"{name + ', ' + timed:<36}" + "".join(f"{cell(cells.get(s)):>24}" for s in shapes))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def cell(point: dict[str, Any] | None) -> str:
    if point is None or "tflops" not in point:
        return "-"
    return f"{point['tflops']:.0f} ({point['relative_l1']:.4f})"


def default_path(script: str, run: dict[str, Any]) -> Path:
    """Where a script's result goes: benchmarks/results/<script>-<device>.json."""
    return RESULTS / f"{script}-{run['environment']['device'].lower().replace(' ', '-')}.json"


def write_json(path: Path, run: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, run: dict[str, Any]) -> bool:
    """TFLOP/s over sequence length, one panel per head dim and mask. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [p for p in run["points"] if "tflops" in p]
    problems = list(dict.fromkeys((p["head_dim"], p["causal"]) for p in points))
    figure, axes = pyplot.subplots(1, max(1, len(problems)), figsize=(6 * max(1, len(problems)), 5), squeeze=False)
    for axis, (head_dim, causal) in zip(axes[0], problems, strict=False):
        mine = [p for p in points if (p["head_dim"], p["causal"]) == (head_dim, causal)]
        for name, timed in dict.fromkeys((p["name"], p["timed"]) for p in mine):
            line = sorted((p["seqlen_k"], p["tflops"]) for p in mine if (p["name"], p["timed"]) == (name, timed))
            style = "-" if timed == "kernel" else "--"
            axis.plot(*zip(*line, strict=True), style, marker="o", label=f"{name}, {timed}")
        axis.set(title=f"head_dim {head_dim}, {'causal' if causal else 'full'}", xlabel="keys", ylabel="TFLOP/s")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(run["environment"]["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True
