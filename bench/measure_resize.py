"""Progressive resizing on Imagenette against a fixed size, at equal epochs and at equal time, and the size to test at.

    python bench/measure_resize.py --data <folder that holds imagenette2-160sq> [--out results] [--seeds 0 1 2]

Writes results/resize-imagenette-64/<run>-seed<n>.json. Results that are there are kept, and an interrupted run goes on
where it stopped. `--limit N` takes N images a class, to try it out. The seconds of these runs hold whatever else the machine
did; how the times compare is measured by `bench/test_resize.py`, where epochs at each size take turns.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

from sota_course.baseline import baseline_learner
from sota_course.training.compare import compare
from sota_course.data import get_dls
from sota_course.training.progressive import Progressive, Stage, scores_by_size
from sota_course.training.runs import Run

SIZE, BS, EPOCHS, LR = 64, 64, 6, 8e-3
STAGES = [Stage(32, BS, 2), Stage(48, BS, 2), Stage(64, BS, 2)]
SHORTER = 4  # epochs at the final size that take about as long as the stages
TEST_SIZES = (32, 48, 64, 80, 96, 128)


def part(source: Path, target: Path, train: int, valid: int | None) -> Path:
    "A folder with links to the first `train` and `valid` images of each class of `source`; None: to all."
    for split, n in (("train", train), ("val", valid)):
        for cls in sorted(o for o in (source / split).iterdir() if o.is_dir()):
            (target / split / cls.name).mkdir(parents=True)
            for o in sorted(cls.iterdir())[:n]:
                os.symlink(o.resolve(), target / split / cls.name / o.name)
    return target


def learner(dls):
    return baseline_learner(dls(bs=BS, size=SIZE), "xresnet10")


def runs(dls, folder, seed, command):
    "The three runs with one seed."
    make = partial(
        Run,
        make_learner=partial(learner, dls),
        lr=LR,
        seeds=[seed],
        folder=folder,
        command=command,
        progress=False,
    )
    return [
        make("fixed", epochs=EPOCHS),
        make("progressive", epochs=EPOCHS, fit_func=Progressive(STAGES, get_dls=dls)),
        make("fixed-equal-time", epochs=SHORTER),
    ]


def with_sizes(run, seed, by_size):
    "Train `run`, and store with its result what its model is worth at other sizes."
    path = run.file(seed, ".json")
    (result,) = run.train().results
    if "scores_by_size" not in result.extra:
        if run.logp is None:  # it was interrupted between the two, and the model is gone
            path.unlink()
            return with_sizes(run, seed, by_size)
        result.extra["scores_by_size"] = {
            str(k): v
            for k, v in scores_by_size(run.learn, TEST_SIZES, by_size, BS).to_dict("index").items()
        }
        result.save(path)
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds imagenette2-160sq"
    )
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="images of each class and split, to try it out")
    args = parser.parse_args()
    source = args.data / "imagenette2-160sq"
    if not source.is_dir():
        parser.error(f"{args.data} has no folder imagenette2-160sq")
    command = "python bench/measure_resize.py --data <photos>" + (
        f" --limit {args.limit}" if args.limit else ""
    )
    folder = args.out / "resize-imagenette-64"
    with tempfile.TemporaryDirectory() as tmp:
        path = (
            part(source, Path(tmp) / "imagenette2-160sq-part", args.limit, args.limit)
            if args.limit
            else source
        )
        # Other sizes are tested on the validation images only, so that no large cache of the training images is built.
        valid = part(source, Path(tmp) / source.name, 10, args.limit)
        dls, by_size = (
            partial(get_dls, path=path, progress=False),
            partial(get_dls, path=valid, progress=False),
        )
        done = {}
        for o in STAGES:
            dls(bs=BS, size=o.size)  # the caches: not part of anyone's time
        for seed in args.seeds:
            for run in runs(dls, folder, seed, command):
                result = (
                    with_sizes(run, seed, by_size)
                    if run.name == "fixed"
                    else run.train().results[0]
                )
                done.setdefault(run.name, []).append(result)
                print(
                    f"{run.name}, seed {seed}: accuracy {result.accuracy:.3f}, {result.train_seconds:.0f} s of training",
                    flush=True,
                )
    print(compare(*done.values()))


if __name__ == "__main__":
    main()
