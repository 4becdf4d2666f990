"The images of the benchmarks: photos where there are some, noise otherwise."

import os
import random
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
