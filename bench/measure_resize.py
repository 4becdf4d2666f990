"""Progressive resizing on Imagenette against a fixed size, at equal epochs and at equal time, and
the size to test at.

    python bench/measure_resize.py --data <folder that holds imagenette2-160sq> [--out results]
                                   [--seeds 0 1 2]

Writes results/resize-imagenette-64/<run>-seed<n>.json. Results that are there are kept, and an
interrupted run goes on where it stopped. `--limit N` takes N images a class, to try it out. The
seconds of these runs hold whatever else the machine did; how the times compare is measured by
`bench/test_resize.py`, where epochs at each size take turns.
"""

import tempfile
from functools import partial
from pathlib import Path

from sota_course.data import get_dls
from sota_course.training.compare import compare
from sota_course.training.progressive import Progressive, Stage, scores_by_size

from study import PHOTOS, Clock, learner_of, link, one_seed, photo_options

SIZE, BS, EPOCHS = 64, 64, 6
STAGES = [Stage(32, BS, 2), Stage(48, BS, 2), Stage(64, BS, 2)]
SHORTER = 4  # epochs at the final size that take about as long as the stages
TEST_SIZES = (32, 48, 64, 80, 96, 128)


def part(source: Path, target: Path, train: int, valid: int | None) -> Path:
    "A folder with links to the first `train` and `valid` images of each class; None: to all."
    for split, n in (("train", train), ("val", valid)):
        for cls in sorted(o for o in (source / split).iterdir() if o.is_dir()):
            link(sorted(cls.iterdir())[:n], target / split / cls.name)
    return target


def runs(path, dls, folder, seed, command):
    "The three runs with one seed."
    make = learner_of(path, SIZE, BS)
    stages = Progressive(STAGES, get_dls=dls)
    return [
        one_seed("fixed", make, EPOCHS, seed, folder, command),
        one_seed("progressive", make, EPOCHS, seed, folder, command, fit_func=stages),
        one_seed("fixed-equal-time", make, SHORTER, seed, folder, command),
    ]


def with_sizes(run, seed, by_size):
    "Train `run`, and store with its result what its model is worth at other sizes."
    path = run.file(seed, ".json")
    (result,) = run.train().results
    if "scores_by_size" in result.extra:
        return
    if run.logp is None:  # it was interrupted between the two, and the model is gone
        path.unlink()
        return with_sizes(run, seed, by_size)
    scores = scores_by_size(run.learn, TEST_SIZES, by_size, BS).to_dict("index")
    result.extra["scores_by_size"] = {str(k): v for k, v in scores.items()}
    result.save(path)


def main():
    parser = photo_options(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--limit", type=int, help="images of each class and split, to try it out")
    args = parser.parse_args()
    source = args.data / PHOTOS
    if not source.is_dir():
        parser.error(f"{args.data} has no folder {PHOTOS}")
    command, folder = "python bench/measure_resize.py --data <photos>", "resize-imagenette-64"
    clock, done = Clock(), {}
    with tempfile.TemporaryDirectory() as tmp:
        path = source
        if args.limit:
            command += f" --limit {args.limit}"
            path = part(source, Path(tmp) / f"{PHOTOS}-part", args.limit, args.limit)
        # Other sizes are tested on the validation images only, so that no large cache of the
        # training images is built.
        valid = part(source, Path(tmp) / source.name, 10, args.limit)
        dls, by_size = (partial(get_dls, path=o, progress=False) for o in (path, valid))
        for o in STAGES:
            dls(bs=BS, size=o.size)  # the caches: not part of anyone's time
        for seed in args.seeds:
            for run in runs(path, dls, args.out / folder, seed, command):
                if run.name == "fixed":
                    with_sizes(run, seed, by_size)
                done.setdefault(run.name, []).append(clock.train(run))
    print(compare(*done.values()))


if __name__ == "__main__":
    main()
