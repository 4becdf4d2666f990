"""Measure the chapter on mixup on Imagenette with an xresnet10 at 32 pixels: five epochs, and
twelve.

    python bench/measure_mixup.py --data <photos> [--budget short long] [--only <run> …]
                                  [--seeds 0 1 2] [--out results]

<photos> is the folder that holds imagenette2-160sq. Results go to <out>/mixup-short and
<out>/mixup-long, a file for each run and seed. What is there already isn't done again, and an
interrupted run goes on from its last epoch. Two processes can work side by side with different
seeds.
"""

from sota_course.label_smoothing import SmoothCrossEntropy
from sota_course.training.mixing import CutMix, ManifoldMixup, MixUp
from sota_course.training.mixup_variants import RegMixup, ResizeMix
from sota_course.training.runs import Run

from study import PHOTOS, Clock, learner_of, one_seed, photo_options

BUDGETS = dict(short=5, long=12)  # epochs
SIZE = 32
# Callbacks, loss
RUNS = {
    "baseline": ([], None),
    "mixup": ([MixUp], None),
    "cutmix": ([CutMix], None),
    "smoothing": ([], SmoothCrossEntropy),
    "mixup-smoothing": ([MixUp], SmoothCrossEntropy),
    "manifold": ([ManifoldMixup], None),
    "resizemix": ([ResizeMix], None),
    "regmixup": ([RegMixup], None),
}


class Measured(Run):
    "A run that also keeps the mean confidence on the validation set."

    def fit(self, seed):
        result = super().fit(seed)
        result.extra = dict(confidence=self.logp.exp().max(1).values.mean().item())
        return result


def run(budget, name, seed, data, out):
    "The run `name` with `seed`."
    cbs, loss = RUNS[name]
    new = dict(cbs=lambda: [o() for o in cbs])
    if loss:
        new["loss_func"] = loss
    command = f"python bench/measure_mixup.py --data <photos> --budget {budget}"
    command += f" --only {name} --seeds {seed}"
    make, folder = learner_of(data, SIZE, **new), out / f"mixup-{budget}"
    return one_seed(name, make, BUDGETS[budget], seed, folder, command, Measured)


def main():
    parser = photo_options(__doc__)
    add, names = parser.add_argument, ", ".join(RUNS)
    add("--set", default=PHOTOS, help="folder in it")
    add("--budget", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    add("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="run", help=names)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    clock = Clock()
    for budget in args.budget:
        for seed in args.seeds:
            for name in args.only:
                clock.train(run(budget, name, seed, args.data / args.set, args.out))


if __name__ == "__main__":
    main()
