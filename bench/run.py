"""Run benchmarks and keep their figures, with where they come from, as results/bench_<name>.json.

    [SOTA_COURSE_PHOTOS=<folder of photo sets>] python bench/run.py [name …]

Without a name it runs every bench/test_<name>.py. Figures of a run that fails are not kept.
"""

import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sota_course.training.settings import environment

here = Path(__file__).resolve().parent
PEERS = "timm", "kornia", "ttach", "torchmetrics"


def peers() -> dict:
    "Versions of those of `PEERS` that are installed."
    found = {}
    for o in PEERS:
        try:
            found[o] = version(o)
        except PackageNotFoundError:
            pass
    return found


def distil(report: dict, command: str) -> dict:
    "What is worth keeping of pytest-benchmark's `report`: no name of the machine, no paths."
    return dict(
        command=command,
        date=str(date.today()),
        environment=environment() | peers(),
        benchmarks={o["name"]: o["extra_info"] for o in report["benchmarks"]},
    )


def run(name: str):
    "Run bench/test_`name`.py and write its figures."
    out = Path(tempfile.mkdtemp()) / "report.json"
    code = subprocess.run(
        [sys.executable, "-m", "pytest", str(here / f"test_{name}.py"), f"--benchmark-json={out}"]
    ).returncode
    if code:
        sys.exit(f"bench/test_{name}.py failed: nothing is written")
    report = json.loads(out.read_text()) if out.exists() and out.stat().st_size else None
    if not report:
        sys.exit(f"bench/test_{name}.py measured nothing")
    photos = "SOTA_COURSE_PHOTOS=<photos> " if os.environ.get("SOTA_COURSE_PHOTOS") else ""
    target = here.parent / "results" / f"bench_{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(
        json.dumps(distil(report, f"{photos}python bench/run.py {name}"), indent=1) + "\n"
    )
    print(f"results/{target.name} written")


if __name__ == "__main__":
    for o in sys.argv[1:] or sorted(f.stem[5:] for f in here.glob("test_*.py")):
        run(o)
