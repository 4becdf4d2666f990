"ResizeMix and RegMixup from the outside: types, layouts, any loss, and callbacks in a learner."

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.training import GradientAccumulation
from fastai.losses import FocalLoss
from hypothesis import given, strategies as st
from torch import nn

from sota_course.mixed_loss import mixed_loss
from sota_course.mixup import box_weights
from sota_course.training.mixing import MixUp
from sota_course.training.mixup_variants import RegMixup, ResizeMix, patch_boxes, resizemix
from test_mixup import FLOATS, LOSSES, W, IndexOnly, batch, fit, layouts, learner, preview


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


@given(side=st.floats(0, 1), h=st.integers(1, 30), w=st.integers(1, 30), n=st.integers(0, 5))
def test_patches_lie_inside(side, h, w, n):
    top, bottom, left, right = patch_boxes(torch.full((n,), side), h, w).unbind(1)
    assert ((0 <= top) & (top <= bottom) & (bottom <= h)).all()
    assert ((0 <= left) & (left <= right) & (right <= w)).all()
    assert ((bottom - top) == round(side * h)).all() or abs(side * h % 1 - 0.5) < 1e-3


@pytest.mark.parametrize("dtype", FLOATS)
def test_resizemix_is_a_resize_and_a_paste(dtype):
    x, *_, perm = batch(dtype=dtype)
    boxes = patch_boxes(torch.full((6,), 0.5), 8, 8)
    got = resizemix(x, perm, boxes)
    top, bottom, left, right = boxes[0]
    size, rows, cols = (bottom - top, right - left), slice(top, bottom), slice(left, right)
    want = F.interpolate(x[perm[:1]].float(), size, mode="bilinear", antialias=True)[0]
    assert got.dtype == dtype and torch.allclose(got[0, :, rows, cols].float(), want, atol=1e-2)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[rows, cols] = False
    assert torch.equal(got[0][:, outside], x[0][:, outside])
    assert outside.float().mean() == box_weights(boxes, 8, 8)[0]


@pytest.mark.parametrize("kind", layouts(batch()[0]))
def test_resizemix_layouts(kind):
    x, *_, perm = batch()
    x, boxes = layouts(x)[kind], patch_boxes(torch.full((6,), 0.5), 8, 8)
    before = x.clone()
    want = resizemix(torch.Tensor(x).contiguous(), perm, boxes)
    assert torch.allclose(torch.Tensor(resizemix(x, perm, boxes)), want, atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: ResizeMix(**k),
        lambda **k: RegMixup(**k),
        lambda **k: ResizeMix(per="batch", **k),
        lambda **k: RegMixup(per="batch", **k),
    ],
)
@pytest.mark.parametrize("loss", ["torch", "fastai", "function", "both", "part", "focal", "bare"])
def test_any_loss(make, loss):
    learn = fit(learner(make(off_last=1), loss_func=LOSSES[loss], model=small()), 2)
    assert torch.stack(learn.recorder.losses).isfinite().all()
    assert len(learn.recorder.values[0]) == 3
    assert len(learn.validate()) == 1


@pytest.mark.parametrize("n, bs", [(9, 8), (3, 1)])
@pytest.mark.parametrize(
    "cbs",
    [
        lambda: [ResizeMix(draw="elem"), MixUp(1.0, draw="elem")],
        lambda: [RegMixup()],
        lambda: [ResizeMix(p=0.5)],
    ],
)
def test_small_batches(n, bs, cbs):
    assert torch.stack(fit(learner(cbs(), n, bs, model=small())).recorder.losses).isfinite().all()


def test_regmixup_adds_the_two_losses():
    class Fixed(RegMixup):
        def weights(self, n):
            return torch.full((n,), 0.3)

    learn = learner(Fixed(eta=0.5), n=8, bs=8, model=small())
    x, y = next(iter(learn.dls.train))
    perms = []
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    fixed = learn.cbs.filter(lambda o: isinstance(o, Fixed))[0]
    old = fixed.mix

    def noting(x, lam, perm):
        perms.append(perm)
        return old(x, lam, perm)

    fixed.mix = noting
    fit(learn)
    model = small()
    model.load_state_dict(before)
    want = F.cross_entropy(model(x), y) + 0.5 * mixed_loss(
        F.cross_entropy, model(0.3 * x + 0.7 * x[perms[0]]), y, perms[0], torch.full((8,), 0.3)
    )
    assert torch.allclose(learn.recorder.losses[0], want, atol=1e-5)


def test_other_callbacks_see_the_clean_half():
    sizes = []

    class Look(GradientAccumulation):
        def after_loss(self):
            sizes.append((len(self.learn.pred), len(self.learn.yb[0])))
            super().after_loss()

    fit(learner([RegMixup(), Look(8)], n=16, bs=8, model=small()))
    assert set(sizes) == {(8, 8)}


@pytest.mark.parametrize("make", [ResizeMix, RegMixup, lambda **k: ResizeMix(draw="elem", **k)])
@pytest.mark.parametrize("loss", [IndexOnly(), FocalLoss(weight=W)])
def test_one_weight_for_the_batch_is_one(make, loss):
    'With per="batch" any loss of class numbers will do, as the error says where it isn\'t set.'
    learn = fit(learner(make(per="batch"), loss_func=loss, model=small()))
    assert torch.stack(learn.recorder.losses).isfinite().all()
    with pytest.raises(ValueError, match='use per="batch" and draw="batch"'):
        fit(learner(make(), loss_func=loss, model=small()))
    cb, (x, *_, perm) = make(per="batch"), batch()
    assert all(cb.mix(x, cb.weights(6), perm)[1].shape == (1,) for _ in range(9))


@pytest.mark.parametrize("kwargs", [dict(fold=True), dict(alpha=0.3)])
def test_what_means_nothing_to_resizemix_is_refused(kwargs):
    with pytest.raises(TypeError, match=f"no use for {next(iter(kwargs))}"):
        ResizeMix(**kwargs)
    assert not {"alpha", "fold"} & ResizeMix().settings.keys()
    assert ResizeMix().__name__.startswith("ResizeMix(per=elem")


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="don't combine it"):
        fit(learner([RegMixup(), MixUp(1.0)]))
    with pytest.raises(ValueError, match="smallest"):
        ResizeMix(0.9, 0.2)
    with pytest.raises(ValueError, match="from 0 up"):
        RegMixup(-1.0)
    with pytest.raises(ValueError, match="floats"):
        resizemix((batch()[0] * 255).byte(), torch.arange(6), torch.zeros(6, 4, dtype=torch.long))


X, *_, PERM = batch()
BOXES = patch_boxes(torch.full((6,), 0.5), 8, 8)
# The error, words of its message, the function, and what it is called with.
BAD = [
    (ValueError, "weights must lie between 0 and 1", patch_boxes, (torch.tensor([1.5]), 8, 8)),
    (
        ValueError,
        "weights must lie between 0 and 1",
        patch_boxes,
        (torch.tensor([torch.nan]), 8, 8),
    ),
    (TypeError, "sides must be a tensor", patch_boxes, ([0.5], 8, 8)),
    (
        ValueError,
        "a side of the images must be 1 or more",
        patch_boxes,
        (torch.tensor([0.5]), 8, 0),
    ),
    (ValueError, "positions from 0 to 5", resizemix, (X, PERM - 1, BOXES)),
    (TypeError, "perm needs one position", resizemix, (X, PERM.float(), BOXES)),
    (ValueError, "perm needs one position", resizemix, (X, PERM[:2], BOXES)),
    (ValueError, "boxes needs a rectangle for each of 6", resizemix, (X, PERM, BOXES[:2])),
    (TypeError, "boxes needs a rectangle for each of 6", resizemix, (X, PERM, BOXES.float())),
    (ValueError, "must lie inside the image", resizemix, (X, PERM, BOXES - 9)),
    (ValueError, "must lie inside the image", resizemix, (X, PERM, BOXES.flip(1))),
    (ValueError, "eta must be a number from 0 up", partial(RegMixup, eta=float("nan")), ()),
    (ValueError, "eta must be a number from 0 up", partial(RegMixup, eta=-1.0), ()),
]


@pytest.mark.parametrize("error, words, f, args", BAD)
def test_what_does_not_fit_is_named(error, words, f, args):
    before = X.clone()
    with pytest.raises(error, match=words):
        f(*args)
    assert torch.equal(X, before)


def test_a_preview_of_regmixup_begins_with_mixed_images():
    "Those that fastai's show_batch takes are the first."
    cb = RegMixup()
    learn = learner(cb, n=32, bs=16, model=small())
    with learn:
        x, y = preview(learn)
    assert len(cb.x) == 32
    assert torch.equal(cb.x[16:], x)
    assert not torch.isclose(cb.x[:16], x).all()
    assert torch.equal(cb.y, torch.cat([y, y]))
