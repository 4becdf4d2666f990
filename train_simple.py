"""The course's `fast` recipe in one file: from a folder of images to a trained network.

    python train_simple.py --data imagenette2-160 [--epochs 5] [--size 64] [--runs 3] [--help]

It needs torch, numpy and Pillow. Each setting below is an option; results/simple holds what was
measured. Seconds are those of the training: decoding (once) and the last test come on top.
Ideas: airbench (K. Jordan, arXiv:2404.00498), Muon (2024), hlb-CIFAR10, D. Page's ResNet (2018).
"""

import argparse
import json
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

SETTINGS = dict(  # options of the command: default, least and greatest value, meaning
    epochs=(5, 1, 10_000, "rounds through the training images"),
    size=(64, 32, 512, "side of the images in the last epochs, in pixels"),
    bs=(64, 2, 65_536, "images in a batch"),
    width=(48, 8, 1024, "channels of the first stage; the next have twice and four times as many"),
    lr=(0.05, 0.0, 10.0, "highest learning rate of the filters (Muon)"),
    rest_lr=(0.01, 0.0, 10.0, "highest learning rate of all else (Adam)"),
    peak=(0.25, 0.01, 0.99, "share of the steps in which the rates rise; then they fall"),
    smoothing=(0.1, 0.0, 0.99, "share of each target that is spread over all classes"),
    min_area=(0.5, 0.01, 1.0, "least area of a random crop, as a share of the image"),
    seed=(0, 0, 2**31, "of the first run"),
    runs=(1, 1, 10_000, "trainings, each with the next seed"),
)
shrink = partial(F.interpolate, mode="bilinear", antialias=True)  # images (n,3,h,w), new side


def load(folder, side, o):
    "Images (n,3,side,side), uint8, and classes (n,): decoded once, then read from the cache."
    files = sorted(folder.glob("*/[!.]*"))
    state = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime) for p in files]
    saved = o.cache / f"{zlib.crc32(repr(state).encode()):08x}-{side}.npy"  # new files, new name

    def decode(file):
        try:
            img = Image.open(file)
            img.draft("RGB", (side, side))  # a JPEG can be read at half its size, or less
            return np.asarray(ImageOps.fit(img.convert("RGB"), (side, side)))
        except OSError as e:
            sys.exit(f"{file} can't be read as an image: {e}")

    if not saved.exists():
        pixels = np.stack(list(ThreadPoolExecutor().map(decode, files)))
        o.cache.mkdir(parents=True, exist_ok=True)
        part = saved.with_suffix(f".{time.time_ns()}.npy")
        np.save(part, pixels.transpose(0, 3, 1, 2))
        part.replace(saved)  # whole or not there, whatever happens meanwhile
    classes = torch.tensor([o.classes.index(p.parent.name) for p in files])
    return torch.from_numpy(np.load(saved)).to(o.device), classes.to(o.device)


def augment(images, size, min_area, mirrored):
    "A random crop of each image (n,3,h,w), mirrored where `mirrored` (n,) says: (n,3,size,size)."
    area, aspect, x, y = torch.rand(4, len(images), device=images.device)
    area, aspect = min_area + (1 - min_area) * area, (4 / 3) ** (2 * aspect - 1)  # 3/4 to 4/3
    w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # Where pixels come from: an affine matrix for each image, whose sides are at -1 and 1.
    matrix = torch.zeros(len(images), 2, 3, device=images.device)
    matrix[:, 0, 0], matrix[:, 0, 2] = torch.where(mirrored, -w, w), (2 * x - 1) * (1 - w)
    matrix[:, 1, 1], matrix[:, 1, 2] = h, (2 * y - 1) * (1 - h)
    grid = F.affine_grid(matrix, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def whitening_filters(images, k=4, n=24, eps=4e-5):
    "Filters (2n,3,k,k) and bias (2n,) whose outputs vary alike and independently; half negatives."
    patches = F.unfold(images, k).transpose(0, 1).flatten(1).double()
    variances, axes = torch.linalg.eigh(torch.cov(patches, correction=0))  # smallest first
    filters = (axes / (variances + eps).sqrt()).T.flip(0)[:n]
    filters = torch.cat([filters, -filters])
    return filters.view(-1, 3, k, k).float(), -(filters @ patches.mean(1)).float()


class Residual(nn.Sequential):  # what its layers make of images is added to the images
    def forward(self, x):
        return F.relu(x + super().forward(x))


def network(images, n_classes, width):
    "A network for small images; its stem is made from some of the training `images` (n,3,h,w)."
    stem = nn.Conv2d(3, 48, 4, stride=2, padding=1)
    stem.load_state_dict(dict(zip(("weight", "bias"), whitening_filters(images))))
    stem.weight.requires_grad_(False)  # good from the start: nothing to learn
    conv, norm = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d
    layers = [stem, nn.ReLU()]
    for n, m in ((48, width), (width, 2 * width), (2 * width, 4 * width)):
        # Pooling at once leaves a quarter of the work, and BatchNorm sees what the rest will get.
        layers += [conv(n, m), nn.MaxPool2d(2), norm(m), nn.ReLU()]
        layers += [Residual(conv(m, m), norm(m), nn.ReLU(), conv(m, m), norm(m))]
        nn.init.zeros_(layers[-1][-1].weight)  # at first it adds nothing
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(m, n_classes))


@torch.no_grad()
def muon(means, lr, momentum=0.9):
    "One step of Muon for filters, the keys of `means`: along all directions alike."
    for p, mean in means.items():
        mean.lerp_(p.grad, 1 - momentum)
        x = F.normalize(p.grad.lerp(mean, momentum).flatten(), dim=0).view(len(p), -1)
        for _ in range(5):  # Newton and Schulz: lengths along all directions come near to 1
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        p.mul_(len(p) ** 0.5 / p.norm())  # BatchNorm undoes a filter's length, so it stays at 1
        p.sub_(x.reshape(p.shape), alpha=lr)


@torch.no_grad()
def test(net, images, classes, size):
    "Accuracy, the same with the mirrored image as a second view, NLL of the first."
    x = [shrink(o / 255, size) for o in images.split(256)]
    plain = torch.cat([net.eval()(o) for o in x]).log_softmax(1)
    both = plain.exp() + torch.cat([net(o.flip(3)) for o in x]).softmax(1)
    right = [(o.argmax(1) == classes).float().mean().item() for o in (plain, both)]
    return dict(accuracy=right[0], mirrored=right[1], nll=F.nll_loss(plain, classes).item())


def train(images, classes, test_set, o):
    "Train with the settings `o`: what `test` says then, and the seconds of the training."
    start = time.perf_counter()
    some = shrink(images[torch.randperm(len(images))[:128]].cpu() / 255, o.size)
    net = network(some, len(o.classes), o.width).to(o.device, memory_format=torch.channels_last)
    means = {p: torch.zeros_like(p) for p in net.parameters() if p.ndim == 4 and p.requires_grad}
    opt = torch.optim.Adam([p for p in net.parameters() if p.ndim < 4], betas=(0.9, 0.99), eps=1e-5)
    mirrored = torch.rand(len(images), device=o.device) >= 0.5  # in every other epoch from now
    n_steps = max(1, len(images) // o.bs)
    # Small images are soon learned from: a fifth of the epochs, two fifths, and the rest in full.
    sizes = [o.size // 2] * round(o.epochs / 5) + [o.size * 3 // 4] * round(o.epochs * 2 / 5)
    for epoch, size in enumerate(sizes + [o.size] * (o.epochs - len(sizes))):
        total, order = 0.0, torch.randperm(len(images), device=o.device)
        for i, index in enumerate(order.tensor_split(n_steps)):
            x = shrink(images[index] / 255, size * 5 // 4)  # larger than the crops
            x = augment(x, size, o.min_area, mirrored[index] ^ (epoch % 2 == 1))
            with torch.autocast(o.device, torch.bfloat16, enabled=o.device == "cuda"):
                y = net.train()(x.contiguous(memory_format=torch.channels_last)).float()
            loss = F.cross_entropy(y, classes[index], label_smoothing=o.smoothing)
            net.zero_grad()
            loss.backward()
            rate = np.interp((epoch + i / n_steps) / o.epochs, [0, o.peak, 1], [0.2, 1, 0.05])
            muon(means, o.lr * rate)
            opt.param_groups[0]["lr"] = o.rest_lr * rate
            opt.step()
            total += loss.detach() / n_steps
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: {size} px, loss {total:.3f}, {seconds:.1f} s", flush=True)
    return test(net, *test_set, o.size) | dict(seconds=seconds)


def options():  # of the command line, checked
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train/ and val/")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of each run")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/train_simple")
    for name, (default, _, _, text) in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    o = parser.parse_args()
    for name, (_, least, most, _) in SETTINGS.items():
        if not least <= getattr(o, name) <= most:
            parser.error(f"--{name} must be from {least} to {most}, not {getattr(o, name)}")
    found = [{p.parent.name for p in (o.data / k).glob("*/[!.]*")} for k in ("train", "val")]
    if len(found[0]) < 2 or found[0] != found[1]:
        parser.error(f"{o.data} must hold train/<class>/ and val/<class>/, with the same classes")
    o.classes, o.device = sorted(found[0]), "cuda" if torch.cuda.is_available() else "cpu"
    return o


def main():
    o, found = options(), []
    sets = [load(o.data / k, o.size * 5 // 4, o) for k in ("train", "val")]
    for seed in range(o.seed, o.seed + o.runs):
        torch.manual_seed(seed)
        found.append(train(*sets[0], sets[1], o))
        print(f"seed {seed}:", ", ".join(f"{k} {v:.4f}" for k, v in found[-1].items()), flush=True)
        if o.out:
            given = {k: getattr(o, k) for k in SETTINGS if k != "runs"} | dict(seed=seed)
            call = " ".join(f"--{k} {v}" for k, v in given.items())
            report = dict(command=f"python train_simple.py --data <photos> {call}", **given)
            report |= found[-1] | dict(torch=torch.__version__, threads=torch.get_num_threads())
            o.out.mkdir(parents=True, exist_ok=True)
            file = o.out / f"{'-'.join(f'{k}{v}' for k, v in given.items())}.json"
            file.write_text(json.dumps(report, indent=1) + "\n")
    for k in found[0] if o.runs > 1 else ():
        values = [r[k] for r in found]
        print(f"{k}: mean {np.mean(values):.4f}, sd {np.std(values, ddof=1):.4f}, n {o.runs}")


if __name__ == "__main__":
    main()
