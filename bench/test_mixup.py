"""Mixing a batch, a weight for each image, beside the least that anybody does and beside the peers.

    pytest bench/test_mixup.py

The least is to turn the batch around and blend it with one weight: `torch.lerp(x, x.flip(0), weight)`. All sides take turns in
one run, on the same batch in memory, and the ratio is that of their medians.
"""
import os
import time
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.mixup import MixUp as FastaiMixUp
from kornia.augmentation import RandomMixUpV2
from timm.data.mixup import Mixup as TimmMixup
from torchvision.transforms import v2

from sota_course.mixup import CutMix, blend, mix_weights, mixup

N, CLASSES = 64, 10
torch.set_num_threads(min(2, os.cpu_count()))


def alternate(sides, rounds):
    "Seconds of each of `sides` in each of `rounds`, taking turns."
    times = {k: [] for k in sides}
    for _ in range(rounds):
        for k, f in sides.items():
            start = time.perf_counter()
            f()
            times[k].append(time.perf_counter() - start)
    return {k: np.median(v) for k, v in times.items()}


class Batch:
    "As much of a learner as fastai's callbacks look at."
    training = True
    def __init__(self, x, y): self.x, self.y, self.xb, self.yb = x, y, (x,), (y,)


def fastai_mixup(x, y):
    cb = FastaiMixUp(0.4)
    cb.learn, cb.stack_y = Batch(x, y), True
    return cb.before_batch


def ours(x, y):
    "Everything: weights, partners, images and targets."
    return mixup(x, y, mix_weights(len(x), 0.4), torch.randperm(len(x)), CLASSES)


def report(benchmark, times, main, least, required, **info):
    ratios = {k: round(float(v/times[least]), 2) for k, v in times.items()}
    benchmark.extra_info.update(batch=N, milliseconds={k: round(float(1000*v), 3) for k, v in times.items()}, ratios=ratios, required=required, **info)
    return ratios


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_mixup(benchmark, size, layout):
    "At most 1.5 times the least, and faster than the peers; they also draw their weights, so ours does too where it is compared with them."
    x, y = torch.rand(N, 3, size, size), torch.randint(CLASSES, (N,))
    if layout == "channels last": x = x.to(memory_format=torch.channels_last)
    lam, perm = torch.rand(N), torch.randperm(N)
    timm = TimmMixup(0.4, mode="elem", label_smoothing=0., num_classes=CLASSES)
    peers = dict(timm=lambda: timm(x, y), torchvision=partial(v2.MixUp(alpha=0.4, num_classes=CLASSES), x, y),
                 kornia=partial(RandomMixUpV2(data_keys=["input", "class"]), x, y), fastai=fastai_mixup(x, y))
    sides = {"flip and lerp, one weight": lambda: torch.lerp(x, x.flip(0), 0.3), "blend": lambda: blend(x, lam, perm),
             "mixup with weights and targets": lambda: ours(x, y), **peers}
    w = lam[:, None, None, None]
    assert torch.allclose(blend(x, lam, perm), w*x + (1 - w)*x[perm], atol=1e-6)
    alternate(sides, 2)
    times = alternate(sides, 15 if size > 100 else 60)
    benchmark.pedantic(sides["blend"], rounds=5)
    ratios = report(benchmark, times, "blend", "flip and lerp, one weight", 1.5, size=size, layout=layout, threads=torch.get_num_threads())
    assert ratios["blend"] <= 1.5
    slower = {k: ratios[k] for k in peers}
    assert ratios["mixup with weights and targets"] < min(slower.values()), slower


@pytest.mark.parametrize("size", [64, 224])
def test_cutmix(benchmark, size):
    "A rectangle for each image. timm does that in a loop; torchvision and fastai cut the same rectangle from all."
    x, y, cb = torch.rand(N, 3, size, size), torch.randint(CLASSES, (N,)), CutMix(1.)
    timm = TimmMixup(0., 1., mode="elem", label_smoothing=0., num_classes=CLASSES)
    sides = {"timm, one each": lambda: timm(x, y), "torchvision, one for all": partial(v2.CutMix(alpha=1., num_classes=CLASSES), x, y),
             "CutMix, one each": lambda: cb.mix(x, cb.weights(N), torch.randperm(N))}
    alternate(sides, 2)
    times = alternate(sides, 15)
    benchmark.pedantic(sides["CutMix, one each"], rounds=5)
    report(benchmark, times, "CutMix, one each", "timm, one each", None, size=size, threads=torch.get_num_threads())
