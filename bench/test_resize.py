"""Resizing by matrix products beside torchvision's antialiased resize and Pillow's, on batches of a training's size.

The sides take turns in one run, and their answers agree. What is kept are images a second and their ratio.
"""
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from sota_course.resize import resize

torch.set_num_threads(min(2, os.cpu_count()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["bytes", "floats"])
@pytest.mark.parametrize("side, size", [(160, 64), (320, 128)])
def test_resize(benchmark, dtype, side, size):
    x = torch.rand(64, 3, side, side, generator=torch.Generator().manual_seed(0))
    if dtype == torch.uint8: x = (x*255).byte()
    images = [Image.fromarray(o.permute(1, 2, 0).numpy()) for o in x] if dtype == torch.uint8 else []
    sides = {"ours": lambda: resize(x, size), "torchvision": lambda: TF.resize(x, [size, size], antialias=True)}
    if images: sides["pillow"] = lambda: [o.resize((size, size), Image.Resampling.BILINEAR) for o in images]
    assert (sides["ours"]().float() - sides["torchvision"]().float()).abs().max() <= (1 if dtype == torch.uint8 else 2e-5)
    times = {k: [] for k in sides}
    for _ in range(7):
        for k, f in sides.items():
            start = time.perf_counter()
            f()
            times[k].append(time.perf_counter() - start)
    benchmark.pedantic(sides["ours"], rounds=3)
    speed = {k: round(64/np.median(v)) for k, v in times.items()}
    benchmark.extra_info.update(batch=64, side=side, size=size, type=str(dtype).removeprefix("torch."), images_per_second=speed,
                                ratio_to_torchvision=round(speed["ours"]/speed["torchvision"], 2))
