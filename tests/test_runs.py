"Runs: what is compared, what a checkpoint holds, what a kill leaves, and signals at any moment."

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import fastai.callback.tracker
import fastai.callback.training
import fastai.callback.channelslast
import fastai.callback.fp16
import fastai.callback.mixup
import fastai.callback.rnn
import fastai.losses
import fastai.optimizer
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix as BookCutMix
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, SGD
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from sota_course.training import checkpoints, runs
from sota_course.core import CheckpointError
from sota_course.training.compare import compare
from sota_course.label_smoothing import SmoothCrossEntropy
from sota_course.training.mixing import CutMix, ManifoldMixup, MixUp
from sota_course.training.mixup_variants import RegMixup, ResizeMix
from sota_course.training.checkpoints import Checkpoint, EpochSeeds, History, load_checkpoint
from sota_course.training.runs import Result, Run, load_results, score
from sota_course.training.settings import as_settings, describe, differences
from sota_course.training.stopping import Stopped, Stopper

ITEMS = [
    (torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.tensor(i % 4))
    for i in range(40)
]


def net(p=0.0, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Flatten(),
        nn.Linear(width * 36, 4),
    )


def loaders(first=0, **kwargs):
    train = DataLoader(ITEMS[first : first + 30], bs=8, shuffle=True, **kwargs)
    return DataLoaders(train, DataLoader(ITEMS[30:], bs=8))


def learner(loss_func=None, model=None, dls=None, **kwargs):
    return Learner(
        dls or loaders(),
        model or net(),
        loss_func=loss_func or CrossEntropyLossFlat(),
        metrics=accuracy,
        **kwargs,
    )


def run(make, folder=None, epochs=3, seeds=(0,), **kwargs):
    return Run("a", make, epochs, 1e-2, seeds, folder, progress=False, **kwargs)


class PowerCut(Callback):
    "The power fails after the checkpoint of `epoch`, or in the middle of the next one."

    order = 1001

    def __init__(self, epoch, batch=None):
        self.at, self.batch = epoch, batch

    def after_epoch(self):
        if self.batch is None and self.epoch == self.at:
            raise KeyboardInterrupt

    def after_batch(self):
        if self.training and self.epoch == self.at + 1 and self.iter == self.batch:
            raise KeyboardInterrupt


def weights(run):
    return {k: o.clone() for k, o in run.learn.model.state_dict().items()}


def losses(run):
    return [(o["train_loss"], o["valid_loss"]) for o in run.results[0].history]


def ends_as_if_undisturbed(make, folder, epochs=3, at=0, batch=None, **kwargs):
    "An interrupted and resumed run against one that nobody disturbed, bit for bit."
    whole = run(make, epochs=epochs, **kwargs).train()
    with pytest.raises(KeyboardInterrupt):
        run(make, folder, epochs, cbs=[PowerCut(at, batch)], **kwargs).train()
    assert [o.name for o in folder.iterdir()] == ["a-seed0.pt"]
    resumed = run(make, folder, epochs, **kwargs).train()
    assert [o.name for o in folder.iterdir()] == ["a-seed0.json"]
    assert losses(resumed) == losses(whole)
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    return whole, resumed


# What is compared


def both(a, b):
    "The differences between two learners, as a stored result would have them."
    return differences(*(json.loads(json.dumps(describe(o))) for o in (a, b)))


def smoothed(eps):
    return partial(nn.functional.cross_entropy, label_smoothing=eps)


def closed(eps):
    return lambda pred, y: nn.functional.cross_entropy(pred, y, label_smoothing=eps)


def added():
    return lambda p, y: p.mean() + y.sum()


def subtracted():
    return lambda p, y: p.mean() - y.sum()


def within(module):
    return nn.Sequential(nn.Flatten(), nn.Identity(), module)


def adamw(**kwargs):
    return partial(OptimWrapper, opt=torch.optim.AdamW, **kwargs)


def made(wd):
    return lambda params, **kwargs: SGD(params, wd=wd, **kwargs)


def scaled(b, by):
    return b[0] * by, b[1]


def halves(m):
    return [list(m[:2].parameters()), list(m[2:].parameters())]


def in_one(m):
    return [list(m.parameters())]


def noted(k):
    def f(self):
        return k

    return f


def ordered(k):
    cb = GradientAccumulation(16)
    cb.order = k
    return cb


def frozen(yes):
    model = net()
    model[0].requires_grad_(not yes)
    return model


def two_layers(k):
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Flatten(),
        nn.Linear(192, 4),
    )
    return learner(model=model, cbs=ManifoldMixup(layers=[model[k]]))


# How a learner is made of a value, and two values of it.
PAIRS = dict(
    smoothing=(lambda o: learner(CrossEntropyLossFlat(label_smoothing=o)), 0.1, 0.2),
    eps=(lambda o: learner(LabelSmoothingCrossEntropyFlat(eps=o)), 0.1, 0.2),
    gamma=(lambda o: learner(FocalLossFlat(gamma=o)), 1.0, 2.0),
    weights=(lambda o: learner(CrossEntropyLossFlat(weight=torch.tensor([1, 1, 1, o]))), 1.0, 2.0),
    large_weights=(lambda o: learner(nn.CrossEntropyLoss(torch.arange(100.0).add(o))), 1.0, 2.0),
    ours=(lambda o: learner(SmoothCrossEntropy(o)), 0.1, 0.2),
    partial_loss=(lambda o: learner(partial(smoothed(o), reduction="mean")), 0.1, 0.2),
    closure=(lambda o: learner(closed(o)), 0.1, 0.2),
    code=(lambda o: learner(added() if o else subtracted()), True, False),
    submodule=(lambda o: learner(within(nn.CrossEntropyLoss(label_smoothing=o))), 0.1, 0.2),
    accumulation=(lambda o: learner(cbs=GradientAccumulation(o)), 16, 64),
    mixing=(lambda o: learner(cbs=MixUp(o)), 0.2, 0.4),
    book_mixing=(lambda o: learner(cbs=BookCutMix(o)), 0.2, 0.4),
    layers=(lambda o: two_layers(o), 0, 1),
    event=(lambda o: learner(cbs=Callback(after_loss=noted(o))), 1, 2),
    order=(lambda o: learner(cbs=ordered(o)), 1, 2),
    partial_opt=(lambda o: learner(opt_func=partial(Adam, wd=0.1, decouple_wd=o)), True, False),
    lambda_opt=(lambda o: learner(opt_func=made(o)), 0.1, 0.2),
    torch_opt=(lambda o: learner(opt_func=adamw(amsgrad=o)), True, False),
    lookahead=(lambda o: learner(opt_func=partial(fastai.optimizer.ranger, k=o)), 5, 6),
    larc=(lambda o: learner(opt_func=partial(fastai.optimizer.Larc, clip=o)), True, False),
    dropout=(lambda o: learner(model=net(o)), 0.1, 0.2),
    first_value=(lambda o: learner(model=within(nn.PReLU(init=o))), 0.1, 0.2),
    frozen=(lambda o: learner(model=frozen(o)), True, False),
    splitter=(lambda o: learner(splitter=o), halves, in_one),
    wd=(lambda o: learner(wd=o), 0.1, 0.2),
    wd_bn_bias=(lambda o: learner(wd_bn_bias=o), True, False),
    train_bn=(lambda o: learner(train_bn=o), True, False),
    moms=(lambda o: learner(moms=o), (0.95, 0.85, 0.95), (0.9, 0.8, 0.9)),
    drop_last=(lambda o: learner(dls=loaders(drop_last=o)), True, False),
    transform=(lambda o: learner(dls=loaders(after_batch=partial(scaled, by=o))), 1.0, 2.0),
    items=(lambda o: learner(dls=loaders(first=o)), 0, 1),
    metric=(lambda o: learner(cbs=EarlyStoppingCallback(monitor=o)), "accuracy", "valid_loss"),
)


@pytest.mark.parametrize("name", PAIRS)
def test_one_setting_makes_another_configuration(name):
    make, one, other = PAIRS[name]
    learn = make(one)
    assert both(learn, make(other)), f"{name} isn't compared"
    assert not both(learn, make(one)), f"{name}: the same configuration seems to be another"


@pytest.mark.parametrize(
    "old, new, word",
    [
        (
            dict(loss_func=CrossEntropyLossFlat(label_smoothing=0.1)),
            dict(loss_func=CrossEntropyLossFlat()),
            "loss.func.label_smoothing was 0.1 and is now 0.0",
        ),
        (
            dict(cbs=GradientAccumulation(16)),
            dict(cbs=GradientAccumulation(64)),
            "callbacks.GradientAccumulation.n_acc was 16 and is now 64",
        ),
        (
            dict(opt_func=partial(Adam, decouple_wd=True)),
            dict(opt_func=partial(Adam, decouple_wd=False)),
            "opt.function.keywords.decouple_wd was True",
        ),
        (dict(p=0.1), dict(p=0.2), "model.3 was Dropout"),
    ],
)
def test_another_configurations_result_and_checkpoint_are_refused(tmp_path, old, new, word):
    def learner(p=0.0, **kwargs):
        return globals()["learner"](model=net(p), **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(lambda: learner(**old), tmp_path, 2, cbs=[PowerCut(0)]).train()
    with pytest.raises(ValueError, match=f"a-seed0.pt comes from another configuration: .*{word}"):
        run(lambda: learner(**new), tmp_path, 2).train()
    run(lambda: learner(**old), tmp_path, 2).train()
    words = f"a-seed0.json comes from another configuration: .*{word}"
    with pytest.raises(ValueError, match=words):
        run(lambda: learner(**new), tmp_path, 2).train()
    assert run(lambda: learner(**old), tmp_path, 2).train().logp is None, "its own result is taken"


def test_the_way_of_training_is_compared(tmp_path):
    def flat(rate):
        return lambda learn, epochs, lr, start_epoch, cbs: learn.fit(
            epochs, lr * rate, start_epoch=start_epoch, cbs=cbs
        )

    run(learner, tmp_path, 1, fit_func=flat(1.0)).train()
    with pytest.raises(ValueError, match="schedule.uses.rate was 1.0 and is now 2.0"):
        run(learner, tmp_path, 1, fit_func=flat(2.0)).train()


def test_a_name_that_differs_stands_for_its_details():
    "Or a table would say that two runs differ in many settings where it's one."
    from sota_course.training.progressive import Progressive, Stage

    def config(cbs=None, fit_func=None, loss=None):
        return run(None, fit_func=fit_func)._config(learner(loss, cbs=cbs))

    assert list(differences(config(), config(cbs=MixUp(0.4)))) == ["callbacks"]
    assert list(differences(config(), config(loss=SmoothCrossEntropy(0.1)))) == ["loss"]

    def stages(size, get_dls=loaders):
        return Progressive([Stage(size, epochs=1, bs=8), Stage(8, epochs=2, bs=8)], get_dls=get_dls)

    a, b = stages(4), stages(6)
    assert list(differences(config(), config(fit_func=a))) == ["stages"]
    assert list(differences(config(fit_func=b), config(fit_func=a))) == ["stages"]
    other = stages(4, get_dls=lambda **kwargs: loaders())
    found = differences(config(fit_func=a), config(fit_func=other))
    assert found and all(o.startswith("schedule.get_dls") for o in found)


def test_what_was_used_before_is_the_same_configuration(tmp_path):
    """Loaders, callbacks and metrics that several learners share hold what the last training left
    in them."""
    from fastai.metrics import F1Score

    dls = loaders()
    cbs = [GradientAccumulation(16), MixUp(0.4), EarlyStoppingCallback(patience=9)]
    metric = F1Score(average="macro")

    def make():
        return Learner(
            dls, net(), loss_func=CrossEntropyLossFlat(), cbs=cbs, metrics=[accuracy, metric]
        )

    first = run(make, tmp_path, 1, seeds=(0, 1)).train()
    assert not differences(first.results[0].config, first.results[1].config)
    assert run(make, tmp_path, 1, seeds=(0, 1)).train().logp is None


def test_what_was_used_before_in_fastais_pipeline(tmp_path):
    from sota_course.data import get_data, get_dls

    dls = get_dls(
        20,
        32,
        get_data("drawn", n_train=40, n_val=20, progress=False),
        pipeline="fastai",
        num_workers=0,
        progress=False,
    )

    def made(dls):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        return describe(Learner(dls, model, loss_func=CrossEntropyLossFlat()))

    before = made(dls)
    dls.one_batch()
    assert not differences(before, made(dls))
    other = dls.remake(min_scale=0.5)
    assert list(differences(before, made(other))) == ["min_scale"]
    other.after_batch.fs[1].max_lighting = 0.3
    other.args["min_scale"] = 0.75
    assert differences(before, made(other))


def with_global(value, code="def f(p, y): return base(p, y)"):
    "A function as a notebook has it, which uses the global `base`."
    there = dict(__name__="__main__", nn=nn, base=value)
    exec(code, there)
    return there["f"]


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, p, y):
        return nn.functional.cross_entropy(p * self.by, y)

    def scale(self, p, y):
        return self(p, y)


def local_class(k):
    class Local:
        inner = Scale(k)
        names = {k}

    return Local


GLOBALS = dict(
    loss=lambda k: nn.CrossEntropyLoss(label_smoothing=k / 10),
    fastais_loss=lambda k: CrossEntropyLossFlat(label_smoothing=k / 10),
    object=Scale,
    set=lambda k: {k, 0},
    frozen=lambda k: frozenset([k]),
    bytes=lambda k: bytes([k]),
    none=lambda k: None if k == 1 else 2,
    bound=lambda k: Scale(k).scale,
    a_class=local_class,
    importable=lambda k: (nn.functional.mse_loss, nn.functional.l1_loss)[k - 1],
    importable_class=lambda k: (nn.L1Loss, nn.MSELoss)[k - 1],
    module=lambda k: (math, json)[k - 1],
    nested=lambda k: with_global(Scale(k)),
)


@pytest.mark.parametrize("name", GLOBALS)
def test_a_global_that_a_function_uses_is_compared(name):
    one, same, other = (as_settings(with_global(GLOBALS[name](k))) for k in (1, 1, 2))
    assert one == same and one != other


def test_a_global_that_cant_be_described_is_refused():
    with pytest.raises(ValueError, match="lock can't be described"):
        as_settings(with_global(threading.Lock()))
    attribute = with_global(threading.Lock(), "def f(p, y): return p.base")
    assert as_settings(attribute), "an attribute of that name is no global"


class Fading(Callback):
    def __init__(self, start):
        self.p = start

    def after_epoch(self):
        self.p *= 0.5


class FadingByName(Callback):
    def __init__(self, **kwargs):
        self.__dict__.update(kwargs)

    def after_epoch(self):
        self.p *= 0.5


class FadingByPlace(Callback):
    def __init__(self, *args):
        self.p = args[0]

    def after_epoch(self):
        self.p *= 0.5


class FadingByDetour(Callback):
    def __init__(self, start):
        first = start * 2
        self.p = first

    def after_epoch(self):
        self.p *= 0.5


class SetLater(Callback):
    def set(self, p):
        self.p = p
        return self


class Book(fastai.callback.training.GradientAccumulation):
    def __init__(self, start):
        super().__init__(16)
        self.count = start


MAKERS = dict(
    argument=Fading,
    kwargs=lambda p: FadingByName(p=p),
    args=FadingByPlace,
    detour=FadingByDetour,
    setter=lambda p: SetLater().set(p),
    of_fastai=Book,
)


@pytest.mark.parametrize("name", MAKERS)
def test_what_an_object_starts_with_is_compared(name):
    one, same, other = (as_settings(MAKERS[name](p)) for p in (0.1, 0.1, 0.2))
    assert one == same and one != other


def test_what_training_changed_in_a_shared_object_is_refused_by_its_name(tmp_path):
    cb = Fading(0.1)
    run(lambda: learner(cbs=cb), tmp_path, 1).train()
    with pytest.raises(ValueError, match="callbacks.Fading.p was 0.1 and is now 0.025"):
        run(lambda: learner(cbs=cb), tmp_path, 1).train()
    assert run(lambda: learner(cbs=Fading(0.1)), tmp_path, 1).train().logp is None


def drawn(init):
    model = net()
    init(model[0].weight)
    return model


def test_other_initial_weights_are_refused(tmp_path):
    def one():
        return learner(model=drawn(nn.init.kaiming_normal_))

    def other():
        return learner(model=drawn(nn.init.normal_))

    done = run(one, tmp_path, 1, seeds=(0, 1)).train()
    renamed = Result(**vars(done.results[1]) | dict(name="b"))
    assert compare([done.results[0]], [renamed]).differing() == set()
    with pytest.raises(ValueError, match="a-seed0.json comes from .*: weights was .* and is now"):
        run(other, tmp_path, 1, seeds=(0, 1)).train()
    assert run(one, tmp_path, 1, seeds=(0, 1)).train().logp is None
    (tmp_path / "a-seed0.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(one, tmp_path, 2, cbs=[PowerCut(0)]).train()
    with pytest.raises(ValueError, match="a-seed0.pt comes from .*: weights was .* and is now"):
        run(other, tmp_path, 2).train()


class Locked(Callback):
    def __init__(self):
        self.lock = threading.Lock()


def test_what_cant_be_described_is_refused_before_training(tmp_path):
    words = "callbacks.Locked of this run can't be recorded: a lock can't be described"
    with pytest.raises(ValueError, match=words):
        run(lambda: learner(cbs=Locked()), tmp_path).train()
    assert not list(tmp_path.iterdir())
    # Without a folder there is nothing to mistake it for.
    assert run(lambda: learner(cbs=Locked()), epochs=1).train().results


def test_a_file_of_an_earlier_version_says_so(tmp_path):
    run(learner, tmp_path, 1).train()
    file = tmp_path / "a-seed0.json"
    old = json.loads(file.read_text())
    del old["config"]["settings"]
    file.write_text(json.dumps(old))
    words = "an earlier version wrote it, which didn't record the settings"
    with pytest.raises(ValueError, match=words):
        run(learner, tmp_path, 1).train()
    assert Result.load(file).accuracy == old["accuracy"]


@pytest.mark.parametrize("folder", ["mixup-short", "normalize", "drawn-64"])
def test_committed_results_can_be_read_and_compared(folder):
    table = compare(*load_results(folder).values())
    assert len(table.table) and "settings" not in table.differing()


def test_old_and_new_results_side_by_side():
    def stored(name, **config):
        return Result(name, 0, dict(loss="A", **config), [], 0.5, 1.0, 0.1, 1.0, 1.0)

    old = stored("old")
    new = stored("new", settings=dict(loss=dict(eps=0.1)))
    other = stored("other", settings=dict(loss=dict(eps=0.2)))
    both = compare([old], [new])
    assert not both.differing() and "doesn't know" in both.caveats()
    assert compare([new], [other]).differing() == {"loss.eps"}


def test_a_model_that_was_trained_is_not_a_start():
    "Each seed would go on from the weights of the one before."
    model = net()
    with pytest.raises(ValueError, match="a model that was trained before"):
        run(lambda: learner(model=model), seeds=(0, 1), epochs=1).train()


# Every argument of every class


def classes(module, base):
    found = [o for _, o in inspect.getmembers(module, inspect.isclass)]
    found = [o for o in found if issubclass(o, base) and o is not base]
    return [o for o in found if not o.__name__.startswith("_")]


TORCH_LOSSES = [o for o in classes(torch.nn.modules.loss, nn.Module) if o.__name__.endswith("Loss")]
LOSSES = [
    *[o for o in TORCH_LOSSES if o.__name__ != "LinearCrossEntropyLoss"],
    *[getattr(fastai.losses, o) for o in fastai.losses.__all__ if o != "BaseLoss"],
    SmoothCrossEntropy,
]
CALLBACKS = [
    *classes(fastai.callback.tracker, Callback),
    *classes(fastai.callback.training, Callback),
    fastai.callback.mixup.MixUp,
    fastai.callback.mixup.CutMix,
    fastai.callback.rnn.RNNRegularizer,
    MixUp,
    CutMix,
    ManifoldMixup,
    ResizeMix,
    RegMixup,
]
FASTAI_NAMES = "SGD RMSProp Adam RAdam QHAdam Larc Lamb ranger".split()
OPTIMIZERS = [getattr(fastai.optimizer, o) for o in FASTAI_NAMES]
TORCH = classes(torch.optim, torch.optim.Optimizer)
TORCH = [o for o in TORCH if o.__name__ not in ("LBFGS", "SparseAdam", "Muon")]
# Values that a class accepts for an argument where its default doesn't show them
SPECIAL = dict(
    reduction=["mean", "sum"],
    amp_mode=["fp16", "bf16"],
    monitor=["valid_loss", "train_loss"],
    comp=[np.less, np.greater],
    p=[1, 2],
    size_average=None,
    reduce=None,
    fname=["model", "best"],
    per=["elem", "batch"],
    draw=["batch", "elem"],
    layers=[["0"], ["1"]],
    loss_scale=[256, 512],
    device=["cpu", "cuda"],
    weight_decouple=[True, False],
    lr=None,
    params=None,
    line_search_fn=None,
    thresh=[0.3, 0.6],
    margin=[0.5, 1.5],
    axis=[-1, 1],
    eps=[0.1, 0.2],
    swap=[True, False],
    distance_function=[nn.functional.pairwise_distance, nn.functional.cosine_similarity],
    betas=[(0.9, 0.99), (0.8, 0.9)],
    etas=[(0.5, 1.2), (0.4, 1.3)],
    step_sizes=[(1e-06, 50.0), (1e-05, 40.0)],
    weight=[torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0])],
    pos_weight=[torch.ones(4), torch.full((4,), 2.0)],
    per_batch=None,
    at_end=None,
    smallest=[0.1, 0.2],
    largest=[0.7, 0.8],
    max_norm=[1.0, 2.0],
    clip=[0.5, 1.0],
    alpha=[0.3, 0.6],
    capturable=None,
    differentiable=None,
    fused=None,
    foreach=[True, False],
    enabled=None,
    n_acc=[16, 64],
    k=[5, 6],
    beta2_decay=[-0.8, -0.7],
    d=[1.0, 2.0],
    maximize=[True, False],
    dampening=[0.0, 0.1],
    init_scale=[2.0**10, 2.0**12],
    growth_interval=[100, 200],
    max_loss_scale=[2.0**20, 2.0**24],
    growth_factor=[2.0, 3.0],
    backoff_factor=[0.5, 0.25],
    nesterov=None,
    momentum=[0.5, 0.9],
)


def arguments(f):
    "name -> the two values that are tried, of every argument that can be chosen"
    found = {}
    for name, p in inspect.signature(f).parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        values = SPECIAL.get(name, p.default)
        if isinstance(values, bool):
            values = [True, False]
        elif isinstance(values, int):
            values = [values + 1, values + 2]
        elif isinstance(values, float):
            values = [values + 0.125, values + 0.25]
        if isinstance(values, list):
            found[name] = values
    return found


def choices(f):
    found = arguments(f)
    if f.__name__ in ("MultiMarginLoss",):
        found["margin"] = [0.5, 1.5]
    if f.__name__ == "BCEWithLogitsLossFlat":
        found.pop("is_2d")  # in the signature, but refused
    if f.__name__ == "Adadelta":
        found["rho"] = [0.8, 0.9]
    if f.__name__ == "Adafactor":
        found["eps"] = [(None, 1e-3), (None, 1e-2)]
    return found


def cases(fs):
    return [(f, name, values) for f in fs for name, values in choices(f).items()]


def in_run(kind, o):
    "What `Run` compares of a loss, a callback or an optimizer."
    found = describe(learner(opt_func=o)) if kind == "opt" else as_settings(o)
    return json.loads(json.dumps(found))


ALL = (
    [("loss", *o) for o in cases(LOSSES)]
    + [("callback", *o) for o in cases(CALLBACKS)]
    + [("opt", *o) for o in cases([*OPTIMIZERS, *TORCH])]
)


def build(kind, f, **kwargs):
    if kind != "opt":
        return f(**kwargs)
    return partial(f, **kwargs) if f in OPTIMIZERS else partial(OptimWrapper, opt=f, **kwargs)


UNUSED = [("NonNativeMixedPrecision", "loss_scale")]  # unless another argument is changed, too


def test_there_are_many_arguments():
    assert len(ALL) > 250
    names = "reduction n_acc decouple_wd label_smoothing patience clip amsgrad".split()
    assert set(names) <= {name for _, _, name, _ in ALL}


@given(st.sampled_from(ALL))
def test_property_an_argument_makes_another_configuration(case):
    _, f, name, _ = case
    assume((f.__name__, name) not in UNUSED)
    a, b = with_each(case)
    assert a != b, f"{f.__name__}({name}=…) isn't compared"
    again, _ = with_each(case)
    assert a == again, f"{f.__name__}({name}=…) differs from itself"


def with_each(case):
    "What is compared where the argument has the one value, and the other."
    kind, f, name, (one, other) = case
    return [in_run(kind, build(kind, f, **{name: o})) for o in (one, other)]


def test_every_argument_makes_another_configuration():
    "The same without drawing: there aren't so many."
    equal = []
    for case in ALL:
        _, f, name, _ = case
        if (f.__name__, name) in UNUSED:
            continue
        a, b = with_each(case)
        if a == b:
            equal.append((f.__name__, name))
    assert equal == []


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda o: st.lists(o) | st.dictionaries(st.text(), o) | st.sets(st.text()),
    max_leaves=8,
)


@given(plain, plain)
def test_property_plain_values_are_told_apart(a, b):
    def same(x):
        return json.dumps(as_settings(x), sort_keys=True)

    assert same(a) == same(a)
    assert json.loads(json.dumps(as_settings(a), allow_nan=False)) == as_settings(a)
    if isinstance(a, (int, str)) and type(a) is type(b) and a != b:
        assert same([a]) != same([b])


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(0, 39),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_property_tensors_are_told_apart(values, i, dtype):
    a = torch.tensor(values, dtype=dtype).nan_to_num()
    b = a.clone()
    b[i % len(b)] = 5.0 if b[i % len(b)] != 5.0 else 6.0
    assert as_settings(a) != as_settings(b)
    assert as_settings(a) == as_settings(a.clone())
    assert as_settings(a) != as_settings(a[None])


SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
import test_runs as t
found = [t.describe(make(one))["settings"] for make, one, _ in t.PAIRS.values()]
print(json.dumps(found + [t.as_settings({{"x", "y", "z", "long", "set"}})]))
"""


def test_another_process_finds_the_same():
    "Whatever the order of its sets and the addresses of its objects."
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "scripts")]
    cmd = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(paths=paths)]

    def started(hash_seed):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        pipe = subprocess.PIPE
        return subprocess.Popen(cmd, stdout=pipe, stderr=pipe, text=True, env=env)

    first, second = (o.communicate(timeout=240) for o in [started("1"), started("2")])
    assert first[0], first[1]
    assert first[0] == second[0] and "0x" not in first[0]
    here = [describe(make(one))["settings"] for make, one, _ in PAIRS.values()]
    assert json.loads(first[0])[:-1] == json.loads(json.dumps(here))


# What a checkpoint holds


def lookahead(*args, **kwargs):
    return fastai.optimizer.Lookahead(SGD(*args, **kwargs), k=3)


OPTS = {o: getattr(fastai.optimizer, o) for o in FASTAI_NAMES} | dict(
    lookahead=lookahead,
    momentum=partial(SGD, mom=0.9),
    lars=partial(fastai.optimizer.Larc, clip=False),
)
OPTS |= {
    f"torch {o}": partial(OptimWrapper, opt=getattr(torch.optim, o))
    for o in (
        "SGD AdamW Adam RMSprop Adagrad NAdam Adamax RAdam Rprop ASGD Adadelta Adafactor".split()
    )
}
WITHOUT_MOMENTUM = ("Adagrad", "Rprop", "ASGD", "Adadelta", "Adafactor")


@pytest.mark.parametrize("name", OPTS)
@pytest.mark.parametrize("batch", [None, 1])
def test_every_optimizer_resumes(tmp_path, name, batch):
    # fastai's one cycle needs a momentum to change
    how = dict(fit_func=flat) if name.split()[-1] in WITHOUT_MOMENTUM else {}
    ends_as_if_undisturbed(lambda: learner(opt_func=OPTS[name]), tmp_path, at=0, batch=batch, **how)


@pytest.mark.parametrize("n", [12, 20, 1000])
@pytest.mark.parametrize("at", [0, 1])
def test_accumulated_gradients_are_kept(tmp_path, n, at):
    ends_as_if_undisturbed(
        lambda: learner(cbs=GradientAccumulation(n), opt_func=partial(SGD, mom=0.9)),
        tmp_path,
        at=at,
    )


class EMA(Callback):
    "A slowly moving copy of the weights, which takes their place at the end."

    order = 2000

    def __init__(self, decay=0.9):
        self.decay, self.shadow = decay, net()

    def before_fit(self):
        self.shadow.load_state_dict(self.model.state_dict())

    def after_step(self):
        for a, b in zip(self.shadow.parameters(), self.model.parameters()):
            a.data.lerp_(b.data, 1 - self.decay)

    def after_fit(self):
        self.model.load_state_dict(self.shadow.state_dict())


class Counted(Callback):
    "The learning rate goes down with what it has counted."

    def __init__(self):
        self.n, self.seen = 0, []

    def before_fit(self):
        self.n, self.seen = 0, []

    def before_batch(self):
        if not self.training:
            return
        self.n += 1
        self.opt.set_hypers(lr=1e-2 / self.n)

    def after_epoch(self):
        self.seen.append(self.n)


class Secret(Callback):
    "As `Counted`, in an object that only it understands."

    class Box:
        n = 0

    def before_fit(self):
        self.box = self.Box()

    def before_batch(self):
        self.box.n += self.training
        self.opt.set_hypers(lr=1e-2 / (1 + self.box.n))


class Hidden(Secret):
    "It says what is in there."

    def state_dict(self):
        return dict(n=self.box.n) if "box" in vars(self) else {}

    def load_state_dict(self, state):
        self.box.n = state["n"]


class Mute(Callback):
    "As `Hidden`, but it says nothing."

    def before_fit(self):
        self.box = Hidden.Box()

    def __init__(self):
        self.box = Hidden.Box()


class Unfreeze(Callback):
    "The first layer joins in the second epoch."

    def before_fit(self):
        self.model[0].requires_grad_(False)

    def before_epoch(self):
        if self.epoch == 1:
            self.model[0].requires_grad_(True)


class Weighted(nn.Module):
    "A loss that changes."

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, pred, y):
        if torch.is_grad_enabled():
            self.scale.mul_(0.9)
        return nn.functional.cross_entropy(pred, y) * self.scale


def flat(learn, epochs, lr, start_epoch, cbs):
    learn.fit(epochs, lr, start_epoch=start_epoch, cbs=cbs)


CHANGING = dict(
    ema=lambda: learner(cbs=EMA()),
    counted=lambda: learner(cbs=Counted()),
    hidden=lambda: learner(cbs=Hidden()),
    unfreeze=lambda: learner(cbs=Unfreeze()),
    loss=lambda: learner(loss_func=Weighted()),
    plateau=lambda: learner(cbs=ReduceLROnPlateau(min_delta=10.0, patience=1)),
    plateau2=lambda: learner(cbs=ReduceLROnPlateau(min_delta=10.0, patience=2, factor=3.0)),
    mixing=lambda: learner(cbs=[MixUp(0.4), CutMix()]),
    book=lambda: learner(cbs=BookCutMix(1.0)),
    bf16=lambda: learner(cbs=fastai.callback.fp16.MixedPrecision("bf16")),
)


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_callbacks_go_on(tmp_path, name, at):
    ends_as_if_undisturbed(CHANGING[name], tmp_path, epochs=4, at=at, fit_func=flat)


@pytest.mark.parametrize("at", [0, 1])
def test_early_stopping_knows_what_it_has_seen(tmp_path, at, capsys):
    whole, _ = ends_as_if_undisturbed(
        lambda: learner(cbs=EarlyStoppingCallback(min_delta=10.0, patience=3)),
        tmp_path,
        epochs=8,
        at=at,
    )
    assert len(whole.results[0].history) == 4


@pytest.mark.parametrize("at", [0, 2])
def test_the_best_model_is_loaded_at_the_end(tmp_path, at, capsys):
    "Also where only that was left to do."
    (tmp_path / "models").mkdir()
    (tmp_path / "runs").mkdir()

    def make():
        return learner(path=tmp_path, cbs=SaveModelCallback(monitor="accuracy", comp=np.less))

    ends_as_if_undisturbed(make, tmp_path / "runs", at=at)


def test_a_callback_that_cant_be_stored_is_named_before_training(tmp_path):
    words = (
        "box of the callback Mute is a Box, which a checkpoint can't hold: "
        "give it methods state_dict and load_state_dict"
    )
    with pytest.raises(ValueError, match=words):
        run(lambda: learner(cbs=Mute()), tmp_path).train()
    with pytest.raises(ValueError, match="NonNativeMixedPrecision keeps weights of its own"):
        run(lambda: learner(cbs=fastai.callback.fp16.NonNativeMixedPrecision()), tmp_path).train()
    assert not list(tmp_path.iterdir())
    assert run(lambda: learner(cbs=Mute()), epochs=1).train().results


def test_what_a_callback_makes_before_the_first_batch_is_looked_at_too(tmp_path):
    with pytest.raises(ValueError, match="box of the callback Secret"):
        run(lambda: learner(cbs=Secret()), tmp_path).train()
    assert not list(tmp_path.iterdir())


def test_vision_learner(tmp_path):
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18

    def make():
        return vision_learner(
            loaders(),
            resnet18,
            n_out=4,
            pretrained=False,
            normalize=False,
            loss_func=CrossEntropyLossFlat(),
            metrics=accuracy,
        )

    ends_as_if_undisturbed(make, tmp_path, epochs=2)
    config = Result.load(tmp_path / "a-seed0.json").config
    assert config["arch"] == "resnet18" and config["settings"]["learner"]["pretrained"] is False


def test_discriminative_learning_rates(tmp_path):
    def make():
        return learner(splitter=halves)

    ends_as_if_undisturbed(make, tmp_path)
    rates = slice(1e-4, 1e-2)
    with pytest.raises(ValueError, match="lr was 0.01 and is now"):
        Run("a", make, 3, rates, [0], tmp_path).train()
    assert Run("b", make, 1, rates, [0], tmp_path, progress=False).train().results


# What a kill leaves


def forked(f):
    """What becomes of a process that calls `f`: its exit code as `subprocess` has it, and its
    output."""
    with tempfile.TemporaryFile("w+") as out:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = (open(o, "w", closefd=False) for o in (1, 2))
            code = 1
            try:
                code = f()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code or 0)
        status = os.waitpid(pid, 0)[1]
        out.seek(0)
        return os.waitstatus_to_exitcode(status), out.read()


def killed(folder, at):
    """A run in another process, which is killed in the middle of its write number `at`; at 0,
    between result and end."""
    write, n = runs.write_whole, [0]

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(part):
        part.write_bytes(b"half a file")
        die()

    def counting(path, fill):
        n[0] += 1
        write(path, half if n[0] == at else fill)

    def child():
        runs.write_whole = checkpoints.write_whole = counting
        if not at:
            Run._tidy = die
        run(learner, folder, 2).train()

    code, said = forked(child)
    assert code == -signal.SIGKILL, said


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")


@forks
@pytest.mark.parametrize("at, left", [(1, []), (2, ["a-seed0.pt"]), (4, ["a-seed0.pt"])])
def test_a_part_of_a_checkpoint_or_a_result_goes_at_the_next_start(tmp_path, at, left):
    killed(tmp_path, at)
    assert sorted(o.name for o in tmp_path.iterdir() if o.suffix != ".part") == left
    assert len(list(tmp_path.glob("*.part"))) == 1
    again = run(learner, tmp_path, 2).train()
    assert [o.name for o in tmp_path.iterdir()] == ["a-seed0.json"]
    assert losses(again) == losses(run(learner, epochs=2).train())


@forks
def test_the_checkpoint_of_a_finished_run_goes_at_the_next_start(tmp_path):
    killed(tmp_path, 0)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["a-seed0.json", "a-seed0.pt"]
    assert run(learner, tmp_path, 2).train().logp is None
    assert [o.name for o in tmp_path.iterdir()] == ["a-seed0.json"]


def test_what_belongs_to_others_stays(tmp_path):
    """A process that lives, another run, another seed, a file that only looks like a part, another
    configuration's checkpoint."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        stay = [
            f"a-seed0.pt.{other.pid}.part",
            f"b-seed0.pt.{gone.pid}.part",
            f"a-seed01.pt.{gone.pid}.part",
            "a-seed0.pt.part",
            "a-seed0.pt.x.part",
            f"a-seed0.pt.{gone.pid}.part.txt",
        ]
        for o in [*stay, f"a-seed0.pt.{gone.pid}.part", f"a-seed0.json.{gone.pid}.part"]:
            (tmp_path / o).write_bytes(b"half")
        run(learner, tmp_path, 1).train()
        assert sorted(o.name for o in tmp_path.iterdir()) == sorted([*stay, "a-seed0.json"])
        with pytest.raises(KeyboardInterrupt):
            run(lambda: learner(wd=0.5), tmp_path / "other", 1, cbs=[PowerCut(0)]).train()
        (tmp_path / "other" / "a-seed0.pt").rename(tmp_path / "a-seed0.pt")
        run(learner, tmp_path, 1).train()
        assert (tmp_path / "a-seed0.pt").exists()
    finally:
        other.kill()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:100],
        lambda b: b"",
        lambda b: b[: len(b) // 2] + bytes(100) + b[len(b) // 2 + 100 : -50],
    ],
)
def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        run(learner, tmp_path, 2, cbs=[PowerCut(0)]).train()
    file = tmp_path / "a-seed0.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="a-seed0.pt is not a checkpoint that can be resumed"):
        run(learner, tmp_path, 2).train()


def test_what_is_damaged_or_anothers_is_a_checkpoint_error(tmp_path):
    "One kind of error to catch, for results and checkpoints alike."
    (tmp_path / "a-seed0.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError):
        run(learner, tmp_path, 1).train()
    (tmp_path / "a-seed0.pt").unlink()
    run(learner, tmp_path, 1).train()
    with pytest.raises(CheckpointError):
        run(lambda: learner(wd=0.5), tmp_path, 1).train()
    (tmp_path / "a-seed0.json").write_text("{}")
    with pytest.raises(CheckpointError):
        run(learner, tmp_path, 1).train()


# Signals at any moment


@pytest.fixture
def handlers():
    "The handlers are the same before and after."
    before = {o: signal.getsignal(o) for o in (signal.SIGINT, signal.SIGTERM)}
    yield before
    after = {o: signal.getsignal(o) for o in before}
    for k, o in before.items():
        signal.signal(k, o)
    assert after == before


SIGNALS = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_a_signal_on_the_way_in_or_out(handlers, signum, monkeypatch):
    "It comes in the middle of each call that puts a handler in place or away."
    install, found = signal.signal, []
    for at in range(1, 5):
        n, sent = [0], []

        def interrupted(*args):
            result = install(*args)
            n[0] += 1
            # The system's own handler would end the process.
            if n[0] == at and callable(signal.getsignal(signum)):
                sent.append(at)
                signal.raise_signal(signum)
            return result

        monkeypatch.setattr(signal, "signal", interrupted)
        try:
            with Stopper():
                pass
            assert not sent, f"the signal was lost at {at}"
        except KeyboardInterrupt:
            found += sent
        finally:
            monkeypatch.setattr(signal, "signal", install)
        assert {o: signal.getsignal(o) for o in handlers} == handlers, at
    assert found == ([1, 2, 3, 4] if signum == signal.SIGINT else [2])


@forks
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("gap", [0, 0.001])
@SIGNALS
def test_more_signals_dont_disturb_a_process_that_ends(signum, gap, running):
    def fire():
        for _ in range(30):
            os.kill(os.getpid(), signum)
            time.sleep(gap)

    def child():
        thread = threading.Thread(target=fire)
        try:
            with Stopper(ending=True) as stopper:
                if running:
                    stopper.before_fit()
                thread.start()
                for _ in range(10_000):
                    sum(range(1000))
        except Stopped as e:
            thread.join()
            print("said")
            return 128 + e.signum

    code, said = forked(child)
    assert code == 128 + signum and said.endswith("said\n") and "Traceback" not in said, said


@SIGNALS
def test_the_second_and_the_third_are_obeyed_at_once(handlers, signum):
    "Also while the exception of the one before is on its way."
    with pytest.raises(Stopped) as stopped:
        with Stopper() as stopper:
            stopper.before_fit()
            signal.raise_signal(signum)
            try:
                signal.raise_signal(signum)
            finally:
                signal.raise_signal(signum)
    assert stopped.value.signum == signum


@SIGNALS
def test_a_signal_while_a_checkpoint_is_written(tmp_path, handlers, signum, monkeypatch):
    "The first lets it be finished, the second ends it at once; the old one stays whole."
    save, n = torch.save, [0]

    def interrupted(state, path):
        n[0] += 1
        Path(path).write_bytes(b"half a file")
        for _ in range({2: 1, 4: 2}.get(n[0], 0)):
            signal.raise_signal(signum)
        save(state, path)

    monkeypatch.setattr(torch, "save", interrupted)
    for rows in (1, 1):
        with pytest.raises(Stopped), Stopper() as stopper:
            run(learner, tmp_path, 3, cbs=[stopper]).train()
        assert [o.name for o in tmp_path.iterdir()] == ["a-seed0.pt"]
        assert len(load_checkpoint(tmp_path / "a-seed0.pt")["history"]) == rows
        n[0] = 3
    monkeypatch.setattr(torch, "save", save)
    assert losses(run(learner, tmp_path, 3).train()) == losses(run(learner).train())


def test_outside_the_main_thread(handlers):
    "There is no say over signals, but a stop can be asked for."
    found = []

    def work():
        try:
            with Stopper() as stopper:
                stopper.before_fit()
                stopper.stop()
                found.append("this batch is finished")
                stopper.after_batch()
                found.append("this one is never begun")
        except Stopped:
            found.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["this batch is finished", "stopped"]


def test_one_stopper_serves_twice(handlers):
    stopper = Stopper()
    for _ in range(2):
        with pytest.raises(Stopped), stopper:
            signal.raise_signal(signal.SIGTERM)
    with stopper:
        stopper.after_batch()


# fastai's own preview of what callbacks do


def test_a_preview_of_the_events(tmp_path):
    history = History()
    cbs = [EpochSeeds(0), history, Checkpoint(tmp_path / "a.pt", {}, history), Stopper()]
    with learner(cbs=cbs).no_bar() as learn:
        with learn:
            learn.epoch, learn.training, learn.dl = 0, True, learn.dls.train
            learn._split(learn.dls.one_batch())
            learn("before_train")
            learn("before_batch")
    assert not history.rows and not list(tmp_path.iterdir())
    learn = learner(cbs=cbs)
    learn("before_epoch")
    learn.epoch, learn.dl = 0, learn.dls.train  # fastai's own callbacks need them
    learn._split(learn.dls.one_batch())
    with learn.no_bar():
        for event in ("before_train", "before_batch"):
            learn(event)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
    assert not history.rows and not list(tmp_path.iterdir())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert len(history.rows) == 1 and (tmp_path / "a.pt").exists()


# Numbers that aren't


def strict(text):
    def refuse(o):
        raise AssertionError(f"{o} is no JSON")

    return json.loads(text, parse_constant=refuse)


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(
    numbers,
    numbers,
    st.lists(st.dictionaries(st.sampled_from(["train_loss", "a/b", "0"]), numbers)),
    st.dictionaries(st.text(), numbers | st.lists(numbers)),
)
def test_property_a_result_is_json_and_comes_back(nll, ece, history, extra):
    result = Result("x", 0, dict(lr=0.1), history, 0.5, nll, ece, 1.0, 1.0, extra=extra)
    with tempfile.TemporaryDirectory() as d:
        file = result.save(Path(d) / "x.json")
        strict(file.read_text())
        assert repr(Result.load(file)) == repr(result)


def test_a_run_that_diverges(tmp_path):
    def make():
        return learner(opt_func=SGD)

    done = Run("a", make, 2, 1e30, [0], tmp_path, progress=False).train()
    stored = strict((tmp_path / "a-seed0.json").read_text())
    assert stored["nll"] is None
    assert stored["accuracy"] is None
    assert ["nll"] in [o[0] for o in stored["not_finite"]]
    again = Run("a", make, 2, 1e30, [0], tmp_path, progress=False).train().results[0]
    assert math.isnan(again.nll)
    assert math.isnan(again.accuracy)
    assert repr(again) == repr(done.results[0])
    assert "nan" in str(compare([again])).lower()


def test_older_files_with_nan_can_be_read(tmp_path):
    from dataclasses import asdict

    result = Result("x", 0, {}, [], 0.5, math.nan, math.inf, 1.0, 1.0)
    (tmp_path / "x.json").write_text(json.dumps(asdict(result)))
    assert repr(Result.load(tmp_path / "x.json")) == repr(result)


def test_values_of_numpy_and_torch_are_stored(tmp_path):
    extra = dict(a=np.float32(0.5), b=torch.tensor([1.0, math.nan]), c=np.int64(3), d=(1, 2))
    result = Result("x", 0, {}, [], 0.5, 1.0, 1.0, 1.0, 1.0, extra=extra)
    again = Result.load(result.save(tmp_path / "x.json"))
    assert repr(again.extra) == repr(dict(a=0.5, b=[1.0, math.nan], c=3, d=[1, 2]))


def test_undefined_predictions_have_no_accuracy():
    scores = score(torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.long))
    assert scores and all(math.isnan(o) for o in scores.values())


NO_RATES = [math.nan, math.inf, -math.inf, -1, 0, "a", None, True, 1j]
NO_RATES += [slice(None), slice(1e-4, math.nan)]
NO_SEEDS = [[0.0], [1.5], ["0"], [None], [True], [-1], [2**32], "0"]
# The argument, its values, and what is said of each.
NONSENSE = [
    ("lr", NO_RATES, "lr, the learning rate, is a number above 0"),
    ("epochs", [1.0, 2.5, math.nan, True, "3", None], "epochs is a whole number"),
    ("epochs", [0, -1], "at least one epoch"),
    ("seeds", NO_SEEDS, "a seed is a whole number"),
    ("seeds", [[1, 1], (0, 1, 0), [1, np.int64(1)]], "there twice"),
    ("seeds", [3], "seeds are several whole numbers"),
    ("seeds", [[]], "at least one seed"),
]


@pytest.mark.parametrize(
    "name, value, word", [(name, o, word) for name, values, word in NONSENSE for o in values]
)
def test_nonsense_is_refused_with_a_sentence(name, value, word):
    with pytest.raises(ValueError, match=word) as error:
        Run("a", None, **{name: value})
    assert "\n" not in str(error.value)


def test_whole_numbers_of_other_types_will_do():
    made = Run("a", None, np.int64(2), np.float32(1e-3), np.arange(3))
    assert made.seeds == [0, 1, 2] and type(made.epochs) is int and type(made.seeds[0]) is int


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]
)
def test_scores_of_labels_of_every_type(dtype):
    logp = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).double().log()
    right = score(logp, torch.tensor([0, 1, 1]))
    assert score(logp, torch.tensor([0, 1, 1]).to(dtype)) == right
    assert right["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "targets, error",
    [
        (torch.tensor([0.0, 1.0]), TypeError),
        (torch.tensor([True, False]), TypeError),
        (torch.tensor([0, 2]), ValueError),
    ],
)
def test_scores_of_what_is_no_class(targets, error):
    with pytest.raises(error, match="class|classes"):
        score(torch.zeros(2, 2).log_softmax(1), targets)


def scaled_loaders(scale):
    "Batches that differ in their values alone."
    pairs = [(scale * torch.ones(2), torch.tensor(i % 2)) for i in range(4)]
    return DataLoaders.from_dsets(pairs, pairs, bs=2, num_workers=0)


@pytest.mark.parametrize("pick", [lambda o: o, lambda o: o.train], ids=["loaders", "one loader"])
def test_other_loaders_make_another_configuration(pick):
    "Those that a loss looks at, beside the learner's own."

    def loss_with(data):
        def loss(pred, y):
            return nn.functional.cross_entropy(pred, y) + 0 * len(data)

        return as_settings(loss)

    assert loss_with(pick(scaled_loaders(1.0))) == loss_with(pick(scaled_loaders(1.0)))
    assert loss_with(pick(scaled_loaders(1.0))) != loss_with(pick(scaled_loaders(2.0)))


def test_another_learner_is_refused_and_its_own_is_not():
    def learner(loss_func):
        return Learner(scaled_loaders(1.0), nn.Linear(2, 2), loss_func=loss_func)

    teacher = learner(nn.CrossEntropyLoss())

    def distil(pred, y):
        return nn.functional.cross_entropy(pred, y) + 0 * teacher.lr

    with pytest.raises(ValueError, match="another Learner can't be described"):
        as_settings(distil)
    assert "undescribed" in describe(learner(distil))["settings"]["loss"]
    teacher.loss_func = distil
    assert "undescribed" not in describe(teacher)["settings"]["loss"]
