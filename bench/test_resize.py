"""Resizing by matrix products beside torchvision's antialiased resize and Pillow's; and an epoch of
training at the sizes of progressive resizing.

    SOTA_COURSE_PHOTOS=<folder that holds imagenette2-160sq> pytest bench/test_resize.py

The sides take turns in one run. Without the variable the epochs run on images drawn here.
"""

import os
from functools import partial

import pytest
import torch
from fastai.vision.all import (
    Callback,
    CancelValidException,
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    imagenet_stats,
    parent_label,
)
from PIL import Image
from torchvision.transforms import functional as TF

from measure_resize import BS, SIZE, STAGES
from shared import alternate, medians, rates
from sota_course.training.learner import baseline_learner
from sota_course.images.loader import cached_dls
from sota_course.resize import resize

REQUIRED = 0.7  # of the time, at equal epochs
torch.set_num_threads(min(2, os.cpu_count()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["bytes", "floats"])
@pytest.mark.parametrize("side, size", [(160, 64), (320, 128)])
def test_resize(benchmark, dtype, side, size):
    x = torch.rand(64, 3, side, side, generator=torch.Generator().manual_seed(0))
    if dtype == torch.uint8:
        x = (x * 255).byte()
    sides = {
        "ours": lambda: resize(x, size),
        "torchvision": lambda: TF.resize(x, [size, size], antialias=True),
    }
    if dtype == torch.uint8:
        images = [Image.fromarray(o.permute(1, 2, 0).numpy()) for o in x]
        how = dict(size=(size, size), resample=Image.Resampling.BILINEAR)
        sides["pillow"] = lambda: [o.resize(**how) for o in images]
    difference = (sides["ours"]().float() - sides["torchvision"]().float()).abs().max()
    assert difference <= (1 if dtype == torch.uint8 else 2e-5)
    times = alternate(sides, 7)
    benchmark.pedantic(sides["ours"], rounds=3)
    speed, _ = rates(dict.fromkeys(sides, len(x)), times)
    benchmark.extra_info.update(
        batch=64,
        side=side,
        size=size,
        type=str(dtype).removeprefix("torch."),
        images_per_second=speed,
        ratio_to_torchvision=round(speed["ours"] / speed["torchvision"], 2),
    )


def test_progressive(benchmark, files, tmp_path):
    """Epochs at the stages' sizes beside epochs at the last one: at equal epochs, at most 0.7 of
    the time."""
    files, data = files
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=sorted({f.parent.name for f in files}))),
        get_y=parent_label,
        splitter=IndexSplitter(range(BS)),
    )

    def learner(size):
        dls = cached_dls(
            block.datasets(files),
            bs=BS,
            size=size,
            stats=imagenet_stats,
            cache_dir=tmp_path,
            progress=False,
        )
        return baseline_learner(dls, "xresnet10", metrics=[])

    sides = {o.size: partial(epoch, learner(o.size)) for o in STAGES}
    alternate(sides, 1)
    seconds = medians(sides, 7)
    benchmark.pedantic(sides[SIZE], rounds=1)
    mean = sum(o.epochs * seconds[o.size] for o in STAGES) / sum(o.epochs for o in STAGES)
    share = round(mean / seconds[SIZE], 2)
    benchmark.extra_info.update(
        data=data,
        model="xresnet10",
        batch=BS,
        stages=[[o.size, o.epochs] for o in STAGES],
        share_of_time=share,
        required=REQUIRED,
        images_per_second={k: round((len(files) - BS) / v) for k, v in seconds.items()},
    )
    assert share <= REQUIRED


def epoch(learn):
    "Train for one epoch, without validation."
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=CancelValidation())


class CancelValidation(Callback):
    def before_validate(self):
        raise CancelValidException
