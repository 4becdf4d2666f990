"""What the processes of tests/test_distributed.py do: python distributed_script.py CASE DATA OUT

Each leaves what it found in OUT; the tests call the same functions in one process."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import sota_course  # noqa: F401 (before torch: see its `__init__`)
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

from sota_course.baseline import small_resnet
from sota_course.images.loader import cached_dls
from sota_course.training.averaging import EMA
from sota_course.training.distributed import Distribute, distributed, process_rank
from sota_course.training.mixing import CutMix, ManifoldMixup, MixUp
from sota_course.training.muon import muon
from sota_course.training.progressive import Progressive, Stage
from sota_course.training.runs import Run

ITEMS = [
    (torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.tensor(i % 4))
    for i in range(75)
]


def plain_net():
    "A network without BatchNorm."
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def found(learn, rows):
    "What is compared: losses and metrics by epoch, and weights."
    keys = [k for k in rows[0] if k != "train_seconds"]
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    return dict(history={k: [o[k] for o in rows] for k in keys}, weights=state)


class Die(Callback):
    "Kills its process in the third epoch: `who` is its number, or None for each."

    def __init__(self, who):
        self.who = who

    def before_batch(self):
        if self.epoch == 2 and self.training and self.who in (None, process_rank()):
            os.kill(os.getpid(), signal.SIGKILL)


def loaders(data, bs, size):
    aug = dict(do_flip="alternate")
    return cached_dls(data, bs, size, presize=32, aug=aug, stats=None, progress=False)


def image_learner(data, make_model):
    dls = loaders(data, 50, 24)
    kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    cbs = [MixUp(0.4, off_last=1), CutMix(1.0, off_last=1), EMA(0.9)]
    return Learner(dls, make_model(), cbs=cbs, opt_func=partial(muon, rest_lr=0.1), **kwargs)


def image_run(data, folder, make_model=plain_net, cbs=()):
    "Two stages, with mixing, EMA, alternating flips and Muon."
    stages = [Stage(16, bs=60, epochs=2), Stage(24, bs=50, epochs=2)]
    fit = Progressive(stages, get_dls=partial(loaders, data))
    make = partial(image_learner, data, make_model)
    kwargs = dict(epochs=4, lr=0.02, seeds=[3], folder=folder, progress=False, cbs=cbs)
    run = Run("images", make, fit_func=fit, **kwargs).train()
    predicted = dict(logp=run.logp, extra=run.results[0].extra, config=run.results[0].config)
    return found(run.learn, run.results[0].history) | predicted


def small_learner(cbs=()):
    set_seed(0)
    train, valid = DataLoader(ITEMS[:48], bs=16, shuffle=True), DataLoader(ITEMS[48:], bs=9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    kwargs = dict(loss_func=CrossEntropyLossFlat(weight=weight), metrics=accuracy)
    return Learner(DataLoaders(train, valid), model, cbs=[Distribute(), *cbs], **kwargs)


def small_fit(learn, epochs=3):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-2)
    return learn


def small_results():
    "A learner without a run: weighted classes, 27 images for validation, accumulation, freezing."
    learn = small_learner([GradientAccumulation(32), GradientClip(0.5)])
    learn.model[0].requires_grad_(False)
    small_fit(learn)
    learn.model[0].requires_grad_(True)
    small_fit(learn)
    values = [list(o) for o in learn.recorder.values]
    preds, targets = learn.get_preds()
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    return dict(values=values, preds=preds, targets=targets, weights=state)


def refusals():
    "What is said where processes can't work together."
    said = []
    learn = small_learner()
    learn.dls.train.rng.seed(process_rank())
    for learn in (learn, small_learner([ManifoldMixup(layers=["3"])])):
        with pytest.raises(ValueError) as error:
            small_fit(learn)
        said.append(str(error.value))
    return said


def train(data, out):
    "All that is compared with one process."
    return dict(
        plain=image_run(data, out / "plain"),
        norm=image_run(data, out / "norm", partial(small_resnet, 10, (8, 16, 16))),
        small=small_results(),
    )


def together(data, out):
    results = train(data, out) | dict(said=refusals())
    torch.save(results, out / f"process-{process_rank()}.pt")
    print("said once")


def resumed(data, out):
    torch.save(image_run(data, out / "plain"), out / f"resumed-{process_rank()}.pt")
    raise ValueError("all processes have the same to complain about")


def main(case, data, out):
    data, out = Path(data), Path(out)
    try:
        with distributed(minutes=2):
            if case == "together":
                together(data, out)
            elif case == "resumed":
                resumed(data, out)
            else:
                image_run(data, out / "plain", cbs=[Die(None if case == "killed" else 1)])
    except Exception as e:
        print(f"script: {e}", file=sys.stderr)
        sys.exit(2)


def join(rank, processes, port, *args):
    "`main` as process `rank`, with the variables that torchrun sets; stderr goes to a file."
    numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_PORT=port)
    os.environ.update({k: str(o) for k, o in numbers.items()}, MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    sys.stderr = open(Path(args[-1]) / f"said-{rank}.txt", "w")
    main(*args)


if __name__ == "__main__":
    # As a module, so that what a run records has a name that others can import.
    from distributed_script import main

    main(*sys.argv[1:])
