"""Run notebooks as a learner would, each in a fresh kernel, and keep their outputs when asked.

    python scripts/notebooks.py run [--save] [--with slow] [--with cuda] [notebook …]

Without a name it runs every notebook below `nbs`. `--save` writes the outputs back, with clean metadata. Cells with
`#| slow` or `#| cuda` are left out unless asked for, as `nbdev-test` does; cells with `#| eval: false` always are.
"""
import argparse
import copy
import os
import sys
import time
from pathlib import Path

import nbformat
from fastcore.nbio import read_nb, write_nb, dict2nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.test import nb_test_cells

root = Path(__file__).resolve().parent.parent
FLAGS = ("slow", "cuda")
WIDGET = "application/vnd.jupyter.widget-view+json"


def notebooks(folder: Path = root/"nbs") -> list[Path]:
    "Every notebook of the course, in reading order."
    return sorted(o for o in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in o.parts)


def runnable(path: Path, flags=()) -> set[str]:
    "Ids of the cells that run: not `eval: false`, and only flagged cells whose flag is in `flags`."
    return {o.id for o in nb_test_cells(path, skip_flags=FLAGS, force_flags=list(flags))}


def execute(path: Path, flags=(), cwd: Path | None = None, timeout: int = 600) -> tuple[nbformat.NotebookNode, float]:
    "Run `path` in a kernel of its own: the notebook with its outputs, and the seconds that it took."
    nb = nbformat.read(path, as_version=4)
    run = runnable(path, flags)
    ran = copy.copy(nb)
    ran.cells = [o for o in nb.cells if o.cell_type == "code" and o.id in run]
    client = NotebookClient(ran, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(cwd or path.parent)}})
    start = time.perf_counter()
    # The kernel imports the checkout, also where another copy of the package is installed.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), before]))
    try: client.execute()
    finally:
        if before is None: del os.environ["PYTHONPATH"]
        else: os.environ["PYTHONPATH"] = before
    return nb, time.perf_counter() - start


def tidy(nb: nbformat.NotebookNode):
    "`nb` as it is committed: no live widgets (they need a kernel; their static picture stays), no superfluous metadata."
    nb = dict2nb(nbformat.from_dict(nb))
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    nb.metadata.pop("widgets", None)
    clean_nb(nb)
    return nb


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--save", action="store_true", help="write the outputs into the notebooks")
    parser.add_argument("--with", dest="flags", action="append", default=[], choices=FLAGS, help="also run cells with this flag")
    args = parser.parse_intermixed_args()
    failed = []
    for path in args.notebooks or notebooks():
        try: nb, seconds = execute(path.resolve(), args.flags)
        except CellExecutionError as e:
            failed.append(path)
            print(f"{path}: failed\n{e}", flush=True)
            continue
        if args.save: write_nb(tidy(nb), path)
        print(f"{path}: {seconds:.0f} s", flush=True)
    if failed: sys.exit("failed: " + ", ".join(map(str, failed)))


if __name__ == "__main__": main()
