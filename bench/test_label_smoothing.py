"""The smoothed loss beside torch's, fastai's and timm's: forward and backward, for a classifier of
10 classes, for ImageNet's 1,000, and for segmentation.

    pytest bench/test_label_smoothing.py

The sides take turns within one run, and a ratio is that of medians. torch's is one fused operation
written in C++; the others, ours among them, are several operations, and ours also checks its input:
a fraction of a millisecond a batch, where a model's step takes tens of them.
"""

import os
from functools import partial

import pytest
import torch
from fastai.losses import LabelSmoothingCrossEntropy as FastaiLoss
from timm.loss import LabelSmoothingCrossEntropy as TimmLoss
from torch import nn

from shared import medians
from sota_course.label_smoothing import SmoothCrossEntropy

torch.set_num_threads(min(2, os.cpu_count()))
SHAPES = {
    "10 classes": (64, 10),
    "1,000 classes": (256, 1000),
    "21 classes, 64 x 64 pixels": (4, 21, 64, 64),
}


def step(loss, x, y):
    x.grad = None
    loss(x, y).backward()


def a_call(sides, rounds, repeat):
    "Seconds a call of each of `sides`."

    def repeated(f):
        for _ in range(repeat):
            f()

    seconds = medians({k: partial(repeated, f) for k, f in sides.items()}, rounds)
    return {k: v / repeat for k, v in seconds.items()}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("name", SHAPES)
def test_loss(benchmark, name, weighted):
    shape = SHAPES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.randint(shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    w = torch.rand(shape[1]) + 0.5 if weighted else None
    losses = {
        "ours": SmoothCrossEntropy(0.1, w),
        "torch": nn.CrossEntropyLoss(w, label_smoothing=0.1),
    }
    if not weighted:
        losses["fastai"] = FastaiLoss(0.1)  # with weights it is another number
    if not weighted and len(shape) == 2:
        losses["timm"] = TimmLoss(0.1)
    found = {k: f(x, y) for k, f in losses.items()}
    for k, v in found.items():
        torch.testing.assert_close(v, found["torch"], rtol=1e-5, atol=1e-5, msg=k)
    sides = {k: (lambda f=f: step(f, x, y)) for k, f in losses.items()}
    a_call(sides, 3, 5)
    seconds = a_call(sides, 30, 20 if len(shape) == 2 and shape[1] == 10 else 5)
    benchmark.pedantic(sides["ours"], rounds=10)
    benchmark.extra_info.update(
        shape=shape,
        microseconds={k: round(v * 1e6, 1) for k, v in seconds.items()},
        ratio_to_ours={k: round(v / seconds["ours"], 2) for k, v in seconds.items()},
    )
