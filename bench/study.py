"What the measurements share: options, learners, links to photos, and runs told one by one."

import argparse
import os
import time
from pathlib import Path

from sota_course.training.learner import baseline_learner
from sota_course.data import get_dls
from sota_course.training.runs import Run

PHOTOS = "imagenette2-160sq"
ARCH, LR = "xresnet10", 8e-3


def options(doc: str) -> argparse.ArgumentParser:
    "A parser that shows the docstring `doc`, with the option that all studies have."
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = "folder of the results; default: results"
    parser.add_argument("--out", type=Path, default=Path("results"), help=where)
    return parser


def photo_options(doc: str, sets: str = PHOTOS) -> argparse.ArgumentParser:
    "A parser for a study on photos."
    parser = options(doc)
    parser.add_argument("--data", type=Path, required=True, help=f"folder that holds {sets}")
    return parser


def learner_of(path, size, bs=64, stats="imagenet", arch=ARCH, **kwargs):
    "What makes a new baseline on the data in `path`; `kwargs` make the loss and callbacks anew."

    def make():
        dls = get_dls(bs, size, path, stats=stats, progress=False)
        return baseline_learner(dls, arch, **{k: f() for k, f in kwargs.items()})

    return make


def link(files, folder: Path):
    "Links in `folder` to `files`."
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        os.symlink(file.resolve(), folder / file.name)


class Clock:
    "Says what a result is worth, and how many seconds have passed since the start."

    def __init__(self):
        self.start = time.perf_counter()

    def train(self, run):
        "Train `run` unless its results are there: the result of its only seed, said aloud."
        (result,) = run.train().results
        self.say(result)
        return result

    def say(self, result, more: str = ""):
        passed = time.perf_counter() - self.start
        scores = f"accuracy {result.accuracy:.4f}, NLL {result.nll:.3f}, ECE {result.ece:.3f}"
        print(f"{passed:6.0f} s  {result.name} seed {result.seed}: {scores}{more}", flush=True)


def one_seed(name, make, epochs, seed, folder, command, kind=Run, lr=LR, **kwargs) -> Run:
    """A run with one seed: studies have their seeds on the outside, so that what is interrupted
    holds whole comparisons, with fewer seeds."""
    return kind(name, make, epochs, lr, [seed], folder, command, progress=False, **kwargs)
