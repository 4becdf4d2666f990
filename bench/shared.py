"What the benchmarks share: a thousand images, and clocks that take turns."

import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sota_course.images.decode import image_files

N, NAME = 1200, "imagenette2-160sq"


def drawn(folder, n):
    """Noise of all grain sizes in two classes, 160 pixels a side: a JPEG of it costs about as much
    to decode as one of a photo."""
    rng = np.random.default_rng(0)
    scale = 1 / (np.hypot(*np.meshgrid(np.fft.fftfreq(160) * 160, np.fft.fftfreq(160) * 160)) + 1)
    for i in range(n):
        noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, 160, 160))) * scale).real
        grey = noise.mean(0, keepdims=True)
        levels = 128 + 45 * grey / grey.std() + 12 * noise / noise.std()
        split, label = "val" if i % 4 == 3 else "train", ("a", "b")[i // 4 % 2]
        file = folder / split / label / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = levels.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(file, quality=90)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    "The same images for all, a random thousand, and what they are"
    photos = os.environ.get("SOTA_COURSE_PHOTOS")
    if photos and not (Path(photos) / NAME).is_dir():
        pytest.skip(f"SOTA_COURSE_PHOTOS names a folder without {NAME}")
    folder = Path(photos) / NAME if photos else drawn(tmp_path_factory.mktemp("drawn"), N)
    found = image_files(folder)
    chosen = sorted(random.Random(0).sample(found, min(N, len(found))))
    return chosen, f"{NAME}, {N} of {len(found)}" if photos else f"{N} drawn images"


def clock():
    """Seconds passed, and those of CPU time used by this process and its finished children: the
    second hardly feels what else runs."""
    use = [resource.getrusage(o) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(o.ru_utime + o.ru_stime for o in use)])


def alternate(sides, rounds):
    "Seconds (passed, of CPU) of each of `sides` in each of `rounds`, taking turns: rounds x 2"
    times = {k: [] for k in sides}
    for _ in range(rounds):
        for k, f in sides.items():
            start = clock()
            f()
            times[k].append(clock() - start)
    return {k: np.array(v) for k, v in times.items()}


def medians(sides, rounds):
    "Seconds of each of `sides`: medians over rounds in which they take turns"
    return {k: float(np.median(v[:, 0])) for k, v in alternate(sides, rounds).items()}


def rates(counts, times):
    "Images a second, and a second of CPU time, of each side: medians over the rounds"
    speed = {k: counts[k] / np.median(v, 0) for k, v in times.items()}
    return [{k: round(float(v[i])) for k, v in speed.items()} for i in (0, 1)]
