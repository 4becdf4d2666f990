"""Progressive resizing on Imagenette against a fixed size, at equal epochs and at equal time, and
the size to test at.

    python bench/measure_resize.py --data <folder that holds imagenette2-160sq> [--out results]
                                   [--arch small_resnet|xresnet10] [--seeds 0 1 2]

The runs of `small_resnet` go to <out>/resize-small, those of `xresnet10` to
<out>/resize-imagenette-64, a file for each run and seed: a fixed size, as many epochs with growing
sizes, and as long a time. To equal time, xresnet10 has fewer epochs at the fixed size, and
small_resnet more with growing ones; each result of the latter says how many seconds of CPU time it
took, validation included, the runs taking turns. Results that are there are kept, and an
interrupted run goes on where it stopped. `--limit N` takes N images a class, to try it out. The
seconds of these runs hold whatever else the machine did; how the times compare is measured by
`bench/test_resize.py`, where epochs at each size take turns.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

from sota_course.data import get_dls
from sota_course.training.compare import compare
from sota_course.training.progressive import Progressive, Stage, scores_by_size
from sota_course.training.runs import Run

from study import PHOTOS, Clock, learner_of, link, one_seed, photo_options

SIZE, BS, EPOCHS = 64, 64, 6
STAGES = [Stage(32, BS, 2), Stage(48, BS, 2), Stage(64, BS, 2)]
SHORTER = 4  # epochs at the final size that take about as long as the stages
LONGER = [Stage(32, BS, 4), Stage(48, BS, 3), Stage(64, BS, 3)]  # as long as EPOCHS at the final
FOLDERS = dict(xresnet10="resize-imagenette-64", small_resnet="resize-small")
TEST_SIZES = (32, 48, 64, 80, 96, 128)


def part(source: Path, target: Path, train: int, valid: int | None) -> Path:
    "A folder with links to the first `train` and `valid` images of each class; None: to all."
    for split, n in (("train", train), ("val", valid)):
        for cls in sorted(o for o in (source / split).iterdir() if o.is_dir()):
            link(sorted(cls.iterdir())[:n], target / split / cls.name)
    return target


class Timed(Run):
    "A run whose result says what CPU time it took. One that was interrupted says it of the rest."

    def fit(self, seed):
        start = time.process_time()
        result = super().fit(seed)
        result.extra["cpu_seconds"] = time.process_time() - start
        return result


def runs(arch, path, dls, folder, seed, command):
    "The three runs with one seed."
    make = learner_of(path, SIZE, BS, arch=arch)
    kind = Run if arch == "xresnet10" else Timed
    run = partial(one_seed, seed=seed, folder=folder, command=command, kind=kind)
    stages, longer = (Progressive(o, get_dls=dls) for o in (STAGES, LONGER))
    if arch == "xresnet10":
        equal_time = run("fixed-equal-time", make, SHORTER)
    else:
        equal_time = run("progressive-equal-time", make, longer.epochs, fit_func=longer)
    return [
        run("fixed", make, EPOCHS),
        run("progressive", make, EPOCHS, fit_func=stages),
        equal_time,
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
    add("--arch", choices=FOLDERS, default="small_resnet")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--limit", type=int, help="images of each class and split, to try it out")
    args = parser.parse_args()
    source = args.data / PHOTOS
    if not source.is_dir():
        parser.error(f"{args.data} has no folder {PHOTOS}")
    command = f"python bench/measure_resize.py --data <photos> --arch {args.arch}"
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
            for run in runs(args.arch, path, dls, args.out / FOLDERS[args.arch], seed, command):
                if run.name == "fixed":
                    with_sizes(run, seed, by_size)
                done.setdefault(run.name, []).append(clock.train(run))
    print(compare(*done.values()))


if __name__ == "__main__":
    main()
