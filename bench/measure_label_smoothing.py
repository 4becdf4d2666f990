"""Wrong labels: the drawn set with a share of them, learned with hard targets, smoothed ones, mixup, and both.

    python bench/measure_label_smoothing.py [--out results] [--seeds 3] [--epochs 8]

Writes `<out>/noise/<way>-noise<percent>-seed<n>.json`; what is there already is kept, so an interrupted measurement goes on
where it stopped. The validation labels are always right. Smoothing on Imagenette is measured by `measure_mixup.py`.
"""

import argparse
import time
from pathlib import Path

from sota_course.baseline import baseline_learner
from sota_course.data import get_data, get_dls
from sota_course.images.drawn import CLASSES
from sota_course.label_smoothing import SmoothCrossEntropy
from sota_course.training.metrics import brier, fit_temperature, on_wrong
from sota_course.training.mixing import MixUp
from sota_course.training.runs import Run

LEVELS = 0, 10, 20, 40
# Loss and callbacks of each way to train; new ones for each learner.
WAYS = {
    "baseline": lambda: dict(),
    "smoothing": lambda: dict(loss_func=SmoothCrossEntropy(0.1)),
    "mixup": lambda: dict(cbs=[MixUp(0.4)]),
    "mixup-smoothing": lambda: dict(loss_func=SmoothCrossEntropy(0.1), cbs=[MixUp(0.4)]),
}


class Measured(Run):
    "A run that also keeps the Brier score, the temperature that the model would need, and what it says to wrongly labelled pictures."

    def fit(self, seed):
        result = super().fit(seed)
        result.extra = dict(
            brier=brier(self.logp.exp(), self.targets),
            temperature=temperature(self.logp, self.targets),
            on_wrong=on_wrong(self.learn, right_class),
        )
        return result


def right_class(path):
    "Image i of the drawn set has class i % 10."
    return list(CLASSES.values())[int(path.stem.rpartition("_")[2]) % 10]


def temperature(logp, targets):
    "The best temperature, or None where there is none."
    try:
        return fit_temperature(logp, targets)
    except ValueError:
        return None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of the results; default: results"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds for each way and level; default: 3"
    )
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each training; default: 8")
    parser.add_argument(
        "--n-train",
        type=int,
        default=1000,
        help="training pictures: fewer for a trial; default: 1000",
    )
    args = parser.parse_args()
    changed = [
        f"--{k.replace('_', '-')} {getattr(args, k)}"
        for k in ("seeds", "epochs", "n_train")
        if getattr(args, k) != parser.get_default(k)
    ]
    command = " ".join(["python bench/measure_label_smoothing.py", *changed])
    start = time.perf_counter()
    # Seeds on the outside: stopped half-way, it has whole comparisons.
    for seed in range(args.seeds):
        for level in LEVELS:
            path = get_data("drawn", noise=level / 100, n_train=args.n_train, progress=False)
            for way, kwargs in WAYS.items():
                make = lambda: baseline_learner(
                    get_dls(64, 32, path, progress=False), "xresnet10", **kwargs()
                )
                run = Measured(
                    f"{way}-noise{level}",
                    make,
                    args.epochs,
                    8e-3,
                    [seed],
                    args.out / "noise",
                    command,
                    progress=False,
                ).train()
                o = run.results[0]
                print(
                    f"{o.name} seed {seed}: accuracy {o.accuracy:.3f}, NLL {o.nll:.3f}, ECE {o.ece:.3f}; {time.perf_counter() - start:.0f} s so far",
                    flush=True,
                )


if __name__ == "__main__":
    main()
