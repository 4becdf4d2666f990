"""Mixing a batch, a weight for each image, beside the least that anybody does and the peers.

    pytest bench/test_mixup.py

The least is to turn the batch around and blend it with one weight: `torch.lerp(x, x.flip(0),
weight)`. All sides take turns in one run, on the same batch in memory, and the ratio is that of
their medians.
"""

import os
from functools import partial

import pytest
import torch
from fastai.callback.mixup import CutMix as FastaiCutMix, MixUp as FastaiMixUp
from kornia.augmentation import RandomCutMixV2, RandomMixUpV2
from timm.data.mixup import Mixup as TimmMixup
from torchvision.transforms import v2

from shared import medians
from sota_course.mixup import blend, cutmix, mixup, one_hot, rand_boxes, sample_lam
from sota_course.training.mixing import CutMix

N, CLASSES = 64, 10
torch.set_num_threads(min(2, os.cpu_count()))


class Batch:
    "As much of a learner as fastai's callbacks look at."

    training = True

    def __init__(self, x, y):
        self.x, self.y, self.xb, self.yb = x, y, (x,), (y,)


def fastai(cb, x, y):
    """What `cb` does to a batch; its loss comes later. CutMix writes into the batch, which is a
    copy made before."""
    cb.learn, cb.stack_y = Batch(x.clone(), y), True
    return cb.before_batch


def in_place(f, x, y):
    """timm writes into the batch that it gets: one made before, so that no side sees another's
    images, and copying isn't timed."""
    return partial(f, x.clone(), y)


def ours(x, y):
    "Everything: weights, partners, images and targets."
    return mixup(x, y, sample_lam(len(x), 0.4), torch.randperm(len(x)), CLASSES)


def report(benchmark, times, least, required, **info):
    ratios = {k: round(float(v / times[least]), 2) for k, v in times.items()}
    benchmark.extra_info.update(
        batch=N,
        milliseconds={k: round(float(1000 * v), 3) for k, v in times.items()},
        ratios=ratios,
        required=required,
        **info,
    )
    return ratios


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_mixup(benchmark, size, layout):
    """At most 1.5 times the least, and faster than the peers; they also draw their weights, so ours
    does too where it is compared with them."""
    x, y = torch.rand(N, 3, size, size), torch.randint(CLASSES, (N,))
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    lam, perm = torch.rand(N), torch.randperm(N)
    timm = TimmMixup(0.4, mode="elem", label_smoothing=0.0, num_classes=CLASSES)
    peers = dict(
        timm=in_place(timm, x, y),
        torchvision=partial(v2.MixUp(alpha=0.4, num_classes=CLASSES), x, y),
        kornia=partial(RandomMixUpV2(data_keys=["input", "class"]), x, y),
        fastai=fastai(FastaiMixUp(0.4), x, y),
    )
    sides = {
        "flip and lerp, one weight": lambda: torch.lerp(x, x.flip(0), 0.3),
        "blend": lambda: blend(x, lam, perm),
        "mixup with weights and targets": lambda: ours(x, y),
        **peers,
    }
    w = lam[:, None, None, None]
    assert torch.allclose(blend(x, lam, perm), w * x + (1 - w) * x[perm], atol=1e-6)
    medians(sides, 2)
    times = medians(sides, 15 if size > 100 else 60)
    benchmark.pedantic(sides["blend"], rounds=5)
    threads, least = torch.get_num_threads(), "flip and lerp, one weight"
    ratios = report(benchmark, times, least, 1.5, size=size, layout=layout, threads=threads)
    assert ratios["blend"] <= 1.5
    slower = {k: ratios[k] for k in peers}
    assert ratios["mixup with weights and targets"] < min(slower.values()), slower


def where(x, y, lam, perm, boxes):
    "CutMix by hand, image by image."
    x, t = x.clone(), one_hot(y, CLASSES)
    new, targets = x.clone(), t.clone()
    for i, (top, bottom, left, right) in enumerate(boxes.tolist()):
        new[i, :, top:bottom, left:right] = x[perm[i], :, top:bottom, left:right]
        stays = 1 - (bottom - top) * (right - left) / x[0, 0].numel()
        targets[i] = stays * t[i] + (1 - stays) * t[perm[i]]
    return new, targets


@pytest.mark.filterwarnings("ignore:RandomCutMixV2")
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [64, 224])
def test_cutmix(benchmark, size, layout):
    """A rectangle for each image, faster than kornia, which makes a new batch as well, and within
    1.5 times of timm, which loops over the images and writes into the batch that it gets.
    torchvision and fastai cut the same rectangle from all, which is less work; they are here for
    comparison. All draw their weights and rectangles."""
    x, y, cb = torch.rand(N, 3, size, size), torch.randint(CLASSES, (N,)), CutMix(1.0)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    lam, perm = torch.rand(N), torch.randperm(N)
    boxes = rand_boxes(lam, size, size)
    for got, want in zip(cutmix(x, y, lam, perm, CLASSES, boxes), where(x, y, lam, perm, boxes)):
        assert torch.allclose(got, want, atol=1e-6)
    timm = TimmMixup(0.0, 1.0, mode="elem", label_smoothing=0.0, num_classes=CLASSES)
    kornia = RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)
    each = {"timm, one each": in_place(timm, x, y), "kornia, one each": partial(kornia, x, y)}
    same = {
        "torchvision, one for all": partial(v2.CutMix(alpha=1.0, num_classes=CLASSES), x, y),
        "fastai, one for all": fastai(FastaiCutMix(1.0), x, y),
    }
    one = CutMix(1.0, per="batch")
    sides = {
        "CutMix, one each": lambda: cb.mix(x, cb.weights(N), torch.randperm(N)),
        "CutMix, one for all": lambda: one.mix(x, one.weights(N), torch.randperm(N)),
        **each,
        **same,
    }
    medians(sides, 2)
    times = medians(sides, 15 if size > 100 else 60)
    benchmark.pedantic(sides["CutMix, one each"], rounds=5)
    threads, least = torch.get_num_threads(), "CutMix, one each"
    ratios = report(benchmark, times, least, None, size=size, layout=layout, threads=threads)
    assert ratios["kornia, one each"] > 1 and ratios["timm, one each"] > 1 / 1.5, ratios
