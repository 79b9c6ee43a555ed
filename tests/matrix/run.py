"""Run the tests of the seam with diffusers in an environment of every version that falloff supports, and those of the
adapters of vendor kernels beside the libraries themselves.

    make matrix                                                    # all of them, many minutes
    .venv/bin/python tests/matrix/run.py --only "diffusers 0.36.0"

Environments are made in ``.matrix`` and kept; they hold what differs from the one this runs in, and find the rest
there. Rows that were run replace theirs in ``tests/matrix/results.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/matrix/results.json"
TRANSFORMERS_4, TRANSFORMERS_5 = "transformers>=4.57,<5", "transformers>=5.23,<6"
VENDORS = "vendor kernels"
# torchao of today wants a newer PyTorch, and peft of today a newer torchao.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "diffusers 0.35.2": ("diffusers==0.35.2", TRANSFORMERS_4),
    "diffusers 0.36.0": ("diffusers==0.36.0", TRANSFORMERS_4),
    "diffusers 0.39.0": ("diffusers==0.39.0", TRANSFORMERS_5),
    "diffusers 0.41.0": ("diffusers==0.41.0", TRANSFORMERS_5),
    "diffusers 0.42.1": ("diffusers==0.42.1", TRANSFORMERS_5),
    "torch 2.6.0": ("torch==2.6.0", "torchao==0.9.0", "peft==0.18.1", "diffusers==0.42.1", TRANSFORMERS_5),
    "torch 2.11.0": ("torch==2.11.0", "diffusers==0.42.1", TRANSFORMERS_5),
    VENDORS: (
        "--no-deps",  # of which one is a PyTorch with CUDA
        "nvidia-cudnn-frontend==1.32.0",
        "flash-attn-4==4.0.0b36",
        "flashinfer-python==0.7.4",
        *("nvidia-cutlass-dsl==4.8.1", "nvidia-cutlass-dsl-libs-base==4.8.1", "nvidia-cutlass-dsl-libs-core==4.8.1"),
        *("nvidia-cutlass-dsl-libs-cu13==4.8.1", "cuda-bindings==13.5.0", "cuda-pathfinder==1.9.1"),
        *("apache-tvm-ffi==0.1.15.post2", "torch-c-dlpack-ext==0.1.5", "quack-kernels==0.6.5", "cuda-tile==1.7.0"),
        *("nvidia-ml-py==13.615.71", "einops==0.8.2"),
    ),
}
HIDDEN = {"diffusers 0.35.2": "torchao", "diffusers 0.36.0": "torchao"}
"""What an environment must not find in the rest: these versions fail to import beside a torchao of today."""
TESTS = (
    "tests/hosts/test_diffusers.py",
    "tests/hosts/test_families.py",
    "tests/hosts/test_wan.py",
    "tests/hosts/test_where.py",
)
VENDOR_TESTS = ("tests/matrix/vendor_libraries.py",)
LEFT_OUT = "compiled or odd_grids"
"""What takes minutes, and hangs on PyTorch and on our kernels more than on diffusers."""
PACKAGES = ("torch", "diffusers", "transformers", "huggingface_hub", "peft", "numpy")
VENDOR_PACKAGES = ("torch", "nvidia-cudnn-frontend", "flash-attn-4", "flashinfer-python", "nvidia-cutlass-dsl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ENVIRONMENTS, action="append", help="one environment; may be repeated")
    chosen = parser.parse_args().only or list(ENVIRONMENTS)
    rows = {row["environment"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for name in chosen:
        print(f"{name}: installing", flush=True)
        python = install(name)
        print(f"{name}: testing", flush=True)
        packages, tests = (VENDOR_PACKAGES, VENDOR_TESTS) if name == VENDORS else (PACKAGES, TESTS)
        rows[name] = {"environment": name, **versions(python, packages), **test(python, tests)}
        write([rows[name] for name in ENVIRONMENTS if name in rows])
    show([rows[name] for name in chosen])
    sys.exit(any(rows[name]["failed"] for name in chosen))


def install(name: str) -> Path:
    """The Python of an environment, made where there is none yet."""
    folder = ROOT / ".matrix" / name.replace(" ", "-")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder)
        (own,) = folder.glob("**/site-packages")
        (own / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if name in HIDDEN:
            (own / "hidden.pth").write_text(f"import sys; sys.modules[{HIDDEN[name]!r}] = None\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", *ENVIRONMENTS[name]], check=True)
    return python


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    code = (
        "import json, platform, importlib.metadata as m; "
        f"print(json.dumps({{'python': platform.python_version(), **{{p: m.version(p) for p in {packages}}}}}))"
    )
    told: dict[str, str] = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout)
    return told


def test(python: Path, tests: tuple[str, ...]) -> dict[str, int | list[str]]:
    """Numbers of tests, and those that failed. Old libraries may warn: only ours may not, and these are not ours."""
    report = ROOT / ".matrix/junit.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-o", "filterwarnings=", f"--junitxml={report}"]
    command += ["-k", f"not ({LEFT_OUT})"]
    done = subprocess.run([*command, *tests], cwd=ROOT, env={**os.environ, "PYTHONPATH": "src", "HF_HUB_OFFLINE": "1"})
    if not report.exists():
        sys.exit(f"pytest ended with {done.returncode} and left no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def write(rows: list[dict[str, object]]) -> None:
    beside = RESULTS.with_suffix(".part")
    beside.write_text(json.dumps(rows, indent=2) + "\n")
    beside.replace(RESULTS)


def show(rows: list[dict[str, object]]) -> None:
    told = dict.fromkeys(package for row in rows for package in (*PACKAGES, *VENDOR_PACKAGES) if package in row)
    heads = ("environment", "python", *told, "passed", "skipped", "failed")
    table = [heads, *([text(row.get(head, "")) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def text(value: object) -> str:
    return str(len(value) if isinstance(value, list) else value)


if __name__ == "__main__":
    main()
