"""Where normalization pays: on a network without BatchNorm, and as a whitening first layer.

    python bench/measure_whitening.py --data <photos> [--part batchnorm|rates|without]
                                      [--seeds 0 1 2] [--out results]

<photos> is the folder that holds imagenette2-160sq. A `small_resnet` is trained on all photos at 32
pixels for six epochs, and scored on all validation photos.

`batchnorm` trains it as it is, on pixels without statistics and on normalized ones, and with two
first layers of 4 by 4 pixels: a learned one, and frozen whitening filters. `without` takes
BatchNorm out of it, gives the convolutions biases, and trains it without statistics and with them,
each at the rate that was best for it in `rates`: a run of three epochs for each rate, with a seed
of its own. What is there already isn't done again. Results go to <out>/whitening and
<out>/whitening-rates.
"""

from functools import partial

from torch import nn

from sota_course.baseline import ResidualPair, small_resnet
from sota_course.training.learner import baseline_learner
from sota_course.data import get_dls
from sota_course.images.normalization import dataset_stats
from sota_course.training.runs import load_results
from sota_course.training.whitening import whitening_conv

from study import LR, PHOTOS, Clock, one_seed, photo_options

SIZE, BS, EPOCHS = 32, 64, 6
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
RATE_EPOCHS = 3
RATE_SEED = 100  # none of those that are compared
STEM = 48  # channels behind a first layer of 4 by 4 pixels
WIDTHS = (STEM, 32, 64, 128)
COMMAND = "python bench/measure_whitening.py --data <photos> --part "


# --- networks: functions of the number of outputs and of the loaders ---


def as_it_is(n_out, dls):
    return small_resnet(n_out)


def learned(n_out, dls):
    "A learned first layer in the shape of the whitening one."
    model = small_resnet(n_out, WIDTHS)
    conv = nn.Conv2d(3, STEM, 4, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    model[0] = nn.Sequential(conv, nn.BatchNorm2d(STEM), nn.ReLU())
    return model


def whitened(n_out, dls):
    "A first layer of frozen whitening filters and their negatives."
    model = small_resnet(n_out, WIDTHS)
    model[0] = nn.Sequential(whitening_conv(dls, n=STEM // 2), nn.ReLU())
    return model


def without_batchnorm(n_out, dls):
    "Biases in place of BatchNorm; pairs add nothing at first, as with it."
    model = small_resnet(n_out)
    for o in list(model.modules()):
        for name, child in o.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(o, name, nn.Identity())
            if isinstance(child, nn.Conv2d):
                child.bias = nn.Parameter(child.weight.new_zeros(child.out_channels))
    for o in model.modules():
        if isinstance(o, ResidualPair):
            nn.init.zeros_(o.conv2.weight)
    return model


# --- runs ---


def run(name, net, stats, path, folder, command, seed, lr=LR, epochs=EPOCHS):
    "The run `name` of a network on pixels with `stats`."

    def make():
        dls = get_dls(BS, SIZE, path, stats=stats, progress=False)
        arch = partial(net, dls=dls)
        learn = baseline_learner(dls, arch(n_out=dls.c))
        learn.arch = f"small_resnet, {net.__name__}"
        return learn

    return one_seed(name, make, epochs, seed, folder, command, lr=lr)


def batchnorm(path, own, args):
    sides = {
        "none": (as_it_is, None),
        "channels": (as_it_is, own),
        "learned": (learned, own),
        "whitened": (whitened, own),
    }
    for seed in args.seeds:
        for name, (net, stats) in sides.items():
            yield run(name, net, stats, path, args.out / "whitening", COMMAND + "batchnorm", seed)


def rate_name(side, lr):
    return f"{side}-{lr:g}"


def rates(path, own, args):
    folder = args.out / "whitening-rates"
    for lr in RATES:
        for side, stats in dict(none=None, channels=own).items():
            name, command = rate_name(side, lr), COMMAND + "rates"
            how = dict(seed=RATE_SEED, lr=lr, epochs=RATE_EPOCHS)
            yield run(name, without_batchnorm, stats, path, folder, command, **how)


def best_rate(found, side):
    "The rate whose run of `side` has the lowest NLL. Raises `ValueError` where one is missing."
    names = {rate_name(side, lr): lr for lr in RATES}
    missing = names.keys() - found.keys()
    if missing:
        raise ValueError(f"no run {', '.join(sorted(missing))} yet: --part rates first")
    return names[min(names, key=lambda o: found[o][0].nll)]


def without(path, own, args):
    found = load_results("whitening-rates", args.out)
    for seed in args.seeds:
        for side, stats in dict(none=None, channels=own).items():
            name, lr = f"{side}-without", best_rate(found, side)
            folder, command = args.out / "whitening", COMMAND + "without"
            yield run(name, without_batchnorm, stats, path, folder, command, seed, lr)


PARTS = dict(batchnorm=batchnorm, rates=rates, without=without)


def main():
    parser = photo_options(__doc__)
    add = parser.add_argument
    add("--part", choices=PARTS, help="default: all three")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    path = args.data / PHOTOS
    if not path.is_dir():
        parser.error(f"{args.data} holds no folder {PHOTOS}")
    own = [[round(float(o), 4) for o in pair] for pair in dataset_stats(path, progress=False).pair]
    clock = Clock()
    for part in [args.part] if args.part else PARTS:
        for o in PARTS[part](path, own, args):
            clock.train(o)


if __name__ == "__main__":
    main()
