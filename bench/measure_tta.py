"""Measure the chapter on test time augmentation: one view, crops, the dense five-crop and fastai's tta on the same trained models.

    python bench/measure_tta.py --data <photos> [--sets imagenette flowers] [--seeds 0 1 2] [--out results]

<photos> is the folder that holds imagenette2-160sq and flowers5. For each seed an xresnet10 is trained at 64 pixels, and predicts
the validation set in every way. Results go to <out>/tta-imagenette and <out>/tta-flowers, a file for each way and seed. What is
there already isn't done again, and an interrupted training goes on from its last epoch. The flowers have no official split: a
fifth of each class, drawn once with seed 0, is their validation set.
"""

import argparse
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from fastai.torch_core import set_seed

from sota_course.baseline import baseline_learner
from sota_course.data import get_dls
from sota_course.images.decode import image_files
from sota_course.training.runs import Run
from sota_course.training.views import rescore
from sota_course.tta import changed_predictions

SIZE, BS, LR = 64, 64, 8e-3
SETS = dict(
    imagenette=dict(folder="imagenette2-160sq", epochs=5),
    flowers=dict(folder="flowers5", epochs=10),
)

WAYS = {
    "plain": lambda l: l.get_preds(),
    "centre": lambda l: l.five_crop_tta(views="centre"),
    "flip": lambda l: l.five_crop_tta(views="flip"),
    "five": lambda l: l.five_crop_tta(),
    "five, max": lambda l: l.five_crop_tta(reduce="max"),
    "five, beta 0.25": lambda l: l.five_crop_tta(beta=0.25),
    "ten": lambda l: l.five_crop_tta(views="ten"),
    "dense": lambda l: l.five_crop_tta(views="dense"),
    "fastai's tta": lambda l: l.tta(),
}


def linked(src, dst, limit=None):
    "Links to the files of `src` in `dst`, in train and val; without an official split, a fifth of each class is val. The split's name."
    official = (src / "train").is_dir()
    for folder in sorted(o for o in (src.glob("*/*") if official else src.glob("*")) if o.is_dir()):
        files = image_files(folder)
        if not official:
            random.Random(0).shuffle(files)
        files = files[:limit]
        for i, f in enumerate(files):
            split = folder.parent.name if official else "val" if i < len(files) // 5 else "train"
            (dst / split / folder.name).mkdir(parents=True, exist_ok=True)
            os.symlink(f.resolve(), dst / split / folder.name / f.name)
    return "official" if official else "a fifth of each class, seed 0"


def loaders(path, split):
    dls = get_dls(BS, SIZE, path, progress=False)
    dls.args["split"] = split
    return dls


def measure(run, seed, say):
    "Train `run` with `seed` where a way is missing, and write what each way gives."

    def file(name):
        return (
            run.folder
            / f"{name.replace(chr(39), '').replace(', ', '-').replace(' ', '-')}-seed{seed}.json"
        )

    missing = [o for o in WAYS if not file(o).exists()]
    if not missing:
        return
    result, learn = run.fit(seed), run.learn
    plain = run.logp.exp()
    with learn.no_bar():
        for name in missing:
            set_seed(seed)
            kept = []

            def predict():
                kept.append(WAYS[name](learn))
                return kept[0]

            o = rescore(result, name, predict)
            right, wrong = changed_predictions(plain, kept[0][0], run.targets)
            o.extra = dict(became_right=len(right), became_wrong=len(wrong))
            o.save(file(name))
            say(
                f"{name} seed {seed}: accuracy {o.accuracy:.4f}, NLL {o.nll:.3f}, ECE {o.ece:.3f}, {o.predict_seconds:.1f} s, +{len(right)} -{len(wrong)}"
            )
    run.file(seed, ".pt").unlink(missing_ok=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the photos' sets")
    p.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--epochs", type=int, help="for a trial: fewer than the set's own")
    p.add_argument("--limit", type=int, help="for a trial: pictures of each class")
    args = p.parse_args()
    start = time.perf_counter()

    def say(text):
        print(f"{time.perf_counter() - start:6.0f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as tmp:
        os.environ["SOTA_COURSE_HOME"] = tmp  # the cache of links goes with them
        for name in args.sets:
            o, path = SETS[name], Path(tmp) / SETS[name]["folder"]
            split = linked(args.data / o["folder"], path, args.limit)
            dls = loaders(path, split)
            command = f"python bench/measure_tta.py --data <photos> --sets {name} --seeds {' '.join(map(str, args.seeds))}"
            run = Run(
                "model",
                partial(baseline_learner, dls, "xresnet10"),
                args.epochs or o["epochs"],
                LR,
                args.seeds,
                args.out / f"tta-{name}",
                command,
                progress=False,
            )
            for seed in args.seeds:
                measure(run, seed, say)


if __name__ == "__main__":
    main()
