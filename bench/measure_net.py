"""Measure the network for small images beside xresnets, and with each of its parts changed.

    python bench/measure_net.py --data <photos> [--only <network> …] [--sizes 32 64]
                                [--seeds 0 1 2] [--out results]

<photos> is the folder that holds imagenette2-160sq; without --data the drawn set is trained on.
Five epochs on photos, eight on the drawn set. The changed networks are trained at the first size
only, unless --only names them. Results go to <out>/net-<set>-<size>, a file for each network and
seed. What is there already isn't done again, and an interrupted run goes on from its last epoch.
"""

from functools import partial
from pathlib import Path

from sota_course.baseline import ResidualPair, small_resnet
from sota_course.data import get_data
from torch import nn

from study import PHOTOS, Clock, learner_of, one_seed, options

EPOCHS = dict(photos=5, drawn=8)


def stages(model):
    "The stages of a `small_resnet`: convolution, pooling, normalization, activation, pair."
    return [o for o in model if isinstance(o, nn.Sequential) and isinstance(o[-1], ResidualPair)]


def pool_last(n_out):
    "Pooling after normalization and activation, as ResNet-9 has it."
    model = small_resnet(n_out)
    for o in stages(model):
        o[1], o[2], o[3] = o[2], o[3], o[1]
    return model


def strided(n_out):
    "A stride in place of pooling."
    model = small_resnet(n_out)
    for o in stages(model):
        o[0].stride, o[1] = (2, 2), nn.Identity()
    return model


def without_pairs(n_out):
    "No residual pairs."
    model = small_resnet(n_out)
    for o in stages(model):
        o[-1] = nn.Identity()
    return model


def without_skips(n_out):
    "The pairs add nothing: two plain convolutions."
    model = small_resnet(n_out)
    for o in stages(model):
        pair = o[-1]
        nn.init.ones_(pair.norm2.weight)
        parts = pair.conv1, pair.norm1, nn.ReLU(), pair.conv2, pair.norm2, nn.ReLU()
        o[-1] = nn.Sequential(*parts)
    return model


def pairs_from_one(n_out):
    "The last normalization of a pair begins at one, not at zero."
    model = small_resnet(n_out)
    for o in stages(model):
        nn.init.ones_(o[-1].norm2.weight)
    return model


def global_maximum(n_out):
    "The largest answer of all places before the head, not their mean."
    model = small_resnet(n_out)
    model[-3] = nn.AdaptiveMaxPool2d(1)
    return model


def gelu(n_out):
    "GELU in place of ReLU."
    model = small_resnet(n_out)
    for o in model.modules():
        for name, child in o.named_children():
            if isinstance(child, nn.ReLU):
                setattr(o, name, nn.GELU())
    return model


CHANGED = (
    pool_last,
    strided,
    without_pairs,
    without_skips,
    pairs_from_one,
    global_maximum,
    gelu,
)
NETS = dict(
    small_resnet="small_resnet",
    xresnet10="xresnet10",
    xresnet18="xresnet18",
    wider=partial(small_resnet, widths=(24, 48, 96, 192)),
    three_stages=partial(small_resnet, widths=(32, 64, 128)),
) | {o.__name__: o for o in CHANGED}
WHOLE = tuple(NETS)[:3]


def main():
    parser = options(__doc__)
    add, names = parser.add_argument, ", ".join(NETS)
    add("--data", type=Path, help=f"folder that holds {PHOTOS}; default: the drawn set")
    add("--only", nargs="+", choices=NETS, metavar="network", help=names)
    add("--sizes", nargs="+", type=int, default=[32, 64])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    kind = "photos" if args.data else "drawn"
    path = args.data / PHOTOS if args.data else get_data("drawn", progress=False)
    where = "--data <photos> " if args.data else ""
    clock = Clock()
    for size in args.sizes:
        for seed in args.seeds:
            for name in args.only or (NETS if size == args.sizes[0] else WHOLE):
                command = f"python bench/measure_net.py {where}--only {name} --sizes {size}"
                make = learner_of(path, size, arch=NETS[name])
                folder = args.out / f"net-{kind}-{size}"
                command += f" --seeds {seed}"
                clock.train(one_seed(name, make, EPOCHS[kind], seed, folder, command))


if __name__ == "__main__":
    main()
