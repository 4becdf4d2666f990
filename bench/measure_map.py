"""Measure the map: what each technique gains, by number of photos and by epochs.

    python bench/measure_map.py --data <photos> [--per-class 100 all] [--epochs 5 20 120]
                                [--noise 0] [--only <technique> …] [--seeds 0 1 2 3 4]
                                [--out results]

<photos> is the folder that holds imagenette2-160sq. A `small_resnet` is trained at 32 pixels on so
many training photos of each class, crops from half of the area on, mirrored or not; it is scored
on all validation photos, as they are and in several views. `--noise 20 40` makes that many percent
of the training labels wrong. Results go to <out>/map, a file for each technique, cell and seed.
What is there already isn't done again, and an interrupted run goes on from its last epoch. Two
processes can work side by side with different seeds.

A thousand photos and 120 epochs take about 80 seconds on one core, all 9,469 ten times that.
"""

import torch.nn.functional as F
from sota_course.training.learner import baseline_learner
from sota_course.data import get_dls
from sota_course.label_smoothing import SmoothCrossEntropy
from sota_course.training.metrics import brier, fit_temperature
from sota_course.training.mixing import CutMix, MixUp
from sota_course.training.recipe_runs import CROPS
from sota_course.training.runs import Run, score
from sota_course.training.views import tta_predict
from sota_course.tta import changed_predictions

from study import LR, PHOTOS, Clock, one_seed, photo_options

SIZE = 32
# Loss and callbacks of each technique; new ones for each learner
TECHNIQUES = {
    "plain": lambda: dict(),
    "smoothing": lambda: dict(loss_func=SmoothCrossEntropy(0.1)),
    "mixup": lambda: dict(cbs=[MixUp(0.4)]),
    "mixup-1": lambda: dict(cbs=[MixUp(1.0)]),
    "cutmix": lambda: dict(cbs=[CutMix(1.0)]),
    "mixup-smoothing": lambda: dict(cbs=[MixUp(0.4)], loss_func=SmoothCrossEntropy(0.1)),
}
VIEWS = ("flip", "five", "ten")


def calibrated(logp, targets):
    """NLL and ECE at the best temperature, found on one half of the validation photos and used for
    the other, both ways."""
    scaled = logp.clone()
    halves = slice(0, None, 2), slice(1, None, 2)
    for fit, use in (halves, halves[::-1]):
        scaled[use] = F.log_softmax(logp[use] / fit_temperature(logp[fit], targets[fit]), 1)
    measured = score(scaled, targets)
    return dict(nll=measured["nll"], ece=measured["ece"])


def of_views(learn, logp, targets):
    "What each way to look at the photos gives the trained model."
    measured = {}
    for views in VIEWS:
        probs, _ = tta_predict(learn, views=views, progress=False)
        right, wrong = changed_predictions(logp.exp(), probs, targets)
        scored = score(probs.clamp_min(1e-12).log(), targets)
        changed = dict(became_right=len(right), became_wrong=len(wrong))
        measured[views] = {k: scored[k] for k in ("accuracy", "nll", "ece")} | changed
    return measured


class Measured(Run):
    "A run that also keeps views, Brier score, and what a temperature would do."

    def fit(self, seed):
        result = super().fit(seed)
        with self.learn.no_bar():
            views = of_views(self.learn, self.logp, self.targets)
        result.extra = dict(
            views=views,
            brier=brier(self.logp.exp(), self.targets),
            calibrated=calibrated(self.logp, self.targets),
        )
        return result


def run(data, out, name, per_class, epochs, noise, seed):
    "The run of one technique in one cell of the map, with one seed."

    def make():
        chosen = dict(per_class=per_class, noise=noise / 100, min_scale=0.5, aug=CROPS)
        dls = get_dls(64, SIZE, data, progress=False, **chosen)
        return baseline_learner(dls, "small_resnet", **TECHNIQUES[name]())

    photos = per_class or "all"
    cell = f"{photos}-{epochs}" + (f"-noise{noise}" if noise else "")
    command = f"python bench/measure_map.py --data <photos> --per-class {photos} --epochs {epochs}"
    command += f" --noise {noise} --only {name} --seeds {seed}"
    return one_seed(f"{cell}-{name}", make, epochs, seed, out / "map", command, Measured, lr=LR)


def photos(text):
    "A number of photos of each class, None for all."
    return None if text == "all" else int(text)


def main():
    parser = photo_options(__doc__)
    add, names = parser.add_argument, ", ".join(TECHNIQUES)
    usual = ["plain", "smoothing", "mixup", "cutmix", "mixup-smoothing"]
    add("--per-class", nargs="+", type=photos, default=[100, None], metavar="n", help="or all")
    add("--epochs", nargs="+", type=int, default=[5, 20, 120])
    add("--noise", nargs="+", type=int, default=[0], metavar="percent")
    add("--only", nargs="+", choices=TECHNIQUES, default=usual, metavar="technique", help=names)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    clock, data = Clock(), args.data / PHOTOS
    cells = [(n, e, o) for n in args.per_class for e in args.epochs for o in args.noise]
    for n, epochs, noise in cells:
        for seed in args.seeds:
            for name in args.only:
                clock.train(run(data, args.out, name, n, epochs, noise, seed))


if __name__ == "__main__":
    main()
