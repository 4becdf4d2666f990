"""Measure the chapter on mixup on Imagenette with an xresnet10 at 32 pixels: five epochs, and twelve.

    python bench/measure_mixup.py --data <photos> [--budget short long] [--only <run> …] [--seeds 0 1 2] [--out results]

<photos> is the folder that holds imagenette2-160sq. Results go to <out>/mixup-short and <out>/mixup-long, a file for each run
and seed. What is there already isn't done again, and an interrupted run goes on from its last epoch. Two processes can work
side by side with different seeds.
"""

import argparse
import time
from pathlib import Path

from sota_course.baseline import baseline_learner
from sota_course.data import get_dls
from sota_course.label_smoothing import SmoothCrossEntropy
from sota_course.training.mixing import CutMix, ManifoldMixup, MixUp
from sota_course.training.mixup_variants import RegMixup, ResizeMix
from sota_course.training.runs import Run

BUDGETS = dict(short=5, long=12)  # epochs
SIZE, LR, BS = 32, 8e-3, 64
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


def measure(budget, name, seed, data, out):
    "Train `name` with `seed` unless its result is there."
    cbs, loss = RUNS[name]

    def learner():
        return baseline_learner(
            get_dls(BS, SIZE, data, progress=False),
            "xresnet10",
            loss_func=loss and loss(),
            cbs=[o() for o in cbs],
        )

    run = Measured(
        name,
        learner,
        epochs=BUDGETS[budget],
        lr=LR,
        seeds=[seed],
        folder=Path(out) / f"mixup-{budget}",
        progress=False,
        command=f"python bench/measure_mixup.py --data <photos> --budget {budget} --only {name} --seeds {seed}",
    ).train()
    return run.results[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the photos' sets")
    p.add_argument("--set", default="imagenette2-160sq", help="folder in it")
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--budget", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    p.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="run", help=", ".join(RUNS)
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = p.parse_args()
    # Seed by seed, so that what is interrupted is a whole comparison with fewer seeds.
    for budget in args.budget:
        for seed in args.seeds:
            for name in args.only:
                start = time.perf_counter()
                r = measure(budget, name, seed, args.data / args.set, args.out)
                print(
                    f"{budget} {name} seed {seed}: accuracy {r.accuracy:.3f}, NLL {r.nll:.3f}, ECE {r.ece:.3f}, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
