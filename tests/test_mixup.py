"""Mixing from the outside: every type and layout of images, every kind of loss, the traps of the
peers, and callbacks in a learner."""

import copy
import importlib.util
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import Learner  # with its lr_find
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.layers import ResBlock
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLoss,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from fastai.data.transforms import Normalize
from fastai.vision.core import TensorImage, imagenet_stats
from fastai.vision.data import ImageDataLoaders
from hypothesis import given, strategies as st
from PIL import Image
from torch import nn

from sota_course.course.exercises import check
from sota_course.label_smoothing import SmoothCrossEntropy
from sota_course.mixed_loss import mixed_loss
from sota_course.mixup import (
    blend,
    box_weights,
    cutmix,
    mixup,
    mixup_targets,
    one_hot,
    paste,
    rand_boxes,
    sample_lam,
)
from sota_course.training.mixing import CutMix, ManifoldMixup, MixUp, mixable_layers
from sota_course.training.mixup_variants import RegMixup, ResizeMix, patch_boxes, resizemix
from sota_course.training.settings import describe

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def peer(name):
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} isn't installed")


def batch(n=6, size=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.rand(n, 3, size, size, generator=g).to(dtype),
        torch.randint(4, (n,), generator=g),
        torch.rand(n, generator=g),
        torch.randperm(n, generator=g),
    )


# ---- functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_blend_keeps_the_type(dtype):
    x, _, lam, perm = batch(dtype=dtype)
    got, w = blend(x, lam, perm), lam[:, None, None, None].double()
    assert got.dtype == dtype and got.shape == x.shape
    want = w * x.double() + (1 - w) * x[perm].double()
    slack = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    assert torch.allclose(got.double(), want, atol=slack)


@given(n=st.integers(0, 9), size=st.integers(1, 5), seed=st.integers(0, 1000), fold=st.booleans())
def test_blend_is_convex_and_leaves_its_input(n, size, seed, fold):
    x, *_, perm = batch(n, size, seed=seed)
    before, lam = x.clone(), sample_lam(n, 0.5, fold=fold)
    got = blend(x, lam, perm)
    assert torch.equal(x, before)
    assert got.data_ptr() != x.data_ptr() or not n
    assert (got >= torch.minimum(x, x[perm]) - 1e-6).all()
    assert (got <= torch.maximum(x, x[perm]) + 1e-6).all()


@given(n=st.integers(1, 9), classes=st.integers(1, 12), seed=st.integers(0, 1000))
def test_targets_are_probabilities(n, classes, seed):
    g = torch.Generator().manual_seed(seed)
    t = mixup_targets(
        torch.randint(classes, (n,), generator=g),
        torch.rand(n, generator=g),
        torch.randperm(n, generator=g),
        classes,
    )
    assert t.shape == (n, classes)
    assert (t >= 0).all()
    assert (t <= 1).all()
    assert torch.allclose(t.sum(1), torch.ones(n), atol=1e-6)


SLACK = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}
anything = given(
    n=st.integers(0, 7),
    size=st.integers(1, 6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(list(SLACK)),
    last=st.booleans(),
    undefined=st.booleans(),
)


def some(n, size, seed, dtype, last, undefined):
    "Images of any type, channels first or last, perhaps none, perhaps with one undefined number."
    x, y, lam, perm = batch(n, size, dtype, seed)
    if last:
        x = x.to(memory_format=torch.channels_last)
    if undefined and n:
        x[seed % n, 0, 0, 0] = torch.nan
    return x, y, lam, perm


@anything
def test_mixup_of_anything(**case):
    x, y, lam, perm = some(**case)
    before, (images, targets) = x.clone(), mixup(x, y, lam, perm, 4)
    w = lam[:, None, None, None].double()
    assert images.dtype == x.dtype
    assert images.stride() == torch.empty_like(x).stride()
    assert torch.equal(x.nan_to_num(-1), before.nan_to_num(-1))
    want = w * x.double() + (1 - w) * x[perm].double()
    assert torch.allclose(images.double(), want, atol=SLACK[x.dtype], equal_nan=True)
    undefined = x.isnan().any((1, 2, 3))
    assert torch.equal(images.isnan().any((1, 2, 3)), undefined | undefined[perm])
    assert targets.shape == (len(x), 4)
    assert torch.allclose(targets.sum(1), torch.ones(len(x)), atol=1e-5)
    with pytest.raises(TypeError, match="x.float"):
        mixup(torch.zeros(x.shape, dtype=torch.uint8), y, lam, perm, 4)


@anything
def test_cutmix_of_anything(**case):
    """Every pixel is one of the two images', undefined ones among them, and as many as the weight
    says."""
    x, y, lam, perm = some(**case)
    boxes, before = rand_boxes(lam, *x.shape[2:]), x.clone()
    for o in (x, (x.nan_to_num() * 255).byte()):
        images, targets = cutmix(o, y, lam, perm, 4, boxes)
        inside = paste(torch.zeros(o.shape), torch.ones(o.shape), boxes).bool()
        assert images.dtype == o.dtype
        assert torch.equal(
            images.double().nan_to_num(-1), torch.where(inside, o[perm], o).double().nan_to_num(-1)
        )
        share = box_weights(boxes, *o.shape[2:])
        assert torch.allclose(1 - inside.float().flatten(1).mean(1), share, atol=1e-6)
        assert torch.allclose(targets, mixup_targets(y, share, perm, 4))
    assert torch.equal(x.nan_to_num(-1), before.nan_to_num(-1))


@anything
def test_the_mixed_loss_of_anything(**case):
    "Of logits of any type, class numbers and soft targets; what is undefined stays undefined."
    x, y, lam, perm = some(**case)
    logits = x.flatten(1)[:, :4] if x[0:1].numel() >= 4 else x.flatten(1).repeat(1, 4)[:, :4]
    if not len(x):
        logits = x.new_zeros(0, 4)
    each = [F.cross_entropy(logits.double(), o, reduction="none") for o in (y, y[perm])]
    want = (lam * each[0] + (1 - lam) * each[1]).mean()
    for target in (y, one_hot(y, 4, logits.dtype)):
        got = mixed_loss(nn.CrossEntropyLoss(), logits, target, perm, lam)
        assert torch.allclose(got.double(), want, atol=20 * SLACK[logits.dtype], equal_nan=True)


def layouts(x):
    wide = torch.stack([x, x], -1)
    return dict(
        contiguous=x,
        channels_last=x.to(memory_format=torch.channels_last),
        strided=wide[..., 0],
        flipped_axes=x.mT,
        expanded=x[:1].expand_as(x),
        type=TensorImage(x),
    )


@pytest.mark.parametrize("kind", layouts(batch()[0]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_layout(kind, dtype):
    x, y, lam, perm = batch(dtype=dtype)
    x = layouts(x)[kind]
    before = x.clone()
    plain = torch.Tensor(x.float()).contiguous()
    assert torch.allclose(blend(x, lam, perm).float(), blend(plain, lam, perm), atol=2e-3)
    boxes = rand_boxes(lam, *x.shape[2:])
    assert torch.allclose(
        paste(x, x[perm], boxes).float(), paste(plain, plain[perm], boxes), atol=2e-3
    )
    assert torch.equal(x, before)
    if kind == "channels_last":
        assert blend(x, lam, perm).is_contiguous(memory_format=torch.channels_last)


def test_gradients_flow_through_both():
    x, _, lam, perm = batch(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda o: blend(o, lam, perm), x[:, :, :2, :2].clone().requires_grad_()
    )


def test_a_batch_of_one_stays():
    x, y, lam, perm = batch(1)
    assert torch.allclose(mixup(x, y, lam, perm, 4)[0], x)
    assert torch.allclose(mixup(x, y, lam, perm, 4)[1], one_hot(y, 4))
    assert torch.equal(cutmix(x, y, lam, perm, 4)[0], x)


def test_nan_stays_in_its_pair():
    x, _, lam, perm = batch()
    x[2, 0, 0, 0] = torch.nan
    got = blend(x, lam, perm).isnan()
    assert got.sum() == 2 - int(perm[2] == 2) and got[2, 0, 0, 0]


X, Y, LAM, PERM = batch()
UNDEFINED = torch.tensor(torch.nan)
# The error, words of its message, the function, and what it is called with.
BAD = [
    (TypeError, r"x\.float\(\)/255", blend, ((X * 255).byte(), LAM, PERM)),
    (ValueError, "between 0 and 1", blend, (X, LAM + 1, PERM)),
    (ValueError, "between 0 and 1", blend, (X, UNDEFINED, PERM)),
    (ValueError, "one position for each of 6", blend, (X, LAM, PERM[:2])),
    (ValueError, "one for each of 6", blend, (X, LAM[:2], PERM)),
    (ValueError, "pass n_classes", mixup, (X, Y, LAM, PERM)),
    (ValueError, "numbered from 0 to 1", mixup, (X, Y, LAM, PERM, 2)),
    (ValueError, "from 0 to 3, but there are numbers from -1", one_hot, (Y * 0 - 1, 4)),
    (TypeError, "class numbers", one_hot, (LAM, 4)),
    (TypeError, "class numbers", one_hot, (Y > 0, 4)),
    (ValueError, "images", paste, (X[0], X[0], torch.zeros(3, 4))),
    (ValueError, "rectangle", paste, (X, X, torch.zeros(3, 4))),
    (ValueError, "between 0 and 1", cutmix, (X, Y, 1.5, PERM, 4)),
    (ValueError, "between 0 and 1", cutmix, (X, Y, -0.5, PERM, 4)),
    (ValueError, "between 0 and 1", cutmix, (X, Y, UNDEFINED[None], PERM, 4)),
    (ValueError, "between 0 and 1", cutmix, (X, Y, torch.full((6,), 1.5), PERM, 4)),
    (ValueError, "between 0 and 1", rand_boxes, (torch.tensor([1.5]), 8, 8)),
    (ValueError, "between 0 and 1", rand_boxes, (torch.tensor([-0.5]), 8, 8)),
    (ValueError, "between 0 and 1", rand_boxes, (UNDEFINED[None], 8, 8)),
    (ValueError, "a weight for each rectangle", rand_boxes, (torch.tensor(0.5), 8, 8)),
    (ValueError, "lam needs one weight, or one for each of 6", cutmix, (X, Y, LAM[:4], PERM, 4)),
    (ValueError, "perm needs one position for each of 6", cutmix, (X, Y, LAM, PERM[:4], 4)),
    (ValueError, "from 0 up", sample_lam, (3, float("nan"))),
    (ValueError, '"elem" or "batch"', partial(sample_lam, per="pixel"), (3, 1.0)),
]


@pytest.mark.parametrize("error, words, f, args", BAD)
def test_bad_input_is_named(error, words, f, args):
    with pytest.raises(error, match=words):
        f(*args)


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 100.0])
def test_weights_are_beta(alpha):
    torch.manual_seed(0)
    t = sample_lam(20000, alpha)
    assert t.isfinite().all()
    assert abs(t.mean() - 0.5) < 0.02
    assert abs(t.var() - 0.25 / (2 * alpha + 1)) < 0.01
    torch.manual_seed(1)
    first = sample_lam(5, alpha)
    torch.manual_seed(1)
    assert torch.equal(sample_lam(5, alpha), first)


@given(
    lam=st.floats(0, 1),
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    row=st.floats(0, 0.999),
    col=st.floats(0, 0.999),
)
def test_cutmix_counts_pixels(lam, h, w, row, col):
    boxes = rand_boxes(torch.tensor([lam]), h, w, torch.tensor([[int(row * h), int(col * w)]]))
    x, other = torch.zeros(1, 2, h, w, dtype=torch.uint8), torch.ones(1, 2, h, w, dtype=torch.uint8)
    assert torch.allclose(
        box_weights(boxes, h, w), 1 - paste(x, other, boxes).float().mean(), atol=1e-6
    )
    assert not x.any()


@given(seed=st.integers(0, 1000), h=st.integers(1, 12), w=st.integers(1, 12))
def test_only_what_lies_inside_counts(seed, h, w):
    """Rectangles of one's own, beyond the edges or turned inside out: the weight is that of what is
    pasted."""
    boxes = torch.randint(-15, 30, (5, 4), generator=torch.Generator().manual_seed(seed))
    pasted = paste(torch.zeros(5, 1, h, w), torch.ones(5, 1, h, w), boxes).mean((1, 2, 3))
    assert torch.allclose(box_weights(boxes, h, w), 1 - pasted, atol=1e-6)


def test_a_whole_box_and_none():
    assert box_weights(rand_boxes(torch.tensor([1.0]), 9, 7), 9, 7) == 1
    assert box_weights(rand_boxes(torch.tensor([0.0]), 9, 8, torch.tensor([[4, 4]])), 9, 8) == 0


# ---- peers ---------------------------------------------------------------------------------------


def test_as_torchvision():
    from torchvision.transforms import v2

    x, y, *_ = batch()
    perm, box = torch.arange(6).roll(1), (2, 1, 7, 5)  # left, top, right, bottom
    theirs = v2.CutMix(num_classes=4)
    params = dict(labels=y, batch_size=6, box=box, lam_adjusted=1 - 20 / 64)
    boxes = torch.tensor([[1, 5, 2, 7]] * 6)  # top, bottom, left, right
    ours = cutmix(x, y, 0.5, perm, 4, boxes=boxes)
    assert torch.equal(theirs.transform(x, params), ours[0])
    assert torch.allclose(theirs.transform(y, params), ours[1])


@peer("timm")
def test_as_timm_without_its_smoothing():
    from timm.data.mixup import Mixup, mixup_target

    x, y, lam, _ = batch()
    perm = torch.arange(5, -1, -1)
    assert torch.allclose(mixup_target(y, 4, lam[:, None]), mixup_targets(y, lam, perm, 4))
    with pytest.raises(AssertionError):
        Mixup(num_classes=4)(x[:5], y[:5])  # an odd batch, which ours takes
    assert mixup(x[:5], y[:5], lam[:5], torch.randperm(5), 4)[0].shape == (5, 3, 8, 8)


@peer("timm")
@pytest.mark.parametrize("n", [2, 6, 8])
def test_timms_images_with_its_weights_and_what_it_does_to_its_input(n):
    from timm.data.mixup import Mixup

    x, y, lam, _ = batch(n)
    before, perm = x.clone(), torch.arange(n).flip(0)  # timm's partner is the mirror place
    theirs = Mixup(1.0, mode="elem", label_smoothing=0.0, num_classes=4)
    theirs._params_per_elem = lambda size: (lam.numpy().copy(), np.zeros(size, bool))
    ours = mixup(x, y, lam, perm, 4)
    assert torch.equal(x, before)
    images, targets = theirs(x, y)
    assert torch.allclose(images, ours[0], atol=1e-6)
    assert torch.allclose(targets, ours[1], atol=1e-6)
    assert images is x and not torch.equal(x, before)  # in place


@peer("timm")
def test_timms_cutmix_with_its_boxes():
    from timm.data import mixup as timm

    x, y, lam, _ = batch(6, 16)
    np.random.seed(0)
    boxes, adjusted = zip(*[timm.cutmix_bbox_and_lam(x[0].shape, o) for o in lam.tolist()])
    np.random.seed(0)
    theirs = timm.Mixup(0.0, 1.0, mode="elem", label_smoothing=0.0, num_classes=4)
    theirs._params_per_elem = lambda size: (lam.numpy().copy(), np.ones(size, bool))
    boxes = torch.tensor(np.array(boxes))  # rows, then columns, as ours
    assert torch.allclose(
        box_weights(boxes, 16, 16), torch.tensor(adjusted, dtype=torch.float), atol=1e-6
    )
    ours = cutmix(x, y, lam, torch.arange(6).flip(0), 4, boxes)
    images, targets = theirs(x.clone(), y)
    assert torch.equal(images, ours[0]) and torch.allclose(targets, ours[1], atol=1e-6)


@peer("kornia")
def test_as_kornia():
    from kornia.augmentation import RandomMixUpV2

    x, y, lam, perm = batch()
    theirs = RandomMixUpV2(data_keys=["input", "class"]).apply_transform(
        x, dict(mixup_pairs=perm, mixup_lambdas=1 - lam)
    )
    assert torch.allclose(theirs, blend(x, lam, perm), atol=1e-6)


@peer("kornia")
@pytest.mark.parametrize("correct", [False, True])
def test_kornias_cutmix_and_the_weight_it_gives(correct):
    """The same images; by default its weight is the share that was pasted, and with
    `use_correct_lambda` the one that stays."""
    from kornia.augmentation import RandomCutMixV2
    from kornia.constants import DType

    x, y, lam, perm = batch(6, 16)
    boxes = rand_boxes(lam.clamp(max=0.9), 16, 16, torch.full((6, 2), 8))
    top, bottom, left, right = boxes.unbind(1)
    last_row, last_col = bottom - 1, right - 1
    corners = ((left, top), (last_col, top), (last_col, last_row), (left, last_row))
    corners = torch.stack([torch.stack(o, 1) for o in corners], 1).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=correct)
    params = dict(
        mix_pairs=perm[None],
        crop_src=corners[None],
        image_shape=torch.tensor([16, 16]),
        dtype=torch.tensor(DType.get(x.dtype).value),
    )
    assert torch.equal(theirs.apply_transform(x, params), cutmix(x, y, lam, perm, 4, boxes)[0])
    own, partner, weight = theirs.apply_transform_class(y, params, {})[0].unbind(1)
    stays = box_weights(boxes, 16, 16)
    assert torch.equal(own, y.float())
    assert torch.equal(partner, y[perm].float())
    assert torch.allclose(weight, stays if correct else 1 - stays, atol=1e-6)


@peer("kornia")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_class_numbers_beside_images_in_half_precision(dtype):
    """kornia gives class numbers back as floats. Where they have the images' type they are rounded
    to other classes; ours stay integers."""
    from kornia.augmentation import RandomMixUpV2

    x = batch(4, dtype=dtype)[0]
    y = torch.tensor([2049, 4097, 999, 257])
    perm = torch.tensor([1, 0, 3, 2])
    assert not torch.equal(y.to(dtype).long(), y)
    theirs = RandomMixUpV2(data_keys=["input", "class"])(x, y)[1][..., 0]
    assert torch.equal(theirs.long(), y) == (theirs.dtype == torch.float32)  # 0.9 has widened them
    logits, lam = torch.randn(4, 5000, dtype=torch.float64), torch.rand(4)
    want = (
        lam * F.cross_entropy(logits, y, reduction="none")
        + (1 - lam) * F.cross_entropy(logits, y[perm], reduction="none")
    ).mean()
    assert torch.allclose(mixed_loss(nn.CrossEntropyLoss(), logits, y, perm, lam), want, atol=1e-6)
    assert torch.equal(mixup_targets(y, torch.ones(4), perm, 5000).argmax(1), y)
    assert blend(x, lam, perm).dtype == dtype


class Seen:
    "As much of a learner as fastai's callbacks look at."

    training = True

    def __init__(self, x, y):
        self.x, self.y, self.xb, self.yb = x, y, (x,), (y,)


@pytest.fixture
def partners(monkeypatch):
    perm = batch()[3]
    monkeypatch.setattr(torch, "randperm", lambda n, **_: perm)
    return perm


def test_fastais_images_with_its_weights(partners):
    from fastai.callback.mixup import MixUp as Theirs

    x, y, lam, _ = batch()
    cb, before = Theirs(), x.clone()
    cb.learn = Seen(x, y)
    cb.stack_y = True
    cb.distrib = type("", (), dict(sample=lambda self, size: lam))()
    cb.before_batch()
    folded = torch.maximum(lam, 1 - lam)
    assert torch.allclose(cb.lam, folded)
    assert torch.allclose(cb.learn.xb[0], blend(x, folded, partners), atol=1e-6)
    assert torch.equal(x, before)


def test_fastais_cutmix_with_its_box_and_what_it_does_to_its_input(partners):
    from fastai.callback.mixup import CutMix as Theirs

    x, y, *_ = batch()
    ours = cutmix(x, y, 0.5, partners, 4, boxes=torch.tensor([[1, 5, 2, 7]] * 6))
    cb, before = Theirs(), x.clone()
    cb.learn, cb.stack_y = Seen(x, y), True
    cb.rand_bbox = lambda w, h, lam: (2, 1, 7, 5)
    cb.before_batch()
    assert torch.equal(cb.learn.xb[0], ours[0]) and abs(cb.lam - (1 - 20 / 64)) < 1e-6
    assert cb.learn.xb[0] is x and not torch.equal(x, before)  # in place


@pytest.mark.parametrize(
    "kwargs",
    [dict(n=3, bs=1, loss_func=CrossEntropyLossFlat()), dict(loss_func=nn.CrossEntropyLoss())],
)
def test_where_fastais_mixup_fails_and_ours_does_not(kwargs):
    "A batch of one image; and a loss of PyTorch's own."
    from fastai.callback.mixup import MixUp as Theirs

    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    with pytest.raises((IndexError, RuntimeError)):
        fit(learner(Theirs(), model=model(), **kwargs))
    losses = fit(learner(MixUp(), model=model(), **kwargs)).recorder.losses
    assert torch.stack(losses).isfinite().all()


def test_as_fastais_loss():
    from fastai.callback.mixup import MixUp as Theirs

    x, y, lam, perm = batch()
    logits, loss = torch.randn(6, 4), CrossEntropyLossFlat()
    cb = Theirs()
    cb.old_lf, cb.lam, cb.yb1 = loss, lam, (y[perm],)
    cb.learn = type("", (), dict(training=True))()
    theirs, ours = cb.lf(logits, y), mixed_loss(loss, logits, y, perm, lam)
    assert torch.allclose(torch.Tensor(theirs), torch.Tensor(ours), atol=1e-6)


# ---- losses --------------------------------------------------------------------------------------


class NoReduction(nn.Module):
    def forward(self, pred, y):
        return F.cross_entropy(pred, y)


class IndexOnly(nn.Module):
    def forward(self, pred, y):
        return -pred.log_softmax(1)[range(len(y)), y].mean()


W = torch.tensor([0.2, 1.0, 3.0, 0.5])
LOSSES = dict(
    torch=nn.CrossEntropyLoss(),
    fastai=CrossEntropyLossFlat(),
    function=F.cross_entropy,
    smoothed=nn.CrossEntropyLoss(label_smoothing=0.1),
    weighted=nn.CrossEntropyLoss(weight=W),
    fastai_weighted=CrossEntropyLossFlat(weight=W),
    part=partial(F.cross_entropy, weight=W, label_smoothing=0.2),
    both=nn.CrossEntropyLoss(weight=W, label_smoothing=0.1),
    ignoring=nn.CrossEntropyLoss(ignore_index=2),
    ignoring_255=nn.CrossEntropyLoss(weight=W, ignore_index=255),
    sums=nn.CrossEntropyLoss(reduction="sum"),
    items=nn.CrossEntropyLoss(reduction="none"),
    focal=FocalLoss(),
    fastai_smoothed=LabelSmoothingCrossEntropyFlat(),
    bare=NoReduction(),
)


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss(name):
    loss, (_, y, lam, perm) = LOSSES[name], batch()
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    if name == "ignoring_255":
        y = y.where(torch.arange(6) != 3, 255)

    def same(a, b):
        return torch.allclose(torch.Tensor(a), torch.Tensor(b), atol=1e-6)

    assert same(mixed_loss(loss, logits, y, perm, torch.ones(6)), loss(logits, y))
    assert same(mixed_loss(loss, logits, y, perm, torch.zeros(6)), loss(logits, y[perm]))
    one = 0.3 * loss(logits, y) + 0.7 * loss(logits, y[perm])
    assert same(mixed_loss(loss, logits, y, perm, torch.tensor([0.3])), one)
    assert same(mixed_loss(loss, logits, y, perm, torch.full((6,), 0.3)), one)
    # With a weight for each image it doesn't matter whose labels come first.
    other_way = mixed_loss(loss, logits, y[perm], perm.argsort(), 1 - lam)
    assert same(mixed_loss(loss, logits, y, perm, lam), other_way)
    if hasattr(loss, "reduction"):
        assert loss.reduction == {"sums": "sum", "items": "none"}.get(name, "mean")


@pytest.mark.parametrize("name", ["torch", "fastai", "function", "smoothed", "bare"])
def test_losses_or_targets_mixed_is_the_same(name):
    loss, (_, y, lam, perm) = LOSSES[name], batch()
    logits = torch.randn(6, 4)
    targets, eps = mixup_targets(y, lam, perm, 4), getattr(loss, "label_smoothing", 0.0)
    want = F.cross_entropy(logits, targets, label_smoothing=eps)
    got = torch.Tensor(mixed_loss(loss, logits, y, perm, lam))
    assert torch.allclose(got, want, atol=1e-6)


def test_soft_targets_several_labels_and_regression():
    x, y, lam, perm = batch()
    logits, many, soft = torch.randn(6, 4), torch.randint(2, (6, 4)), torch.rand(6, 4).softmax(1)
    for loss, t in (
        (nn.BCEWithLogitsLoss(), many.float()),
        (BCEWithLogitsLossFlat(), many),
        (nn.BCEWithLogitsLoss(pos_weight=W), many),
        (nn.CrossEntropyLoss(), soft),
        (MSELossFlat(), torch.rand(6, 4)),
    ):
        got = torch.Tensor(mixed_loss(loss, logits, t, perm, lam))
        assert torch.allclose(
            got, torch.Tensor(loss(logits, blend(t.float(), lam, perm))), atol=1e-6
        )


def test_pixels_have_classes_too():
    x, _, lam, perm = batch()
    y, pred = torch.randint(4, (6, 8, 8)), torch.randn(6, 4, 8, 8)
    own = torch.stack([F.cross_entropy(p, t) for p, t in zip(pred.split(1), y.split(1))])
    others = torch.stack([F.cross_entropy(p, t) for p, t in zip(pred.split(1), y[perm].split(1))])
    want = (lam * own + (1 - lam) * others).mean()
    assert torch.allclose(mixed_loss(nn.CrossEntropyLoss(), pred, y, perm, lam), want, atol=1e-5)
    assert torch.allclose(
        torch.Tensor(mixed_loss(CrossEntropyLossFlat(axis=1), pred, y, perm, lam)), want, atol=1e-5
    )


def test_losses_that_cannot_be_mixed_by_image():
    x, y, lam, perm = batch()
    with pytest.raises(ValueError, match='IndexOnly has no reduction argument.*per="batch"'):
        mixed_loss(IndexOnly(), torch.randn(6, 4), y, perm, lam)
    with pytest.raises(ValueError, match='FocalLoss averages with class weights.*per="batch"'):
        mixed_loss(FocalLoss(weight=W), torch.randn(6, 4), y, perm, lam)
    assert mixed_loss(FocalLoss(weight=W), torch.randn(6, 4), y, perm, lam[:1]).isfinite()


@pytest.mark.parametrize(
    "make",
    [
        MixUp,
        CutMix,
        ManifoldMixup,
        lambda **k: MixUp(1.0, draw="elem", **k),
        lambda **k: CutMix(1.0, draw="elem", **k),
    ],
)
@pytest.mark.parametrize("loss", [IndexOnly(), FocalLoss(weight=W)])
def test_what_the_error_recommends_works(make, loss):
    losses = fit(learner(make(per="batch"), loss_func=loss)).recorder.losses
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("cb", [MixUp(1.0, per="batch"), CutMix(1.0, per="batch")])
def test_one_weight_for_the_batch_is_one(cb):
    x, *_, perm = batch()
    for _ in range(20):
        got, kept = cb.mix(x, cb.weights(6), perm)
        assert kept.shape == (1,)
        if isinstance(cb, CutMix):
            cut = box_of(got, x)
            want = x if cut is None else paste(x, x[perm], cut.expand(6, 4))
            assert torch.equal(got, want)


def box_of(got, x):
    "The one rectangle in which any of the images changed."
    rows, cols = (torch.where((got != x).any(1).any(0).any(d))[0] for d in (1, 0))
    return torch.tensor([rows[0], rows[-1] + 1, cols[0], cols[-1] + 1]) if len(rows) else None


def test_the_loss_is_given_back_after_an_error():
    loss, (_, y, lam, perm) = nn.CrossEntropyLoss(), batch()
    with pytest.raises(IndexError):
        mixed_loss(loss, torch.randn(6, 4), y + 9, perm, lam)
    assert loss.reduction == "mean"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses(dtype):
    x, y, lam, perm = batch()
    logits = torch.randn(6, 4)
    half, single = (
        mixed_loss(nn.CrossEntropyLoss(), o, y, perm, lam) for o in (logits.to(dtype), logits)
    )
    assert torch.allclose(half.float(), single, atol=3e-2)


@pytest.mark.parametrize(
    "name", ["torch", "fastai", "function", "weighted", "sums", "items", "bare"]
)
def test_the_loss_of_an_empty_batch(name):
    """As the loss has it for no images: undefined for a mean, 0 for a sum, nothing where each
    counts for itself."""
    loss, none, logits = LOSSES[name], torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    got = torch.Tensor(mixed_loss(loss, logits, none, none, torch.zeros(0)))
    want = torch.Tensor(loss(logits, none))
    assert got.shape == want.shape and torch.allclose(got, want, equal_nan=True)


# ---- callbacks -----------------------------------------------------------------------------------


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(144, 4),
    )


def learner(
    cbs=(),
    n=20,
    bs=8,
    loss_func=None,
    y=lambda i: torch.tensor(i % 4),
    x=lambda: torch.rand(3, 8, 8),
    model=None,
    **kwargs,
):
    "Random images in batches of `bs`, the last of which may be smaller."
    torch.manual_seed(0)
    data = [(x(), y(i)) for i in range(n)]
    loaders = [torch.utils.data.DataLoader(data, batch_size=bs) for _ in range(2)]
    return Learner(
        DataLoaders(*loaders, device="cpu"),
        model or net(),
        loss_func or nn.CrossEntropyLoss(),
        cbs=cbs,
        **kwargs,
    )


def fit(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 0.01, **kwargs)
    return learn


KINDS = dict(
    mixup=lambda **k: [MixUp(1.0, **k)],
    cutmix=lambda **k: [CutMix(1.0, **k)],
    manifold=lambda **k: [ManifoldMixup(1.0, **k)],
    two=lambda **k: [MixUp(1.0, **k), CutMix(1.0, **k)],
    by_image=lambda **k: [MixUp(1.0, draw="elem", **k), CutMix(1.0, draw="elem", **k)],
    all=lambda **k: [MixUp(1.0, **k), CutMix(1.0, **k), ManifoldMixup(1.0, **k)],
    per_batch=lambda **k: [MixUp(1.0, per="batch", **k), CutMix(1.0, per="batch", **k)],
)
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("n, bs", [(20, 8), (5, 1), (9, 8), (7, 7)])
def test_any_batch(kind, n, bs):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )
    learn = fit(learner(KINDS[kind](), n, bs, model=model), 2)
    assert torch.stack(learn.recorder.losses).isfinite().all()
    assert learn.recorder.metric_names[:4] == ["epoch", "train_loss", "valid_loss", "unmixed_loss"]
    assert all(len(o) == 3 for o in learn.recorder.values)


@kinds
@pytest.mark.parametrize(
    "loss",
    ["torch", "fastai", "function", "weighted", "both", "part", "focal", "fastai_smoothed", "bare"],
)
def test_callbacks_with_any_loss(kind, loss):
    learn = learner(KINDS[kind](), loss_func=LOSSES[loss])
    before = learn.loss_func
    assert torch.stack(fit(learn).recorder.losses).isfinite().all() and learn.loss_func is before


@kinds
def test_callbacks_with_several_labels(kind):
    learn = learner(
        KINDS[kind](),
        loss_func=nn.BCEWithLogitsLoss(),
        y=lambda i: torch.tensor([1.0, i % 2, 0.0, i % 3 == 0]),
    )
    assert torch.stack(fit(learn).recorder.losses).isfinite().all()


def spied(cbs, **kwargs):
    "The batches that the model and the loss get in an epoch, and those that the data gives."
    seen, given = [], []
    learn = learner(cbs, **kwargs)
    learn.model.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].clone()) if m.training else None
    )
    given = [(x.clone(), y.clone()) for x, y in learn.dls.train]
    fit(learn)
    return learn, seen, given


def test_the_batch_itself_is_mixed_and_never_changed():
    data = torch.rand(8, 3, 8, 8)
    before, batches = data.clone(), [(data, torch.arange(8) % 4)]
    for cb in (MixUp(1.0), CutMix(1.0)):
        dl = torch.utils.data.DataLoader(batches, batch_size=None)
        learn = Learner(DataLoaders(dl, dl, device="cpu"), net(), nn.CrossEntropyLoss(), cbs=cb)
        seen = []
        learn.model.register_forward_pre_hook(
            lambda m, args: seen.append(args[0]) if m.training else None
        )
        fit(learn)
        assert torch.equal(data, before) and not torch.equal(seen[0], data)


def test_partners_are_a_random_permutation():
    """Each image is some image's partner once, and who is whose changes from batch to batch; a
    batch turned around or rolled by one would not do."""
    partners = []

    class Spy(MixUp):
        def mix(self, x, lam, perm):
            partners.append(perm.clone())
            return super().mix(x, lam, perm)

    fit(learner(Spy(1.0), n=400, bs=8))
    assert len(partners) == 50
    assert all(torch.equal(o.sort().values, torch.arange(8)) for o in partners)
    counts = sum(F.one_hot(o, 8) for o in partners)  # image i with partner j: about 50/8 each
    assert (counts > 0).all() and counts.max() < 20
    assert len({tuple(o.tolist()) for o in partners}) > 45
    shifts = {tuple((o - torch.arange(8)).remainder(8).tolist()) for o in partners}
    assert len(shifts) > 45, "and not one shift for all"


def test_each_image_gets_one_of_the_two():
    learn, seen, given = spied([MixUp(1.0, draw="elem"), CutMix(1.0, draw="elem")], n=64, bs=64)
    x, mixed = given[0][0], seen[0]
    own = (mixed == x).flatten(1).float().mean(1)
    # Every pixel from some image: cut.
    exact = torch.stack([((mixed[i] == x[i]) | (mixed[i] == x).any(0)).all() for i in range(64)])
    assert 10 < exact.sum() < 54 and (own[~exact] < 0.5).any()


def test_validation_and_predictions_are_left_alone():
    learn = fit(learner(KINDS["all"]()))
    valid = learn.validate()
    assert len(valid) == 1 and len(learn.metrics) == 0
    preds, y = learn.get_preds(dl=learn.dls.valid)
    with torch.no_grad():
        want = learn.model.eval()(torch.stack([o[0] for o in learn.dls.valid.dataset])).softmax(1)
    assert torch.allclose(F.cross_entropy(want.log(), y), torch.tensor(valid[0]), atol=1e-4)
    assert torch.allclose(preds.softmax(1), want, atol=1e-5)


def test_off_for_the_last_epochs():
    class Spy(MixUp):
        def mix(self, x, lam, perm):
            epochs.add(self.epoch)
            return super().mix(x, lam, perm)

    for off, want in ((0, {0, 1, 2, 3}), (1, {0, 1, 2}), (3, {0}), (9, set())):
        epochs = set()
        fit(learner(Spy(1.0, off_last=off)), 4)
        assert epochs == want


def test_a_share_of_the_batches():
    _, seen, given = spied(MixUp(1.0, p=0.5), n=400, bs=4)
    same = sum(torch.allclose(a, b) for s, (g, _) in zip(seen, given) for a, b in zip(s, g))
    assert 150 < same < 330  # a quarter of the rest are their own partners
    _, seen, given = spied(MixUp(1.0, p=0.0))
    assert all(torch.equal(a, b) for a, (b, _) in zip(seen, given))


def test_unmixed_loss_is_the_loss_of_unmixed_images():
    class Before(MixUp):
        def before_batch(self):
            if not self.iter:
                states.append(copy.deepcopy(self.model))
            super().before_batch()

    states = []
    learn = fit(learner(Before(1.0, compare_every=1), n=8, bs=8))
    x, y = next(iter(learn.dls.train))
    want = F.cross_entropy(states[0].eval()(x), y).item()
    assert abs(learn.recorder.values[0][2] - want) < 1e-5


def test_unmixed_loss_counts_images_not_batches():
    "Nine images in batches of eight: the second batch is one image, and the model doesn't change."
    learn = learner(MixUp(1.0, compare_every=1), n=9, bs=8)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.0)
    (cb,) = learn.cbs.filter(lambda o: isinstance(o, MixUp))
    assert [n for _, n in cb.compared] == [8, 1]
    assert abs(cb.compared[0][0] - cb.compared[1][0]) > 1e-3
    want = (8 * cb.compared[0][0] + cb.compared[1][0]).item() / 9
    assert abs(learn.recorder.values[0][2] - want) < 1e-6


def test_comparing_changes_nothing_but_the_record():
    def run(every):
        learn = learner([Freeze(), MixUp(1.0, compare_every=every)])
        torch.manual_seed(3)
        return fit(learn)

    class Freeze(Callback):
        "A part of the model that stays in evaluation mode, as fastai's before_train would undo."

        def before_train(self):
            self.model[1].eval()

        def after_batch(self):
            if self.training:
                modes.append((self.model.training, self.model[1].training))

    modes = []
    a, b = run(0), run(1)
    assert set(modes) == {(True, False)}
    fresh = learner().model.state_dict()
    assert torch.equal(b.model.state_dict()["1.running_mean"], fresh["1.running_mean"])
    assert "unmixed_loss" not in a.recorder.metric_names
    assert "unmixed_loss" in b.recorder.metric_names
    for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()):
        assert torch.equal(p, q)


def test_an_interrupted_training_leaves_no_trace():
    class Stop(MixUp):
        def after_loss(self):
            raise KeyboardInterrupt

    learn = learner(Stop(1.0))
    loss = learn.loss_func
    with pytest.raises(KeyboardInterrupt):
        fit(learn)
    assert learn.loss_func is loss and loss.reduction == "mean"
    with learn.no_bar(), learn.no_logging():
        assert len(learn.validate()) == 1
    assert not any(m._forward_pre_hooks for m in learn.model.modules())


def test_manifold_leaves_no_hook_even_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            if self.training:
                raise RuntimeError("on the way")
            return x

    model = nn.Sequential(
        Fails(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4)
    )
    learn = learner(ManifoldMixup(1.0, layers=["3"]), model=model)
    with pytest.raises(RuntimeError, match="on the way"):
        fit(learn)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("stop", ["before_batch", "after_pred", "after_loss"])
def test_manifold_leaves_no_hook_in_cancelled_batches(stop):
    def cancel(self):
        if self.training and self.iter % 2:
            raise CancelBatchException

    Cancels = type(
        "Cancels", (Callback,), dict(order=6, before_batch=lambda self: None) | {stop: cancel}
    )
    hooks = []

    class Count(Callback):
        order = 99

        def after_cancel_batch(self):
            hooks.append(sum(len(m._forward_pre_hooks) for m in self.model.modules()))

    learn = fit(learner([ManifoldMixup(1.0), Cancels(), Count()], n=48), 2)
    assert len(hooks) == 6
    assert not any(hooks)
    assert not any(m._forward_pre_hooks for m in learn.model.modules())


def test_manifold_goes_where_the_weights_are():
    deep = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(5)]))
    assert mixable_layers(deep) == [deep, *deep[1][1:-1]]
    wrapped = nn.Sequential(
        nn.Identity(), nn.Sequential(nn.Sequential(nn.ReLU(), deep[1]), nn.ReLU())
    )
    assert mixable_layers(wrapped) == [wrapped, *deep[1][1:-1]]
    for model in (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)),
    ):
        assert mixable_layers(model) == [model]
        with pytest.raises(
            ValueError, match="finds no layers to mix at inside Sequential.*layers="
        ):
            fit(learner(ManifoldMixup(1.0), model=model))
        fit(learner(ManifoldMixup(1.0, layers=[""]), model=model))


def test_manifold_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.b = nn.Linear(192, 4)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x)).flatten(1))

    fit(learner(ManifoldMixup(1.0, layers=["a"]), model=Twice()))
    with pytest.raises(ValueError, match="didn't use the layer"):
        fit(learner(ManifoldMixup(1.0, layers=["unused"]), model=Twice()))
    with pytest.raises(AttributeError):
        fit(learner(ManifoldMixup(1.0, layers=["nothing"]), model=Twice()))
    head = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), ResBlock(1, 4, 4), ResBlock(1, 4, 4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(144, 4)),
    )
    assert mixable_layers(head) == [head, head[0][1]]
    for m in mixable_layers(head):
        fit(learner(ManifoldMixup(1.0, layers=[m]), model=head))


def test_manifold_at_the_input_is_mixup():
    def first(cb):
        torch.manual_seed(0)
        learn = learner(
            cb, n=8, bs=8, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
        )
        torch.manual_seed(1)
        return fit(learn).recorder.losses[0]

    assert torch.allclose(first(ManifoldMixup(1.0, layers=[""])), first(MixUp(1.0)), atol=1e-6)


@kinds
def test_gradient_accumulation_steps_on_the_mean_of_mixed_losses(kind):
    """Each of the four small batches is mixed by itself, and the step's gradient is that of the
    mean of their four mixed losses."""

    class Keep(GradientAccumulation):
        def before_step(self):
            super().before_step()
            got.extend(p.grad.clone() for p in self.model.parameters())

    class Losses(Callback):
        order = 5.5  # after mixing, before the loss is scaled

        def after_loss(self):
            if not self.training:
                return
            parameters = list(self.model.parameters())
            grads = torch.autograd.grad(self.learn.loss_grad, parameters, retain_graph=True)
            for o, g in zip(want, grads):
                o += g / 4

    small = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )
    got, want = [], [torch.zeros_like(p) for p in small.parameters()]
    fit(learner(KINDS[kind](compare_every=0) + [Losses(), Keep(16)], n=16, bs=4, model=small))
    assert len(got) == len(want)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want))
    assert any(o.abs().max() > 1e-4 for o in want)


def test_gradient_accumulation_scales_the_mixed_loss():
    grads = []

    class Keep(GradientAccumulation):
        def before_step(self):
            super().before_step()
            grads.append([p.grad.clone() for p in self.model.parameters()])

    def model():
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    class Half(MixUp):
        def weights(self, n):
            return torch.full((n,), 0.3)

        def mix(self, x, lam, perm):
            perm.copy_(torch.arange(len(x)).flip(0))
            return super().mix(x, lam, perm)

    for n_acc, bs in ((8, 4), (8, 8)):
        fit(learner([Half(1.0), Keep(n_acc)], n=8, bs=bs, model=model()))
    x, y = next(iter(learner(n=8, bs=8).dls.train))
    net, perm = model(), torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
    mixed_loss(F.cross_entropy, net(blend(x, 0.3, perm)), y, perm, torch.full((8,), 0.3)).backward()
    for got, want in zip(grads[0], net.parameters()):
        assert torch.allclose(got, want.grad, atol=1e-6)


@kinds
def test_mixed_precision(kind):
    "The autocast of a GPU, on a CPU where there is none."

    class OnCPU(MixedPrecision):
        def before_fit(self):
            super().before_fit()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.autocast = torch.autocast(device, dtype=torch.bfloat16)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn = fit(learner(KINDS[kind]() + [OnCPU(amp_mode="bf16")]), 2)
    assert torch.stack(learn.recorder.losses).isfinite().all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "manifold"])
def test_half_and_channels_last_batches(kind):
    learn = learner(
        KINDS[kind](),
        x=lambda: torch.rand(3, 8, 8).bfloat16(),
        model=net().bfloat16().to(memory_format=torch.channels_last),
    )
    assert torch.stack(fit(learn).recorder.losses).isfinite().all()


def test_bytes():
    def images():
        return (torch.rand(3, 8, 8) * 255).byte()

    with pytest.raises(TypeError, match=r"x\.float\(\)/255"):
        fit(learner(MixUp(1.0, compare_every=0), x=images))

    class Floats(nn.Module):
        def forward(self, x):
            return x.float() / 255

    fit(learner(CutMix(1.0), x=images, model=nn.Sequential(Floats(), *net())))


@pytest.mark.parametrize(
    "words, cbs, kwargs",
    [
        ("must agree", lambda: [MixUp(1.0), CutMix(1.0, draw="elem")], {}),
        ("whole batches", lambda: [MixUp(1.0, draw="elem"), ManifoldMixup(1.0, draw="elem")], {}),
        (
            "CutMix mixes one target an image",
            lambda: [CutMix(1.0, compare_every=0)],
            dict(y=lambda i: torch.zeros(8, 8, dtype=torch.long)),
        ),
        (
            "CutMix needs images",
            lambda: [CutMix(1.0)],
            dict(x=lambda: torch.rand(192), model=nn.Sequential(nn.Linear(192, 4))),
        ),
    ],
)
def test_wrong_use_is_named(words, cbs, kwargs):
    with pytest.raises(ValueError, match=words):
        fit(learner(cbs(), **kwargs))


def test_two_targets_are_refused():
    data = [(torch.rand(3, 8, 8), torch.tensor(0), torch.tensor(1)) for _ in range(4)]
    dls = DataLoaders(
        *[torch.utils.data.DataLoader(data, batch_size=4) for _ in range(2)], device="cpu"
    )
    dls.n_inp = 1
    with pytest.raises(
        ValueError, match="MixUp mixes batches of one input and one target, and these have 1 and 2"
    ):
        fit(Learner(dls, net(), lambda p, a, b: F.cross_entropy(p, a), cbs=MixUp(1.0)))


@pytest.mark.parametrize(
    "kwargs",
    [dict(alpha=-1.0), dict(alpha=float("inf")), dict(p=1.5), dict(per="row"), dict(draw="coin")],
)
def test_wrong_settings_are_named_at_once(kwargs):
    for cb in (MixUp, CutMix, ManifoldMixup):
        with pytest.raises(ValueError):
            cb(**kwargs)


def test_learning_rate_finder_and_pickle(tmp_path):
    learn = learner(KINDS["all"](), n=24, path=tmp_path)
    with learn.no_bar():
        learn.lr_find(num_it=12, show_plot=False)
    fit(learn)
    assert isinstance(pickle.loads(pickle.dumps(MixUp(0.3))), MixUp)


def test_the_record_says_how_it_was_mixed():
    learn = learner(MixUp(0.3, fold=True))
    learn.dls.c, learn.dls.bs = 4, 8
    (name,) = [o for o in describe(learn)["callbacks"] if "Mix" in o]
    assert name.startswith("MixUp(alpha=0.3") and "fold=True" in name


def test_two_processes(tmp_path):
    "Distributed training: every process mixes its own batch, and all end with the same weights."
    script = tmp_path / "two.py"
    script.write_text("""
import fastai.callback.progress, sys, torch, torch.distributed as dist
from torch import nn
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from sota_course.training.mixing import CutMix, ManifoldMixup, MixUp

def main(store, rank):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    data = [(torch.rand(3, 8, 8), torch.tensor(i % 4)) for i in range(12)]
    dl = torch.utils.data.DataLoader(data, batch_size=4)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
    cbs = [MixUp(1.), CutMix(1.), ManifoldMixup(1.)]
    learn = Learner(DataLoaders(dl, dl, device="cpu"), model, nn.CrossEntropyLoss(), cbs=cbs)
    torch.manual_seed(10 + rank)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.1)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)
    dist.destroy_process_group()

main(sys.argv[1], int(sys.argv[2]))
""")
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "store"), str(i)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        done = [o.communicate(timeout=240)[1] for o in both]
    finally:
        for o in both:
            o.kill()
    assert not any(o.returncode for o in both), "\n".join(done)[-2000:]


def test_split_batches_get_an_error():
    "What DataParallel does to mixing inside: half of the batch arrives."

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Flatten(), nn.Linear(192, 4)

        def forward(self, x):
            return torch.cat([self.b(self.a(o)) for o in x.chunk(2)])

    with pytest.raises(ValueError, match="one position for each of 4"):
        fit(learner(ManifoldMixup(1.0, layers=["b"]), n=8, bs=8, model=Halves()))


# ---- types of labels, images and logits ----------------------------------------------------------

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
WHOLE = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, *SIGNED]
# A name, the class of the loss, and whether it takes class weights and smoothing.
CRITERIA = dict(torch=nn.CrossEntropyLoss, fastai=CrossEntropyLossFlat, ours=SmoothCrossEntropy)


def criterion(kind, weight, smoothing, reduction="mean"):
    # fastai's losses make float32 of float64, but not of the weights.
    if kind == "fastai" and weight is not None and weight.dtype == torch.float64:
        weight = weight.float()
    options = dict(weight=weight, reduction=reduction)
    if kind == "ours":
        return SmoothCrossEntropy(smoothing, **options)
    return CRITERIA[kind](label_smoothing=smoothing, **options)


def per_class(logits, weight, smoothing):
    "The loss of each image for each class, in float64, as torch weighs and smooths: written out."
    logp, n = logits.detach().double().log_softmax(1), logits.shape[1]
    weight = torch.ones(n, dtype=torch.float64) if weight is None else weight.double()
    spread = -(logp * weight).sum(1, keepdim=True) * smoothing / n
    return -(1 - smoothing) * weight * logp + spread, weight


def brute_force(logits, y, perm, lam, weight, smoothing, reduction="mean"):
    "The mixed loss, image by image, of int64 class numbers."
    losses, weight = per_class(logits, weight, smoothing)
    y, lam = [int(o) for o in y], lam.double().expand(len(y)).tolist()
    pairs = [(share, i, y[i], y[j]) for i, (share, j) in enumerate(zip(lam, perm.tolist()))]
    each = [share * losses[i, a] + (1 - share) * losses[i, b] for share, i, a, b in pairs]
    if reduction == "none":
        return torch.stack(each)
    if reduction == "sum":
        return sum(each)
    return sum(each) / sum(share * weight[a] + (1 - share) * weight[b] for share, _, a, b in pairs)


ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 8e-2, torch.float32: 1e-4, torch.float64: 1e-5}
losses_of_any_type = given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 9),
    classes=st.integers(2, 230),
    label=st.sampled_from(WHOLE),
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(list(CRITERIA)),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    per=st.sampled_from(["elem", "batch"]),
)


@losses_of_any_type
def test_property_labels_of_every_type(
    seed, n, classes, label, dtype, kind, weighted, smoothing, reduction, per
):
    "Labels that indexing takes for masks or refuses: the same loss as for int64, written out."
    if label == torch.int8:
        classes = min(classes, 128)
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, classes, generator=g)).to(dtype)
    y, perm = torch.randint(classes, (n,), generator=g), torch.randperm(n, generator=g)
    y[0] = classes - 1
    lam = torch.rand(n if per == "elem" else 1, generator=g)
    weight = (torch.rand(classes, generator=g) + 0.1).to(dtype) if weighted else None
    loss = criterion(kind, weight, smoothing, reduction)
    for positions in (perm, perm.to(torch.uint8), perm.to(torch.int16)):
        got = mixed_loss(loss, logits, y.to(label), positions, lam)
        want = brute_force(logits, y, perm, lam, weight, smoothing, reduction)
        torch.testing.assert_close(
            torch.Tensor(got).double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype]
        )


@pytest.mark.parametrize("label", WHOLE)
@pytest.mark.parametrize("weighted", [False, True])
def test_class_156_is_a_class(label, weighted):
    "-100, which torch's losses ignore, is 156 in a byte."
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([3, 156, 157, 199])
    if label == torch.int8:
        y = y.clamp(max=127)
    weight = torch.linspace(0.1, 2, 200) if weighted else None
    perm, lam = torch.tensor([1, 2, 3, 0]), torch.tensor([0.2, 0.4, 0.6, 0.9])
    got = mixed_loss(nn.CrossEntropyLoss(weight), logits, y.to(label), perm, lam)
    assert torch.allclose(got.double(), brute_force(logits, y, perm, lam, weight, 0.0), atol=1e-5)
    assert torch.equal(one_hot(y.to(label), 200), F.one_hot(y, 200).float())
    images = torch.rand(4, 3, 8, 8)
    for f in (mixup, cutmix):
        torch.manual_seed(0)
        targets = f(images, y.to(label), lam, perm, 200)[1]
        torch.manual_seed(0)
        assert torch.equal(targets, f(images, y, lam, perm, 200)[1])


MIXERS = dict(KINDS, resize=lambda **k: [ResizeMix(**k)], reg=lambda **k: [RegMixup(**k)])


class Look(Callback):
    "What the learner's loss is, and from what it was computed."

    order = 5.5

    def after_loss(self):
        cb = self.learn.cbs.filter(lambda o: getattr(o, "mixed", None) is not None)[0]
        self.found = self.pred, self.yb[0], cb.mixed, self.learn.loss

    def before_step(self):
        raise CancelFitException


class Both(nn.Module):
    "A network that keeps what it was given last, and what it said."

    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, classes)

    def forward(self, x):
        self.out = self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return self.out


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 6),
    label=st.sampled_from(WHOLE),
    dtype=st.sampled_from(FLOATS),
    mixer=st.sampled_from(list(MIXERS)),
    kind=st.sampled_from(list(CRITERIA)),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    per=st.sampled_from(["elem", "batch"]),
)
def test_property_every_type_through_every_callback(
    seed, n, label, dtype, mixer, kind, weighted, smoothing, per
):
    "The learner steps on the brute-force loss of its predictions, in float64 with int64 labels."
    classes, g = (120 if label == torch.int8 else 200), torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 3, 8, 8, generator=g).to(dtype), torch.randint(classes, (n,), generator=g)
    y[0] = classes - 1
    weight = (torch.rand(classes, generator=g) + 0.1).to(dtype) if weighted else None
    batches = torch.utils.data.DataLoader([(x, y.to(label))], batch_size=None)
    kwargs = dict(per=per) if mixer != "per_batch" else {}
    torch.manual_seed(seed)
    learn = Learner(
        DataLoaders(batches, batches, device="cpu"),
        Both(classes).to(dtype),
        criterion(kind, weight, smoothing),
        cbs=[*MIXERS[mixer](**kwargs), Look()],
    )
    with learn.no_bar(), learn.no_logging(), learn.removed_cbs(learn.recorder):
        learn.fit(1, 0.0)
    pred, labels, (perm, lam), loss = learn.look.found
    if mixer == "reg":
        pred = learn.model.out
    clean, mixed = pred.chunk(2)[::-1] if mixer == "reg" else (None, pred)
    want = brute_force(mixed, y, perm, lam, weight, smoothing)
    if mixer == "reg":
        want = want + brute_force(clean, y, torch.arange(n), torch.ones(1), weight, smoothing)
    torch.testing.assert_close(
        torch.Tensor(loss.detach()).double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype]
    )
    assert torch.equal(labels, y) and labels.dtype == torch.int64


def test_small_labels_in_a_whole_training():
    "With a loss that takes them: the plain loss and the unmixed one beside the mixed one."
    for label in WHOLE:
        learn = fit(
            learner(
                MixUp(1.0),
                loss_func=SmoothCrossEntropy(),
                y=lambda i: torch.tensor(i % 4).to(label),
            ),
            2,
        )
        assert torch.tensor(learn.recorder.values).isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_unmixed_loss_with_class_weights_of_every_type(dtype):
    learn = learner(
        MixUp(1.0),
        loss_func=nn.CrossEntropyLoss(W.to(dtype)),
        model=net().to(dtype),
        x=lambda: torch.rand(3, 8, 8).to(dtype),
    )
    with learn.removed_cbs(learn.recorder):
        fit(learn)
    assert learn.mix_up.compared and all(loss.isfinite() for loss, _ in learn.mix_up.compared)


def test_whole_numbers_to_predict_are_mixed_as_floats():
    "Of the shape of the predictions they are no class numbers."
    _, _, lam, perm = batch()
    y, pred = torch.arange(6), torch.randn(6)
    for o in (y, y.to(torch.int8), y.float()):
        want = F.mse_loss(pred, blend(y.float(), lam, perm))
        assert torch.allclose(mixed_loss(nn.MSELoss(), pred, o, perm, lam), want)
    assert mixed_loss(nn.BCEWithLogitsLoss(), pred, y > 2, perm, lam).isfinite()


def hidden_weights(p, y, reduction="mean"):
    return F.cross_entropy(p, y, weight=W, reduction=reduction)


@pytest.mark.parametrize(
    "make", [lambda: lambda p, y: F.cross_entropy(p, y, weight=W), lambda: hidden_weights]
)
def test_a_mean_that_cannot_be_known_is_refused(make):
    "Class weights inside a function change the divisor of the mean, and nothing outside tells."
    loss, (_, y, lam, perm) = make(), batch()
    logits = torch.randn(6, 4)
    with pytest.raises(ValueError, match='averages over images can\'t be known: use per="batch"'):
        mixed_loss(loss, logits, y, perm, lam)
    one = mixed_loss(loss, logits, y, perm, torch.tensor([0.3]))
    assert torch.allclose(one, 0.3 * loss(logits, y) + 0.7 * loss(logits, y[perm]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.CrossEntropyLoss(),
        lambda: CrossEntropyLossFlat(),
        lambda: SmoothCrossEntropy(0.0),
    ],
)
@pytest.mark.parametrize("undefined", [torch.inf, torch.nan])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_has_no_share_does_not_count(make, undefined, share):
    "An infinite or undefined number times 0 is undefined; and who has no share has no number."
    loss, perm = make(), torch.tensor([1, 0])
    # Class 2 is ruled out for the first.
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.5, 0.0, 1.0]], requires_grad=True)
    y = torch.tensor([0, 2]) if share else torch.tensor([2, 0])
    for lam in (torch.tensor([share]), torch.full((2,), share)):
        got = torch.Tensor(mixed_loss(loss, logits, y, perm, lam))
        assert torch.equal(got, torch.Tensor(loss(logits, y if share else y[perm])))
        if lam.numel() == 2:
            assert got.isfinite() == (share == 1 or y[perm][0] != 2)
    x = torch.tensor([[1.0, 2.0], [undefined, 3.0]])
    keep = torch.tensor([1.0, 0.0])
    for o in (x, x.half(), x.double().requires_grad_()):
        assert torch.equal(blend(o, keep, perm), o[[0, 0]])
        assert torch.equal(blend(o, 1.0, torch.tensor([0, 0]))[0], o[0])
    assert torch.equal(mixed_loss(nn.MSELoss(), x[[0, 0]], x, perm, keep), torch.tensor(0.0))


def test_blended_gradients_are_those_of_what_was_kept():
    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    lam, perm = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1, 2, 0])
    assert torch.autograd.gradcheck(lambda o: blend(o, lam, perm), x)


# ---- what doesn't fit ----------------------------------------------------------------------------


def bad_perms(n):
    "Positions out of range, negative, of another shape, floats, truths, or no numbers."
    rows = torch.arange(n)
    bad = [rows + 1, rows - 1, rows[:-1], rows[None], torch.cat([rows, rows])]
    bad += [rows.float(), rows.double() + 0.5, rows > 0, rows + 0j]
    bad += ["abc", None, ["a"] * n, n, [0.5] * n]
    return st.sampled_from(bad)


def bad_lams(n):
    "Weights out of range, undefined, of another shape, truths, or no numbers."
    third = torch.full((n,), 1 / 3)
    bad = [third + 1, -third, third * torch.nan, third > 0, third + 0j, torch.cat([third, third])]
    bad += [third[:-1] if n > 2 else torch.empty(0), third[None] if n > 1 else -third]
    bad += ["abc", None, 1.5, -0.1, float("nan"), float("inf"), True]
    return st.sampled_from(bad)


def first(lam):
    return lam[:1] if torch.is_tensor(lam) and lam.ndim else lam


def loss_of(x, y, lam, perm):
    return mixed_loss(nn.CrossEntropyLoss(), x.flatten(1)[:, :4], y, perm, lam)


TAKE = {  # each public function of positions or weights
    "blend": lambda x, y, lam, perm: blend(x, lam, perm),
    "mixup": lambda x, y, lam, perm: mixup(x, y, lam, perm, 4),
    "mixup_targets": lambda x, y, lam, perm: mixup_targets(y, lam, perm, 4),
    "cutmix": lambda x, y, lam, perm: cutmix(x, y, lam, perm, 4),
    "mixed_loss": loss_of,
    "one weight": lambda x, y, lam, perm: loss_of(x, y, first(lam), perm),
    "resizemix": lambda x, y, lam, perm: resizemix(x, perm, patch_boxes(lam, 8, 8)),
}


@given(
    data=st.data(),
    name=st.sampled_from(list(TAKE)),
    n=st.integers(1, 6),
    seed=st.integers(0, 1000),
    which=st.sampled_from(["perm", "lam"]),
)
def test_property_bad_positions_and_weights_are_refused(data, name, n, seed, which):
    x, y, lam, perm = batch(n, seed=seed)
    if which == "perm":
        perm = data.draw(bad_perms(n))
    else:
        lam = data.draw(bad_lams(n))
    given_ = [o.clone() if torch.is_tensor(o) else o for o in (x, y, lam, perm)]
    if name == "one weight" and which == "lam":
        name = "mixed_loss"
    with pytest.raises((TypeError, ValueError), match="perm|lam|weights|sides|position|boxes"):
        TAKE[name](x, y, lam, perm)
    for a, b in zip((x, y, lam, perm), given_):
        if torch.is_tensor(a):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("what", [[0, 1], "ab", None, 3])
@pytest.mark.parametrize(
    "f",
    [
        lambda o: one_hot(o, 4),
        lambda o: mixup(o, torch.tensor([0, 1]), 0.5, [1, 0], 4),
        lambda o: mixup(torch.rand(2, 3), o, 0.5, [1, 0], 4),
        lambda o: mixup_targets(o, 0.5, [1, 0], 4),
        lambda o: blend(o, 0.5, [1, 0]),
        lambda o: cutmix(o, torch.tensor([0, 1]), 0.5, [1, 0], 4),
        lambda o: cutmix(torch.rand(2, 3, 4, 4), o, 0.5, [1, 0], 4),
        lambda o: paste(o, torch.rand(2, 3, 4, 4), torch.zeros(2, 4)),
        lambda o: mixed_loss(F.cross_entropy, torch.rand(2, 4), o, [1, 0], 0.5),
        lambda o: box_weights(o, 4, 4),
        lambda o: resizemix(o, [1, 0], torch.zeros(2, 4).long()),
    ],
)
def test_what_is_no_tensor_is_named(f, what):
    with pytest.raises(TypeError, match="must be a tensor, not"):
        f(what)


def one_number(pred, y, reduction="mean"):
    "A loss that takes `reduction`, and leaves it unused."
    return pred.mean()


BOXES = torch.zeros(6, 4).long()
MORE_BAD = [
    (TypeError, "n_classes must be a whole number", one_hot, (Y, 4.0)),
    (TypeError, "n_classes must be a whole number", mixup, (X, Y, LAM, PERM, "4")),
    (ValueError, "n_classes must be 1 or more", one_hot, (Y[:0], 0)),
    (ValueError, "a side of the images must be 1 or more", cutmix, (X[..., :0], Y, LAM, PERM, 4)),
    (ValueError, "a side of the images must be 1 or more", rand_boxes, (LAM, 0, 8)),
    (ValueError, "a side of the images must be 1 or more", box_weights, (BOXES, 8, 0)),
    (TypeError, "boxes needs a rectangle", box_weights, (torch.rand(6, 4), 8, 8)),
    (TypeError, "boxes needs a rectangle", paste, (X, X, torch.rand(6, 4))),
    (TypeError, "boxes needs a rectangle", cutmix, (X, Y, LAM, PERM, 4, torch.rand(6, 4))),
    (ValueError, "boxes needs a rectangle", cutmix, (X, Y, LAM, PERM, 4, BOXES[:5])),
    (ValueError, "centre needs two each", rand_boxes, (LAM, 8, 8, torch.zeros(2).long())),
    (TypeError, "centre needs two each", rand_boxes, (LAM, 8, 8, torch.rand(6, 2))),
    (ValueError, "images are", cutmix, (X[0], Y, LAM, PERM, 4)),
    (ValueError, "6 images and 5 targets", cutmix, (X, Y[:5], LAM, PERM, 4)),
    (ValueError, "6 images and 5 targets", mixup, (X, Y[:5], LAM, PERM, 4)),
    (ValueError, "one target an image", cutmix, (X, X, LAM, PERM)),
    (TypeError, "class numbers of shape", mixup, (X, X[:, 0].byte(), LAM, PERM, 4)),
    (TypeError, "class numbers must be whole", loss_of, (X, Y > 1, LAM, PERM)),
    (ValueError, "a number for each of 6 images, not 1", mixed_loss, (one_number, X, Y, PERM, LAM)),
    (TypeError, "alpha must be a number", sample_lam, (3, "0.4")),
    (TypeError, "n must be a whole number", sample_lam, (3.0, 0.4)),
    (ValueError, "n must be 0 or more", sample_lam, (-3, 0.4)),
    (TypeError, "off_last must be a whole number", partial(MixUp, off_last=0.5), ()),
    (ValueError, "compare_every must be 0 or more", partial(CutMix, compare_every=-1), ()),
]


@pytest.mark.parametrize("error, words, f, args", MORE_BAD)
def test_more_bad_input_is_named(error, words, f, args):
    with pytest.raises(error, match=words):
        f(*args)


def test_one_weight_of_any_shape():
    x, y, _, perm = batch()
    logits = x.flatten(1)[:, :4]
    quarters = (torch.tensor(0.25), torch.tensor([[0.25]]), torch.tensor([0.25]).double(), 0.25)

    def cut(lam):
        torch.manual_seed(0)
        return cutmix(x, y, lam, perm, 4)[0]

    for f in (
        lambda lam: blend(x, lam, perm),
        lambda lam: mixup(x, y, lam, perm, 4)[1],
        lambda lam: mixed_loss(F.cross_entropy, logits, y, perm, lam),
        cut,
    ):
        for lam in quarters:
            assert torch.allclose(f(lam), f(torch.tensor([0.25])))
        assert torch.equal(f(1), f(torch.tensor([1.0])))


@given(alpha=st.floats(5e-324, 1e308), seed=st.integers(0, 1000))
def test_property_weights_of_any_alpha_are_weights(alpha, seed):
    torch.manual_seed(seed)
    t = sample_lam(50, alpha)
    assert ((t >= 0) & (t <= 1)).all()
    if alpha < 1e-20:
        assert set(t.tolist()) == {0.0, 1.0}
    if alpha > 1e20:
        assert (t == 0.5).all()


def mask(i):
    return torch.randint(4, (8, 8))


@pytest.mark.parametrize(
    "make", [MixUp, CutMix, ResizeMix, ManifoldMixup, RegMixup, lambda: MixUp(per="batch")]
)
@pytest.mark.parametrize("label", [torch.uint8, torch.int64, torch.bool])
def test_a_class_for_each_pixel_is_refused(make, label):
    model = nn.Sequential(*[nn.Conv2d(k, 4, 3, padding=1) for k in (3, 4, 4)])
    learn = learner(make(), y=lambda i: mask(i).to(label), model=model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="mixes one target an image, and these have one for each"):
        fit(learn)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_images_to_predict_are_blended():
    "Floats for each pixel are no classes: blended images have a blended answer."

    def to_predict(cb):
        return learner(
            cb,
            y=lambda i: torch.rand(4, 8, 8),
            loss_func=nn.MSELoss(),
            model=nn.Conv2d(3, 4, 3, padding=1),
        )

    learn = to_predict(MixUp(1.0))
    assert torch.stack(fit(learn).recorder.losses).isfinite().all()
    for make in (CutMix, ResizeMix):
        with pytest.raises(ValueError, match="one target an image"):
            fit(to_predict(make()))


# ---- a look at a mixed batch ---------------------------------------------------------------------

PREVIEWED = dict(
    mixup=MixUp,
    cutmix=CutMix,
    resize=ResizeMix,
    manifold=lambda **k: ManifoldMixup(layers=[""], **k),
    reg=RegMixup,
)


def preview(learn):
    "As fastai's documentation of its own MixUp does it."
    learn.epoch, learn.training = 0, True
    learn.dl = learn.dls.train
    b = next(iter(learn.dls.train))
    learn._split(b)
    learn("before_train")
    learn("before_batch")
    return b


@pytest.mark.parametrize("name", PREVIEWED)
@pytest.mark.parametrize("with_learn", [True, False])
@pytest.mark.parametrize("off_last", [0, 1])
def test_a_preview_without_training(name, with_learn, off_last):
    "No training has begun, so there is no count of batches; and the model need not fit the images."
    cb = PREVIEWED[name](off_last=off_last)
    learn = learner(cb, model=nn.Linear(3, 4), n=64, bs=32)
    with learn if with_learn else nullcontext():
        x, y = preview(learn)
    mixed = cb.x[: len(x)]
    if name == "manifold":
        assert torch.equal(mixed, x)  # it mixes in the model
    else:
        assert not torch.isclose(mixed, x).all() and 0 <= mixed.min() and mixed.max() <= 1
    assert torch.equal(cb.y[: len(y)], y) and not cb.compared
    if with_learn:
        assert not learn.model._forward_pre_hooks and not learn.metrics


def test_a_preview_between_trainings():
    learn = learner(MixUp(1.0, compare_every=1))
    first = fit(learn).recorder.values[0]
    with learn.no_bar(), learn.no_logging(), learn:
        x, _ = preview(learn)
    assert not torch.isclose(learn.mix_up.x, x).all()
    assert len(fit(learn).recorder.values[0]) == len(first) == 3


def test_a_preview_is_shown(tmp_path):
    "fastai's own loaders show the mixed batch, denormalized and with its labels."
    import matplotlib.pyplot as plt

    for i in range(16):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"c{i % 2}" / f"{i}.png")
    dls = ImageDataLoaders.from_folder(
        tmp_path,
        valid_pct=0.5,
        seed=0,
        bs=8,
        num_workers=0,
        batch_tfms=Normalize.from_stats(*imagenet_stats),
    )
    cb = MixUp(1.0)
    with Learner(dls, nn.Linear(3, 4), loss_func=CrossEntropyLossFlat(), cbs=cb) as learn:
        x, _ = preview(learn)
    fig, axs = plt.subplots(2, 2)
    dls.show_batch(b=(cb.x, cb.y), ctxs=axs.flatten())
    mean, std = (torch.tensor(o)[:, None, None] for o in imagenet_stats)
    for ax, o in zip(axs.flatten(), cb.x):
        pixels = (torch.Tensor(o) * std + mean).permute(1, 2, 0) * 255
        assert np.allclose(ax.images[0].get_array(), pixels, atol=1.01)
        assert ax.get_title() in ("c0", "c1")
    assert not torch.isclose(torch.Tensor(cb.x), torch.Tensor(x)).all()
    plt.close(fig)


# ---- exercises -----------------------------------------------------------------------------------


def hot(n, **at):
    return [at.get(f"c{i}", 0.0) for i in range(n)]


def wide(lam):
    return lam[:, None, None, None]


def per_image(f):
    return lambda x, lam, perm: f(x, wide(lam), x[perm])


def in_place(x, lam, perm):
    w, other = wide(lam), x[perm]
    return x.mul_(w).add_((1 - w) * other)


def ce(p, y):
    return F.cross_entropy(p, y, reduction="none")


def of_means(p, y, perm, lam):
    w = lam.mean()
    return w * ce(p, y).mean() + (1 - w) * ce(p, y[perm]).mean()


def of_the_stronger(p, y, perm, lam):
    return F.cross_entropy(p, torch.where(lam >= 0.5, y, y[perm]))


def of_mixed_predictions(p, y, perm, lam):
    return F.cross_entropy(lam[:, None] * p + (1 - lam[:, None]) * p[perm], y)


def of_probabilities(p, y, perm, lam):
    return F.cross_entropy(p.softmax(1), mixup_targets(y, lam, perm, 3))


def kept(side, row, col, size=48):
    "The share that a square with this share of an image's sides leaves, counted in pixels."
    n, x = round(side * size), torch.ones(size, size)
    x[max(row - n // 2, 0) : row - n // 2 + n, max(col - n // 2, 0) : col - n // 2 + n] = 0
    return x.mean().item()


ANSWERS = {
    "mixup.1": (
        hot(10, c4=0.3, c7=0.7),
        [
            (hot(10, c4=0.7, c7=0.3), "swapped"),
            (hot(9, c4=0.3, c7=0.7), "nine entries"),
            (hot(10, c5=0.3, c8=0.7), "counted from one"),
            (hot(10, c7=1.0), "only the stronger"),
            (hot(10, c4=1.0, c7=1.0), "without their weights"),
            ("three parts", "kind that was asked for"),
        ],
    ),
    "mixup.2": (
        per_image(lambda x, w, o: w * x + (1 - w) * o),
        [
            (per_image(lambda x, w, o: (1 - w) * x + w * o), "swapped"),
            (lambda x, lam, perm: lam * x + (1 - lam) * x[perm], "columns of pixels"),
            (lambda x, lam, perm: lam[0] * x + (1 - lam[0]) * x[perm], "weight of the first"),
            (in_place, "images were changed"),
            (lambda x, lam, perm: wide(lam) * x + (1 - wide(lam)) * x.flip(0), "mirror place"),
            (
                lambda x, lam, perm: wide(lam) * x + (1 - wide(lam[perm])) * x[perm],
                "don't sum to 1",
            ),
            (3, "must be a function"),
        ],
    ),
    "mixup.3": (
        kept(0.25**0.5, 24, 0),
        [
            (0.75, "as drawn"),
            (1 - kept(0.25**0.5, 24, 0), "share of the partner"),
            (kept(0.25**0.5, 0, 0), "two sides"),
            (1 - 0.75 / 2, "taken for the rectangle's area"),
            (kept(0.75**0.5, 24, 0), "taken for the rectangle's area"),
            (kept(0.25, 24, 0), "not by its square root"),
            (1 - 0.25**0.5, "share of a side"),
        ],
    ),
    "mixup.4": (
        lambda p, y, perm, lam: (lam * ce(p, y) + (1 - lam) * ce(p, y[perm])).mean(),
        [
            (
                lambda p, y, perm, lam: (lam * ce(p, y[perm]) + (1 - lam) * ce(p, y)).mean(),
                "swapped",
            ),
            (of_means, "means were mixed"),
            (lambda p, y, perm, lam: (lam * ce(p, y) + (1 - lam) * ce(p, y[perm])).sum(), "summed"),
            (of_the_stronger, "only the stronger"),
            (of_mixed_predictions, "predictions were mixed"),
            (of_probabilities, "given probabilities"),
        ],
    ),
    "mixup.5": (
        (0.5, 0),
        [
            ((0, 0.5), "wrong way round"),
            ((0.5, 0.5), "mean of the weight"),
            ((1, 0), "more than half"),
            ((0.25, 0), "for a of 1"),
        ],
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_exercises(name):
    right, wrong = ANSWERS[name]
    assert check(name, right)
    for answer, mistake in wrong:
        verdict = check(name, answer)
        assert not verdict and mistake in verdict.mistake and verdict.hint, verdict
    assert not check(name, ...)


@pytest.mark.parametrize("pred", [[1.0, 2.0], "ab", None])
def test_predictions_that_are_no_tensor_are_named(pred):
    y, perm, lam = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.5, 0.5])
    with pytest.raises(TypeError, match="pred must be a tensor"):
        mixed_loss(F.cross_entropy, pred, y, perm, lam)
