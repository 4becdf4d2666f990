"""Measure what the parts of a training step cost at 64 pixels, and each precision.

    python bench/measure_steps.py --data <photos> [--runs 0 1 2] [--steps 16] [--out results]

<photos> is the folder that holds imagenette2-160sq, of which 1,000 training photos are taken.
Batches of 64. Two networks: small_resnet, and the recipe's, which is about four times as expensive.
On a CPU the clock counts the seconds in which this process had its turn, on one thread, so that
what else runs on the machine is hardly felt. A file for each run and question goes to <out>/steps;
what is there already isn't done again.
"""

import json
import time
from functools import partial

import sota_course  # noqa: F401 (before torch: see its `__init__`)
import torch
from fastai.callback.channelslast import ChannelsLast
from sota_course.baseline import small_resnet
from sota_course.training.learner import baseline_learner, whitened_resnet
from sota_course.core import write_whole
from sota_course.data import get_dls
from sota_course.training.mixing import CutMix, MixUp
from sota_course.training.settings import environment
from sota_course.training.steps import profile_steps, recommend_precision

from study import PHOTOS, photo_options

SIZE, BS, PER_CLASS = 64, 64, 100
MIXING = dict(mixup=MixUp, cutmix=CutMix)


def parts_of(learn, steps, clock):
    "The table of `profile_steps` as plain values."
    table = profile_steps(learn, steps, clock=clock).table()
    return dict(ms=table.ms.round(4).to_dict(), mean=table["mean"].round(4).to_dict())


def formats_of(make, clock):
    "Milliseconds of a step in each precision, with channels last in memory and channels first."
    last, first = make(), make()
    first.remove_cb(ChannelsLast)
    sides = dict(channels_last=last, channels_first=first)
    found = {k: recommend_precision(o, 2, 2, 1, clock=clock) for k, o in sides.items()}
    return {k: dict(ms=o.ms, precision=o.precision) for k, o in found.items()}


def main():
    parser = photo_options(__doc__)
    parser.add_argument("--runs", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16, help="steps of a measurement; default: 16")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    if not gpu:
        torch.set_num_threads(1)
    path = args.data / PHOTOS
    dls = get_dls(BS, SIZE, path, per_class=PER_CLASS, progress=False)
    nets = dict(small_resnet=small_resnet, recipe=partial(whitened_resnet, data=dls))
    setting = dict(data=PHOTOS, size=SIZE, bs=BS, clock=clock.__name__)
    command = f"python bench/measure_steps.py --data <photos> --steps {args.steps}"

    def keep(name, run, measure, **what):
        file = args.out / "steps" / f"{name}-run{run}.json"
        if file.exists():
            return
        found = setting | what | dict(run=run, found=measure())
        found |= dict(environment=environment(), command=f"{command} --runs {run}")
        text = json.dumps(found, indent=1) + "\n"
        write_whole(file, lambda o: o.write_text(text))
        print(file.name, found["found"], flush=True)

    for run in args.runs:
        for net, arch in nets.items():
            for mixing, cb in MIXING.items():
                learn = baseline_learner(dls, arch, cbs=cb())
                measure = partial(parts_of, learn, args.steps, clock)
                keep(f"parts-{net}-{mixing}", run, measure, net=net, mixing=mixing)
        for net, arch in nets.items():
            make = partial(baseline_learner, dls, arch, amp=False)
            keep(f"precision-{net}", run, partial(formats_of, make, clock), net=net)


if __name__ == "__main__":
    main()
