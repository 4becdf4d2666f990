"""Make the tables of results/README.md from the files beside it: all runs, an experiment each.

    python scripts/results.py [--check]

What stands above the heading "All runs" is written by hand and kept. `--check` changes nothing, and
fails where the tables aren't what the files give.
"""

import json
import re
from pathlib import Path

import numpy as np

from links import ROOT, made_file
from sota_course.training.compare import interval
from sota_course.training.runs import load_results

HEADING = "## All runs"
INTRODUCTION = """\
Means over the seeds, with half a 95 % interval behind ±. Seconds are from machines that were more
or less busy, so only those within one experiment may be compared. A run with views is a look at the
models of the run without."""
HEAD = ["Run", "Data", "Pixels", "Model", "Epochs", "Views", "Seeds", "Accuracy", "NLL", "ECE"]
HEAD += ["Training, s", "Prediction, s"]


def plus_minus(values: list[float]) -> str:
    "Their mean, with its interval where there are several."
    text = f"{np.mean(values):.3f}"
    return f"{text} ± {interval(values):.3f}" if len(values) > 1 else text


def row(results: list) -> list[str]:
    "What the table says of a run: its `Result`s, a seed each."
    config = results[0].config
    settings = [str(config.get(o) or "") for o in ("data", "size", "arch", "epochs", "views")]
    scores = [[getattr(o, k) for o in results] for k in ("accuracy", "nll", "ece")]
    seconds = [[getattr(o, k) for o in results] for k in ("train_seconds", "predict_seconds")]
    return [
        results[0].name,
        *settings,
        str(len(results)),
        *(plus_minus(o) for o in scores),
        *(f"{np.mean(o):.1f}" for o in seconds),
    ]


def commands(runs: dict) -> list[str]:
    "What measures the runs of an experiment, without the part that differs between them."
    found = [o.command for results in runs.values() for o in results]
    return sorted({re.sub(r" --(only|seeds?) \S+", "", o) for o in found})


def laid_out(folder: Path, commands: list[str], head: list[str], rows: list[list[str]]) -> str:
    "An experiment: its heading, its commands, its table."
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(o)} |" for o in lines)
    measured = "\n".join(commands)
    return f"### {folder.name}\n\n```bash\n{measured}\n```\n\n{table}\n"


def rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def simple_section(folder: Path, files: list[dict]) -> str:
    "Runs of a program that doesn't use the package: what its files say, as it stands there."
    head = [o for o in files[0] if o != "command"]
    rows = [[str(rounded(o[k])) for k in head] for o in files]
    return laid_out(folder, sorted({o["command"] for o in files}), head, rows)


def section(folder: Path) -> str:
    "An experiment: a table of its runs, or of its files where these aren't runs of the package."
    files = [json.loads(o.read_text(encoding="utf-8")) for o in sorted(folder.glob("*.json"))]
    if "config" not in files[0]:
        return simple_section(folder, files)
    runs = load_results(folder.name, folder.parent)
    return laid_out(folder, commands(runs), HEAD, list(map(row, runs.values())))


def readme(results: Path) -> str:
    "All of README.md in the folder `results`."
    head = (results / "README.md").read_text(encoding="utf-8").partition(HEADING)[0]
    folders = sorted({o.parent for o in results.glob("*/*-seed*.json")})
    return "\n".join([f"{head}{HEADING}\n\n{INTRODUCTION}\n", *map(section, folders)])


def main():
    results = ROOT / "results"
    problem = "results/README.md isn't what the files give: run `python scripts/results.py`"
    made_file(__doc__, results / "README.md", lambda: readme(results), problem)


if __name__ == "__main__":
    main()
