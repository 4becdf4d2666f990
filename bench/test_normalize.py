"""Statistics of a data set beside decoding alone; normalizing beside fastai's and torchvision's.

    SOTA_COURSE_PHOTOS=<folder that holds imagenette2-160sq> pytest bench/test_normalize.py

Without the variable it runs on images drawn here. The sides of a comparison take turns in one run.
"""

import os
from functools import partial

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from fastai.data.transforms import Normalize as FastaiNormalize
from fastai.torch_core import TensorImage
from fastai.vision.core import imagenet_stats

from sota_course.images.normalization import Normalize, dataset_stats
from shared import alternate, decode_all, rates


def test_statistics(benchmark, files):
    """Statistics of all pixels, against decoding the same files with as many threads: at least 0.9
    of its speed."""
    files, data = files
    workers = min(2, os.cpu_count())

    sides = dict(
        decode=partial(decode_all, files, workers),
        statistics=partial(dataset_stats, files, n_workers=workers, progress=False),
    )
    alternate(sides, 1)
    times = alternate(sides, 9)
    benchmark.pedantic(sides["statistics"], rounds=3)
    speed, cpu = rates(dict.fromkeys(sides, len(files)), times)
    ratio = np.median(times["decode"][:, 0] / times["statistics"][:, 0])
    benchmark.extra_info.update(
        data=data,
        threads=workers,
        images_per_second=speed,
        images_per_cpu_second=cpu,
        ratio=round(float(ratio), 2),
        required=0.9,
    )
    assert ratio >= 0.9


def test_normalizing(benchmark):
    """A batch, with the look at its scale and without, against fastai's transform and torchvision's
    function."""
    x, n = TensorImage(torch.rand(64, 3, 128, 128)), 64
    ours, unchecked = Normalize(*imagenet_stats), Normalize(*imagenet_stats, check=False)
    theirs = FastaiNormalize.from_stats(*imagenet_stats, cuda=False)
    fs = dict(
        ours=lambda: ours.encodes(x),
        unchecked=lambda: unchecked.encodes(x),
        fastai=lambda: theirs.encodes(x),
        torchvision=lambda: TF.normalize(torch.Tensor(x), *map(list, imagenet_stats)),
    )
    for o in fs.values():
        torch.testing.assert_close(torch.Tensor(o()), torch.Tensor(fs["fastai"]()))
    sides = {k: lambda f=f: [f() for _ in range(10)] for k, f in fs.items()}
    alternate(sides, 1)
    times = alternate(sides, 15)
    benchmark.pedantic(sides["ours"], rounds=3)
    speed, cpu = rates(dict.fromkeys(sides, 10 * n), times)
    benchmark.extra_info.update(
        batch=list(x.shape), images_per_second=speed, images_per_cpu_second=cpu
    )
    assert speed["ours"] >= 0.8 * speed["fastai"]
