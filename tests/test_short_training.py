"The building blocks of short trainings together: an interrupted run ends as one that nobody broke."

from functools import partial

import pytest

import sota_course  # noqa: F401 (before torch: see its `__init__`)
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from sota_course.data import get_data
from sota_course.images.loader import cached_dls
from sota_course.training.averaging import EMA, Lookahead
from sota_course.training.mixing import MixUp
from sota_course.training.muon import muon
from sota_course.training.progressive import Progressive, Stage
from sota_course.training.runs import Run
from sota_course.training.schedules import fit_triangular
from sota_course.training.whitening import whitening_conv


class Stop(Callback):
    "Breaks off before the third epoch."

    def before_epoch(self):
        if self.epoch == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data():
    return get_data("drawn", n_train=300, n_val=100, progress=False)


def loaders(data, size, bs):
    stats = [0.5] * 3, [0.25] * 3
    aug = dict(do_flip="alternate")
    return cached_dls(data, bs, size, presize=40, aug=aug, stats=stats, progress=False)


def make_learner(data, cbs):
    dls = loaders(data, 32, 50)
    layers = [whitening_conv(dls), nn.ReLU(), nn.BatchNorm2d(48), nn.Conv2d(48, 16, 3, 2, 1)]
    layers += [nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 10))
    kwargs = dict(loss_func=CrossEntropyLossFlat(), opt_func=partial(muon, rest_lr=0.1))
    return Learner(dls, model, cbs=[o() for o in cbs], **kwargs)


def train(data, cbs, folder, fit_func, watching=()):
    make = partial(make_learner, data, cbs)
    kwargs = dict(epochs=4, lr=0.05, seeds=[3], folder=folder, progress=False, cbs=watching)
    return Run("short", make, fit_func=fit_func, **kwargs).train()


def weights_and_losses(run):
    return run.learn.model.state_dict(), [o["valid_loss"] for o in run.results[0].history]


@pytest.mark.parametrize("cbs", [[EMA], [Lookahead], [EMA, MixUp]], ids=["ema", "ahead", "mixup"])
@pytest.mark.parametrize("stages", [False, True], ids=["one size", "two sizes"])
def test_resumed_bit_for_bit(data, cbs, stages, tmp_path):
    fit = fit_triangular
    if stages:
        fit = Progressive([Stage(24, 50, 3), Stage(32, 50)], get_dls=partial(loaders, data))
    weights, losses = weights_and_losses(train(data, cbs, tmp_path / "whole", fit))
    with pytest.raises(KeyboardInterrupt):
        train(data, cbs, tmp_path / "parts", fit, watching=[Stop()])
    again, same = weights_and_losses(train(data, cbs, tmp_path / "parts", fit))
    assert same == losses
    assert all(torch.equal(again[k], o) for k, o in weights.items())
