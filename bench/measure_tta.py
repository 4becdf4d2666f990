r"""Measure the chapter on test time augmentation: one view, crops, the whole image in one pass, the
dense five-crop and fastai's tta on the same trained models.

    python bench/measure_tta.py --data <photos> [--sets imagenette flowers] [--seeds 0 1 2]
                                [--arch xresnet10] [--name tta-imagenette] [--out results]
    python bench/measure_tta.py --data <photos> --sets imagenette --arch small_resnet \
                                --name tta-small

<photos> is the folder that holds imagenette2-160sq and flowers5. For each seed a net is trained at
64 pixels, and predicts the validation set in every way. Results go to <out>/tta-imagenette and
<out>/tta-flowers, a file for each way and seed; --name sends those of one set to another folder,
as those of another net. What is there already isn't done again, and an interrupted training goes
on from its last epoch. The flowers have no official split: a fifth of each class, drawn once with
seed 0, is their validation set.

`extra` of each file counts the images that the plain prediction had wrong and this way has right,
and the other way round: what McNemar's test asks for.
"""

import os
import random
import tempfile
from functools import partial
from pathlib import Path

from fastai.torch_core import set_seed

from sota_course.training.learner import baseline_learner
from sota_course.data import get_dls
from sota_course.images.decode import image_files
from sota_course.training.views import rescore
from sota_course.tta import changed_predictions

from study import ARCH, Clock, link, one_seed, photo_options

SIZE = 64
SETS = dict(
    imagenette=dict(folder="imagenette2-160sq", epochs=5),
    flowers=dict(folder="flowers5", epochs=10),
)
# A learner's method for each way to predict, and its arguments
WAYS = {
    "plain": ("get_preds", {}),
    "centre": ("five_crop_tta", dict(views="centre")),
    "flip": ("five_crop_tta", dict(views="flip")),
    "five": ("five_crop_tta", {}),
    "five, max": ("five_crop_tta", dict(reduce="max")),
    "five, beta 0.25": ("five_crop_tta", dict(beta=0.25)),
    "ten": ("five_crop_tta", dict(views="ten")),
    "whole": ("five_crop_tta", dict(views="whole")),
    "dense": ("five_crop_tta", dict(views="dense")),
    "fastai's tta": ("tta", {}),
}


def linked(source, target, limit=None):
    """Links to the files of `source` in `target`, in train and val; without an official split, a
    fifth of each class is val. The split's name."""
    official = (source / "train").is_dir()
    folders = source.glob("*/*") if official else source.glob("*")
    for folder in sorted(o for o in folders if o.is_dir()):
        files = image_files(folder)
        if official:
            link(files[:limit], target / folder.parent.name / folder.name)
            continue
        random.Random(0).shuffle(files)
        files = files[:limit]
        valid = len(files) // 5
        link(files[:valid], target / "val" / folder.name)
        link(files[valid:], target / "train" / folder.name)
    return "official" if official else "a fifth of each class, seed 0"


def file(run, way, seed):
    name = way.replace("'", "").replace(", ", "-").replace(" ", "-")
    return run.folder / f"{name}-seed{seed}.json"


def measure(run, seed, clock):
    "Train `run` with `seed` where a way is missing, and write what each way gives."
    missing = [o for o in WAYS if not file(run, o, seed).exists()]
    if not missing:
        return
    result, learn = run.fit(seed), run.learn
    plain = run.logp.exp()
    with learn.no_bar():
        for name in missing:
            set_seed(seed)
            method, kwargs = WAYS[name]
            kept = []

            def predict():
                kept.append(getattr(learn, method)(**kwargs))
                return kept[0]

            scored = rescore(result, name, predict)
            right, wrong = changed_predictions(plain, kept[0][0], run.targets)
            scored.extra = dict(became_right=len(right), became_wrong=len(wrong))
            scored.save(file(run, name, seed))
            clock.say(scored, f", {scored.predict_seconds:.1f} s, +{len(right)} -{len(wrong)}")
    run.file(seed, ".pt").unlink(missing_ok=True)


def main():
    parser = photo_options(__doc__, "the sets")
    add = parser.add_argument
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--arch", default=ARCH, help=f"a net's name; default: {ARCH}")
    add("--name", help="folder of the results of a single set; default: tta-<set>")
    add("--epochs", type=int, help="for a trial: fewer than the set's own")
    add("--limit", type=int, help="for a trial: images of each class")
    args = parser.parse_args()
    if args.name and len(args.sets) > 1:
        parser.error("--name is the folder of one set's results: choose the set with --sets")
    if args.arch != ARCH and not args.name:
        parser.error(f"another net than {ARCH} needs a folder of its own: pass --name")
    clock, seeds = Clock(), " ".join(map(str, args.seeds))
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["SOTA_COURSE_HOME"] = tmp  # the cache of links goes with them
        for name in args.sets:
            folder, epochs = SETS[name]["folder"], args.epochs or SETS[name]["epochs"]
            path = Path(tmp) / folder
            split = linked(args.data / folder, path, args.limit)
            dls = get_dls(64, SIZE, path, progress=False)
            dls.args["split"] = split
            make = partial(baseline_learner, dls, args.arch)
            command = f"python bench/measure_tta.py --data <photos> --sets {name} --seeds {seeds}"
            if args.name:
                command += f" --arch {args.arch} --name {args.name}"
            folder = args.out / (args.name or f"tta-{name}")
            for seed in args.seeds:
                run = one_seed("model", make, epochs, seed, folder, command)
                measure(run, seed, clock)


if __name__ == "__main__":
    main()
