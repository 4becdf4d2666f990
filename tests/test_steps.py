"What a step costs: the compiler, fastai's own pipeline, every kind of learner; none is changed."

from functools import partial

import pytest

import sota_course  # noqa: F401 (before torch: see its `__init__`)
import torch
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.schedule import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import nn

from sota_course.baseline import baseline_learner
from sota_course.data import get_data, get_dls
from sota_course.training.mixing import CutMix, ManifoldMixup, MixUp
from sota_course.training.mixup_variants import RegMixup
from sota_course.training.models import load_model, save_model
from sota_course.training.muon import muon
from sota_course.training.progressive import Stage
from sota_course.training.steps import (
    PARTS,
    compile_model,
    compiler_problem,
    estimate,
    profile_steps,
    time_steps,
)


@pytest.fixture(scope="module")
def data():
    return get_data("drawn", n_train=60, n_val=30, progress=False)


def tiny(n_out):
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))


def learner(data, cbs=(), opt_func=SGD, pipeline="cached", **kwargs):
    dls = get_dls(10, 32, data, pipeline=pipeline, progress=False, **kwargs)
    return baseline_learner(dls, tiny, opt_func=opt_func, cbs=[o() for o in cbs])


def state(learn):
    "What a step would change."
    weights = {k: o.clone() for k, o in learn.model.state_dict().items()}
    return weights, torch.get_rng_state(), learn.dls.train.rng.getstate()


def same(a, b):
    (weights, luck, order), (others, luck2, order2) = a, b
    assert weights.keys() == others.keys()
    equal = all(torch.equal(o, others[k]) for k, o in weights.items())
    return equal and torch.equal(luck, luck2) and order == order2


KINDS = dict(
    plain={},
    muon=dict(opt_func=muon),
    mixup=dict(cbs=[MixUp]),
    both=dict(cbs=[MixUp, CutMix]),
    inside=dict(cbs=[partial(ManifoldMixup, layers=["3"])]),
    twice=dict(cbs=[RegMixup]),
    fastai=dict(cbs=[FastaiMixUp]),
    pipeline=dict(pipeline="fastai", num_workers=0),
    workers=dict(pipeline="fastai", num_workers=2),
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_learner_is_timed_and_left_as_it_was(data, kind):
    learn = learner(data, **KINDS[kind])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    before = state(learn)
    parts = profile_steps(learn, n=2, warm_up=1)
    assert same(state(learn), before)
    assert all(o["images"] == 10 for o in parts.steps)
    seconds = {k: max(o[k] for o in parts.steps) for k in PARTS}
    mixes = bool(KINDS[kind].get("cbs"))
    assert (seconds["mixing"] > 0) == mixes
    assert all(v > 0 for k, v in seconds.items() if k != "mixing")


def test_loaders_that_are_not_fastais_are_refused(data):
    learn = learner(data)
    batches = torch.utils.data.DataLoader(learn.dls.train_ds, batch_size=10)
    batches.device = None
    learn.dls.loaders[0] = batches
    with pytest.raises(ValueError, match="make it with get_dls or cached_dls"):
        time_steps(learn, n=1)


@pytest.fixture(scope="module")
def compiler():
    problem = compiler_problem()
    if problem:
        pytest.skip(f"torch.compile doesn't work here: {problem}")


def test_a_compiled_model_keeps_its_names_and_is_saved_as_any_other(data, compiler, tmp_path):
    learn = learner(data)
    x = torch.randn(10, 3, 32, 32)
    plain = learn.model.eval()(x)
    names, kind = list(learn.model.state_dict()), type(learn.model)
    compile_model(learn)
    assert learn.model._compiled_call_impl is not None
    torch.testing.assert_close(learn.model(x), plain, rtol=1e-4, atol=1e-5)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    assert list(learn.model.state_dict()) == names and type(learn.model) is kind
    assert len(time_steps(learn, n=2)) == 2
    save_model(learn, tmp_path, arch="tiny")
    loaded = load_model(tmp_path, arch=tiny).model
    torch.testing.assert_close(loaded.eval()(x), learn.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_an_estimate_is_of_the_right_order(data):
    "A training takes no time at all, and not hours: the arithmetic is tested in the notebook."
    learn = learner(data)
    found = estimate(learn, [Stage(24, 10, 2), Stage(32, 10)], n=2, warm_up=1)
    assert 0 < found.seconds < 3600
    assert found.parameters == sum(o.numel() for o in learn.model.parameters())
    words = str(found)
    assert f"parameters: {found.parameters:,}" in words and "about" in words
    rows = words.splitlines()[1:3]
    assert [o.split()[:4] for o in rows] == [["24", "10", "2", "12"], ["32", "10", "1", "6"]]


def test_a_batch_that_is_left_over_from_an_error_is_no_hindrance(data):
    "Its loss belongs to a graph, which can't be copied."

    class Fails(CrossEntropyLossFlat):
        def __call__(self, pred, y):
            super().__call__(pred, y)
            raise RuntimeError("on purpose")

    learn = Learner(learner(data).dls, tiny(10), CrossEntropyLossFlat(), SGD)
    good, learn.loss_func = learn.loss_func, Fails()
    with pytest.raises(RuntimeError, match="on purpose"), learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.pred.grad_fn is not None
    learn.loss_func = good
    assert len(time_steps(learn, n=1, warm_up=0)) == 1
