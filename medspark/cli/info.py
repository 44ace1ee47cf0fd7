"""`medspark info [--json]`: what is installed, what was built, what this machine offers."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medspark import __version__

# Import name -> how people call it. Looked up in the metadata: importing them all takes seconds.
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "monai": "monai",
    "SimpleITK": "SimpleITK",
    "hydra": "hydra-core",
    "lightning": "lightning",
    "blosc2": "blosc2",
    "numba": "numba",
    "cupy": "cupy",
    "MinkowskiEngine": "MinkowskiEngine",
    "spconv": "spconv",
}


def package_versions() -> dict[str, str | None]:
    """Installed version per package, None where it is not installed."""
    installed = importlib.metadata.packages_distributions()
    versions: dict[str, str | None] = {"medspark": __version__, "python": platform.python_version()}
    for module, name in PACKAGES.items():
        names = installed.get(module)
        versions[name] = importlib.metadata.version(names[0]) if names else None
    return versions


def processor() -> dict[str, Any]:
    """Model, instruction sets and usable threads of the CPU."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
    affinity = getattr(os, "sched_getaffinity", None)
    wanted = ("sse4_2", "avx", "avx2", "fma", "asimd", "neon", "sve", "bf16", "amx_bf16")
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "features": [flag for flag in flags if flag in wanted or flag.startswith("avx512")],
        "threads": len(affinity(0)) if affinity else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def native_extension() -> dict[str, Any]:
    """Whether `medspark._C` is there, why not, and what it says of its own build."""
    from medspark.sparse._ext import extension_status, load_extension

    try:
        module = load_extension()
    except ImportError as error:
        return {"available": False, "broken": True, "status": f"cannot be loaded: {error}"}
    report: dict[str, Any] = {"available": module is not None, "broken": False}
    report["status"] = extension_status()
    if module is not None:
        report |= {"file": module.__file__, "build": module.build_info()}
        report["cpu_features"] = module.cpu_features()
    return report


def devices() -> dict[str, Any]:
    """CUDA as torch sees it: its toolkit version and one entry per GPU."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"torch_cuda": torch.version.cuda, "devices": found}


def sparse_ops(native: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """The ops that `medspark.sparse` registers with torch, and what runs them on each device.

    Args:
        native: the report of `native_extension`.
    """
    if native["broken"]:
        return []
    import torch

    import medspark.sparse  # noqa: F401  (importing it registers them)

    cpu = "native" if native["available"] else "reference"
    cuda = "native" if native["available"] and native["build"]["with_cuda"] else None
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("medspark:")]
    return [{"op": name, "cpu": cpu, "cuda": cuda} for name in sorted(names)]


def collect() -> dict[str, Any]:
    """The whole report, ready for JSON."""
    native = native_extension()
    return {
        "versions": package_versions(),
        "platform": platform.platform(),
        "cpu": processor(),
        "native": native,
        "cuda": devices(),
        "sparse_ops": sparse_ops(native),
    }


def _native_rows(native: Mapping[str, Any]) -> dict[str, str]:
    if not native["available"]:
        return {"native extension": f"no: {native['status']}"}
    build = native["build"]
    cuda = f"toolkit {build['cuda_version']}, archs {', '.join(build['cuda_archs'])}"
    return {
        "native extension": f"yes: {native['status']}",
        "file": native["file"],
        "commit": build["commit"],
        "compiler": f"{build['compiler']} {build['cxx_flags']}",
        "OpenMP": "yes" if build["openmp"] else "no: kernels run on one thread",
        "CUDA build": cuda if build["with_cuda"] else "no",
    }


def _rows(report: Mapping[str, Any]) -> dict[str, str]:
    cpu, cuda = report["cpu"], report["cuda"]
    rows = {name: version or "not installed" for name, version in report["versions"].items()}
    rows |= {"platform": report["platform"], "CPU": cpu["model"]}
    rows |= {"CPU features": " ".join(cpu["features"]), "threads": str(cpu["threads"])}
    rows |= _native_rows(report["native"])
    rows["torch CUDA"] = cuda["torch_cuda"] or "CPU build of torch"
    if not cuda["devices"]:
        rows["GPU"] = "none that torch can use"
    for index, gpu in enumerate(cuda["devices"]):
        rows[f"GPU {index}"] = f"{gpu['name']}, sm {gpu['capability']}, {gpu['memory_gib']} GiB"
    return rows


def _print_tables(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="medspark", show_header=False)
    for name, value in _rows(report).items():
        table.add_row(name, escape(value))
    ops = Table("op", "CPU", "CUDA", title="sparse ops")
    for op in report["sparse_ops"]:
        ops.add_row(op["op"], op["cpu"], op["cuda"] or "-")
    console = Console()
    console.print(table)
    if report["sparse_ops"]:
        console.print(ops)


def main(argv: list[str]) -> int:
    """Print the report.

    Args:
        argv: arguments after `medspark info`; `--json` prints one JSON object instead of tables.

    Returns:
        0, or 1 where the extension was built but cannot be loaded.
    """
    parser = argparse.ArgumentParser(prog="medspark info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    arguments = parser.parse_args(argv)
    report = collect()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_tables(report)
    return 1 if report["native"]["broken"] else 0
