# SPDX-License-Identifier: Apache-2.0
"""Command line of the build tools."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from build_tools.errors import BuildError

_ROOT = Path(__file__).resolve().parent.parent
_DESCRIPTION = """Builds sagert from its manifests (kernels/*/manifest.toml).

  list         what the manifests expand to
  bundles      compile and gate the kernels, write bundles and the kernel table
  all          bundles, then libsagert through CMake
  ptx          packages whose kernels are PTX, to test rows on devices of a later generation
  bounds       instructions per key block of attention kernels, and what they allow on GPUs of published rates
  check-wheel  is a finished wheel fit to ship

Needs no GPU and no CUDA toolkit: every tool is a pinned package (see [build-system] in pyproject.toml)."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m build_tools", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    choose = argparse.ArgumentParser(add_help=False)
    choose.add_argument("--arch", action="append", default=[], help="only this architecture (repeatable)")
    choose.add_argument("--row", action="append", default=[], help="only this row (repeatable)")
    choose.add_argument("--kernels", type=Path, default=_ROOT / "kernels", help="folder of manifests and sources")
    work = argparse.ArgumentParser(add_help=False)
    work.add_argument("--jobs", type=int, default=None, help="kernels compiled at a time (default: number of CPUs)")
    work.add_argument("--cache", type=Path, default=None, help="default: $SAGERT_BUILD_CACHE or ~/.cache/sagert-build")
    make = argparse.ArgumentParser(add_help=False, parents=[work])
    make.add_argument(
        "--out", type=Path, default=_ROOT / "build" / "sagert", help="gets bundles/ (default: %(default)s)"
    )
    make.add_argument("--table", type=Path, default=None, help="kernel table (default: OUT/../kernel_table.cc)")
    commands.add_parser("list", parents=[choose], help="what the manifests expand to")
    commands.add_parser("bundles", parents=[choose, make], help="compile kernels, write bundles and the kernel table")
    commands.add_parser("all", parents=[choose, make], help="bundles, then libsagert through CMake")
    ptx = commands.add_parser("ptx", parents=[choose, work], help="packages whose kernels are PTX, for tests")
    ptx.add_argument("--on", default="9.0", help="capability of the device they are to run on (default: %(default)s)")
    ptx.add_argument(
        "--out", type=Path, default=_ROOT / "build" / "ptx", help="gets <arch>/sagert (default: %(default)s)"
    )
    bounds = commands.add_parser("bounds", parents=[choose, work], help="counts per key block and bounds per GPU")
    bounds.add_argument(
        "--others", type=Path, help="JSON of kernels built elsewhere, or written before (bounds.of_file)"
    )
    bounds.add_argument("--json", type=Path, help="write the figures there too")
    check = commands.add_parser("check-wheel", help="is a finished wheel fit to ship")
    check.add_argument("wheel", type=Path)
    check.add_argument("--kernels", type=Path, default=_ROOT / "kernels", help="manifests the wheel must cover")
    check.add_argument("--header", type=Path, default=_ROOT / "include" / "sagert.h", help="functions it must export")
    return parser


def _list(args: argparse.Namespace) -> None:
    from build_tools.build import plans

    for plan in plans(args.kernels, args.arch, args.row):
        arch = plan.manifest.arch
        sys.stdout.write(f"{arch.name} ({arch.target}): {len(plan.variants)} variants, {len(plan.kernels)} kernels\n")
        for variant in plan.variants:
            axes = " ".join(f"{axis}={value}" for axis, value in variant.axes.items())
            sys.stdout.write(f"  {variant.row.id} {axes}\n")
            for role, index in variant.kernels.items():
                sys.stdout.write(f"    {role}: {plan.kernels[index].job.label}\n")


def _bundles(args: argparse.Namespace) -> None:
    from build_tools.build import build, emit, plans
    from build_tools.cache import Cache, default_folder

    args.cache = args.cache or default_folder()
    args.table = args.table or args.out.parent / "kernel_table.cc"
    bundles = build(plans(args.kernels, args.arch, args.row), args.kernels, Cache(args.cache), args.jobs)
    emit(bundles, args.out, args.table)
    for bundle in bundles:
        size = sum(len(built.cubin) for built in bundle.kernels)
        name = bundle.plan.manifest.arch.name
        sys.stdout.write(f"{args.out / 'bundles' / name}: {len(bundle.kernels)} cubins, {size / 1e6:.1f} MB\n")


def _all(args: argparse.Namespace) -> None:
    from build_tools.library import build_library

    _bundles(args)
    sys.stdout.write(f"{build_library(_ROOT, args.out, args.table, args.cache)}\n")


def _ptx(args: argparse.Namespace) -> None:
    from build_tools.cache import default_folder
    from build_tools.ptx import make

    if not re.fullmatch(r"\d+\.\d", args.on):
        raise BuildError(f"--on {args.on}: expected a compute capability, such as 9.0")
    device, store = int(args.on.replace(".", "")), args.cache or default_folder()
    for site in make(_ROOT, args.kernels, args.arch, args.row, device, args.out, store, args.jobs):
        sys.stdout.write(f"{site}: test it with PYTHONPATH={site}\n")


def _bounds(args: argparse.Namespace) -> None:
    import json

    from build_tools import bounds
    from build_tools.build import plans
    from build_tools.bundle import write_file
    from build_tools.cache import Cache, default_folder

    gpus = bounds.load_gpus()
    names = {arch for gpu in gpus for arch in gpu.archs}
    chosen = [plan for plan in plans(args.kernels, args.arch, args.row, True) if plan.manifest.arch.name in names]
    rows = frozenset(row.id for plan in plans(args.kernels, [], [], True) for row in plan.rows)
    entries = bounds.of_rows(chosen, args.kernels, Cache(args.cache or default_folder()), args.jobs)
    entries += bounds.of_file(args.others, rows) if args.others else []
    sys.stdout.write(bounds.markdown(entries, gpus))
    if args.json:
        write_file(args.json, (json.dumps(bounds.to_json(entries, gpus), indent=1) + "\n").encode())


def _check_wheel(args: argparse.Namespace) -> None:
    from build_tools.wheel_check import check_wheel

    sys.stdout.write(check_wheel(args.wheel, args.kernels, args.header) + "\n")


def main() -> int:
    """Runs a command; returns the exit status."""
    args = _parser().parse_args()
    commands = {
        "list": _list,
        "bundles": _bundles,
        "all": _all,
        "ptx": _ptx,
        "bounds": _bounds,
        "check-wheel": _check_wheel,
    }
    try:
        commands[args.command](args)
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
