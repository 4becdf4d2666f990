"""Run notebooks as a learner would, each in a fresh kernel, and keep their outputs when asked.

    python scripts/notebooks.py run [--save] [--with slow] [--with cuda] [notebook …]

Without a name it runs every notebook below `nbs`. `--save` writes the outputs back, with clean
metadata. Cells with `#| slow` or `#| cuda` are left out unless asked for, as `nbdev-test` does;
cells with `#| eval: false` always are.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from fastcore.nbio import write_nb, dict2nb
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.test import nb_test_cells

from links import ROOT

FLAGS = ("slow", "cuda")
WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookError(Exception):
    "Which notebook failed, where, and how."


def notebooks(folder: Path = ROOT / "nbs") -> list[Path]:
    "Every notebook of the course, in reading order."
    return sorted(o for o in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in o.parts)


def runnable(path: Path, flags=()) -> set[str]:
    "Ids of the cells that run: not `eval: false`, and only flagged cells whose flag is in `flags`."
    return {o.id for o in nb_test_cells(path, skip_flags=FLAGS, force_flags=list(flags))}


def kernel_class(python: str, folder: str) -> type[AsyncKernelManager]:
    """A kernel of `python`, whatever kernels the user has registered. It talks over sockets in
    `folder`: nobody else can listen in, no port is taken, and ipykernel has nothing to warn of."""
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class Kernel(AsyncKernelManager):
        @property
        def kernel_spec(self):
            return KernelSpec(argv=argv, language="python")

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            if os.name != "nt":
                self.transport, self.ip = "ipc", f"{folder}/kernel"
            self.connection_file = f"{folder}/kernel.json"

    return Kernel


def execute(
    path: Path,
    flags=(),  # run the cells with these flags too
    cwd: Path | None = None,  # where the kernel starts: the notebook's folder if None
    timeout: int = 600,  # seconds for one cell
    python: str = sys.executable,  # whose kernel
    # What the kernel imports from first: the checkout, also where another copy is installed
    paths=(ROOT,),
) -> tuple[nbformat.NotebookNode, float]:  # the notebook with its outputs, and the seconds it took
    """Run `path` in a kernel of its own. A failing cell, a dead kernel or a cell that hangs is a
    `NotebookError`."""
    nb = nbformat.read(path, as_version=4)
    run = runnable(path, flags)
    ran = copy.copy(nb)
    ran.cells = [o for o in nb.cells if o.cell_type == "code" and o.id in run]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if paths:
        env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    at = ["(before the first cell)"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kernel") as folder:
        client = NotebookClient(
            ran,
            timeout=timeout,
            kernel_manager_class=kernel_class(str(python), folder),
            kernel_name="python3",
            resources={"metadata": {"path": str(cwd or path.parent)}},
            on_cell_start=lambda cell, cell_index: at.append(cell.source),
        )
        try:
            client.execute(env=env)
        except CellExecutionError as e:
            problem = str(e)
        except CellTimeoutError:
            problem = f"a cell ran longer than {timeout} s:\n{at[-1]}"
        except (DeadKernelError, RuntimeError) as e:
            why = "out of memory, or a crash in a library"
            problem = f"the kernel died ({why}) in this cell:\n{at[-1]}\n{e}"
        else:
            return nb, time.perf_counter() - start
    raise NotebookError(f"{path.name}: {problem}")


def tidy(nb: nbformat.NotebookNode):
    """`nb` as it is committed: no live widgets (they need a kernel; their static picture stays), no
    superfluous metadata."""
    nb = dict2nb(nbformat.from_dict(nb))
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    nb.metadata.pop("widgets", None)
    clean_nb(nb)
    return nb


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=["run"])
    add("notebooks", nargs="*", type=Path, help="default: all")
    add("--save", action="store_true", help="write the outputs into the notebooks")
    flags = dict(dest="flags", action="append", default=[], choices=FLAGS)
    add("--with", **flags, help="also run cells with this flag")
    args = parser.parse_intermixed_args()
    failed = []
    for path in args.notebooks or notebooks():
        if not path.is_file():
            parser.error(f"there is no notebook {path}")
        try:
            nb, seconds = execute(path.resolve(), args.flags)
        except NotebookError as e:
            failed.append(path)
            print(e, flush=True)
            continue
        if args.save:
            write_nb(tidy(nb), path)
        print(f"{path}: {seconds:.0f} s", flush=True)
    if failed:
        sys.exit("failed: " + ", ".join(map(str, failed)))


if __name__ == "__main__":
    main()
