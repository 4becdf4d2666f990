"""What importing a module costs, beside `import torch`: a chapter's functions need nothing else.

    pytest bench/test_imports.py

Each side is a process of its own, with files that are in memory already. They take turns, and the
ratio is the median of those of the rounds, in seconds of CPU time: what else runs falls on both.
"""

import subprocess
import sys

import numpy as np
import pytest

from links import pyproject
from shared import alternate

CONTRACTS = {o["id"]: o for o in pyproject()["tool"]["importlinter"]["contracts"]}
PURE = [o.removeprefix("sota_course.") for o in CONTRACTS["pure"]["source_modules"]]
REST = "data", "baseline", "training.command", "training.runs", "all"
ROUNDS = 7


def fresh(module):
    "A function that imports `module` in a new process."
    return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


@pytest.mark.parametrize("name", [*PURE, *REST])
def test_import(benchmark, name):
    "A technique costs at most a tenth more than torch; for the others the ratio is only shown."
    sides = {"torch": fresh("torch"), "ours": fresh(f"sota_course.{name}")}
    alternate(sides, 1)  # brings the files into memory
    times = alternate(sides, ROUNDS)
    benchmark.pedantic(sides["ours"], rounds=1)
    seconds = {k: np.median(v, 0) for k, v in times.items()}
    ratio = float(np.median(times["ours"][:, 1] / times["torch"][:, 1]))
    benchmark.extra_info.update(
        module=f"sota_course.{name}",
        rounds=ROUNDS,
        ratio=round(ratio, 2),
        seconds={k: round(float(v[0]), 2) for k, v in seconds.items()},
        cpu_seconds={k: round(float(v[1]), 2) for k, v in seconds.items()},
    )
    if name not in PURE:
        return
    benchmark.extra_info.update(required=1.1)
    assert ratio <= 1.1
