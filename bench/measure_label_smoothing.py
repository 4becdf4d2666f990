"""Wrong labels: the drawn set with a share of them, learned with hard targets, smoothed ones,
mixup, and both.

    python bench/measure_label_smoothing.py [--out results] [--seeds 3] [--epochs 8]

Writes `<out>/noise/<way>-noise<percent>-seed<n>.json`; what is there already is kept, so an
interrupted measurement goes on where it stopped. The validation labels are always right. Smoothing
on Imagenette is measured by `measure_mixup.py`.
"""

from functools import partial

from sota_course.data import get_data
from sota_course.images.drawn import CLASSES
from sota_course.label_smoothing import SmoothCrossEntropy
from sota_course.training.metrics import brier, fit_temperature, on_wrong
from sota_course.training.mixing import MixUp
from sota_course.training.runs import Run

from study import Clock, learner_of, one_seed, options

LEVELS = 0, 10, 20, 40
smooth = partial(SmoothCrossEntropy, 0.1)


def mixed():
    return [MixUp(0.4)]


# What makes the loss and the callbacks of each way to train
WAYS = {
    "baseline": dict(),
    "smoothing": dict(loss_func=smooth),
    "mixup": dict(cbs=mixed),
    "mixup-smoothing": dict(loss_func=smooth, cbs=mixed),
}


class Measured(Run):
    """A run that also keeps the Brier score, the temperature that the model would need, and what it
    says to wrongly labelled images."""

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
    parser = options(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="seeds for each way and level; default: 3")
    add("--epochs", type=int, default=8, help="epochs of each training; default: 8")
    fewer = "training images: fewer for a trial; default: 1000"
    add("--n-train", type=int, default=1000, help=fewer)
    args = parser.parse_args()
    command = "python bench/measure_label_smoothing.py"
    for name in ("seeds", "epochs", "n_train"):
        if getattr(args, name) != parser.get_default(name):
            command += f" --{name.replace('_', '-')} {getattr(args, name)}"
    clock = Clock()
    for seed in range(args.seeds):
        for level in LEVELS:
            path = get_data("drawn", noise=level / 100, n_train=args.n_train, progress=False)
            for way, kwargs in WAYS.items():
                make, name = learner_of(path, 32, 64, **kwargs), f"{way}-noise{level}"
                folder = args.out / "noise"
                clock.train(one_seed(name, make, args.epochs, seed, folder, command, Measured))


if __name__ == "__main__":
    main()
