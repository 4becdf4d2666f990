"""Everything that is to be measured on a GPU, within ten minutes.

    python bench/measure_gpu.py pack --data <photos> [--file photos.tar] [--megabytes 60]
    python bench/measure_gpu.py run [--file photos.tar] [--out results] [--minutes 9.5] [--tiny]

`pack` puts Imagenette's photos, <photos>/imagenette2-160sq, into one file of at most so many
megabytes, by writing each once more with as much quality as fits: the machine with the GPU may be
reached by nothing else. `run` unpacks it, runs the tests that need a GPU, and then trains at 128
pixels: `fast`, 5 epochs with ten seeds and 20 epochs with three, and the book's xresnet50. Results
go to <out>/gpu. A run that would not be done in time isn't begun; what is there already isn't done
again. `--tiny` does all of it in a small way, on any machine.

The leaderboard's best at 128 pixels are 87.43 % after 5 epochs and 91.57 % after 20, on photos
that were made from larger ones. These are squashed to 160 pixels and compressed twice, so somewhat
lower figures are to be expected.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image
from sota_course.training.recipe_runs import RecipeRun
from sota_course.training.recipes import preset

from study import PHOTOS, options

ROOT = Path(__file__).resolve().parent.parent
QUALITIES = (90, 85, 80, 75, 70, 60, 50, 40, 30)
# name -> recipe and seeds: the most important first
FULL = {
    "fast-5": (preset("fast", size=128, first_size=64, epochs=5), range(10)),
    "book-5": (preset("book", size=128, arch="xresnet50"), range(3)),
    "fast-20": (preset("fast", size=128, first_size=64, epochs=20, min_scale=0.35), range(3)),
}
TINY = {
    "fast-1": (preset("fast", size=32, first_size=16, epochs=2, arch="whitened_resnet24"), [0, 1]),
    "book-1": (preset("book", size=16, arch="xresnet10", epochs=1), [0]),
}


def encoded(path, quality):
    "The photo in the file `path` as JPEG."
    data = io.BytesIO()
    Image.open(path).convert("RGB").save(data, "JPEG", quality=quality)
    return data.getvalue()


def best_quality(files, limit):
    "The highest quality with which all `files` take at most `limit` bytes, by every fiftieth."
    some = files[::50]
    for quality in QUALITIES:
        mean = sum(len(encoded(o, quality)) for o in some) / len(some)
        # A tar file has a head of 512 bytes for each, and fills up to as many.
        if (mean + 1024) * len(files) <= limit:
            return quality
    raise SystemExit(f"{len(files)} photos don't fit into {limit:,} bytes: allow more --megabytes")


def pack(folder, file, megabytes):
    "Write all photos of `folder` into one file."
    files = sorted(o for o in folder.rglob("*") if o.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise SystemExit(f"{folder} has no photos: --data is the folder that holds {PHOTOS}")
    quality = best_quality(files, megabytes * 1e6)
    with tarfile.open(file, "w") as tar:
        for path in files:
            data = encoded(path, quality)
            info = tarfile.TarInfo(path.relative_to(folder).with_suffix(".jpg").as_posix())
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    size = Path(file).stat().st_size / 1e6
    print(f"{file}: {len(files)} photos, quality {quality}, {size:.1f} MB")


def gpu_tests():
    "Run the tests that need a GPU; elsewhere they skip themselves."
    command = [sys.executable, "-m", "pytest", "-n", "0", "-k", "gpu or cuda or device", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(f"tests: {done.stdout.strip().splitlines()[-1]}", flush=True)


def planned(runs):
    "Name, recipe and seed of each run; the first seed of all comes first."
    pairs = [(i, name, seed) for name, (_, seeds) in runs.items() for i, seed in enumerate(seeds)]
    order = list(runs)
    for _, name, seed in sorted(pairs, key=lambda o: (o[0] > 0, order.index(o[1]), o[0])):
        yield name, runs[name][0], seed


def train_all(runs, folder, out, end):
    "Train what isn't there yet, while there is time for as much as the last such run took."
    took = {}
    for name, recipe, seed in planned(runs):
        start = time.monotonic()
        if start + took.get(name, 0) > end:
            print(f"{name} seed {seed}: no time left", flush=True)
            continue
        command = f"python bench/measure_gpu.py run # {name} seed {seed}"
        run = RecipeRun(name, recipe, folder, [seed], out, command=command, progress=False)
        (result,) = run.train().results
        took[name] = time.monotonic() - start
        views = result.extra.get("views", {}).get("accuracy", result.accuracy)
        print(
            f"{name} seed {seed}: accuracy {result.accuracy:.4f}, in views {views:.4f}, "
            f"trained in {result.train_seconds:.0f} s, all in {took[name]:.0f} s",
            flush=True,
        )


def main():
    parser = options(__doc__)
    add = parser.add_argument
    add("what", choices=("pack", "run"))
    add("--data", type=Path, help=f"folder that holds {PHOTOS}, for pack")
    add("--file", type=Path, default=Path("photos.tar"))
    add("--megabytes", type=float, default=60)
    add("--minutes", type=float, default=9.5)
    add("--tiny", action="store_true")
    args = parser.parse_args()
    if args.what == "pack":
        if args.data is None:
            parser.error(f"pack needs --data, the folder that holds {PHOTOS}")
        return pack(args.data / PHOTOS, args.file, args.megabytes)
    end = time.monotonic() + 60 * args.minutes
    if not args.tiny:
        gpu_tests()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / PHOTOS  # the name that results give to the data
        with tarfile.open(args.file) as tar:
            tar.extractall(photos, filter="data")
        train_all(TINY if args.tiny else FULL, photos, args.out / "gpu", end)


if __name__ == "__main__":
    main()
