"""The smoothed loss beside torch's, fastai's and timm's on any input, calibration beside
torchmetrics', and the exercises' verdicts."""

import copy
import math
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat
from hypothesis import given, strategies as st
from torch import nn

from sota_course.course.exercises import check
from sota_course.label_smoothing import (
    SmoothCrossEntropy,
    best_gap,
    least_loss,
    smooth_cross_entropy,
    smooth_targets,
)
from sota_course.training.metrics import (
    brier,
    ece,
    fit_temperature,
    nll,
    on_wrong,
    reliability,
    reliability_diagram,
)
from sota_course.training.runs import score

seeds = st.integers(0, 2**32 - 1)
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6, equal_nan=True)


def batch(seed, n=8, c=5, extra=(), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, *extra, generator=g) * 3
    return x.to(dtype), torch.randint(c, (n, *extra), generator=g)


def with_grad(f, x, *args, **kwargs):
    x = x.clone().requires_grad_()
    loss = f(x, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


# ---- targets -------------------------------------------------------------------------------------


@given(
    seed=seeds,
    n=st.integers(1, 50),
    eps=st.floats(0, 0.99),
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
)
def test_targets_are_distributions(seed, n, eps, shape, dtype):
    y = torch.randint(n, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q = smooth_targets(y, n, eps)
    assert q.shape == (*shape, n)
    close(q.sum(-1), torch.ones(shape), atol=1e-5)
    close(q, F.one_hot(y.long(), n) * (1 - eps) + eps / n, check_dtype=False)
    assert (q >= 0).all() and (q <= 1 + 1e-6).all()


@pytest.mark.parametrize(
    "n, eps, on, off",
    [
        (10, 0.1, 0.91, 0.01),
        (5, 0.1, 0.92, 0.02),
        (5, 0.05, 0.96, 0.01),
        (2, 0.1, 0.95, 0.05),
        (1000, 0.1, 0.9001, 0.0001),
    ],
)
def test_the_known_tables(n, eps, on, off):
    close(smooth_targets(1, n, eps)[[1, 0]], torch.tensor([on, off]))


def test_the_five_class_target_is_not_096():
    close(smooth_targets(1, 5), torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    close(smooth_targets(1, 5, 0.05), torch.tensor([0.01, 0.96, 0.01, 0.01, 0.01]))


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((5, 5), ValueError, "class 5 is out of range: there are 5 classes, 0 to 4"),
        (([0, -1], 5), ValueError, "class -1 is out of range"),
        ((0, 5, 1.0), ValueError, "from 0 to below 1"),
        ((0, 5, -0.1), ValueError, "eps is -0.1"),
        ((0, 5, math.nan), ValueError, "eps is nan"),
        ((torch.tensor([0.0, 1.0]), 5), ValueError, "class indices need .long()"),
        ((torch.tensor([True]), 5), TypeError, "not torch.bool"),
    ],
)
def test_bad_targets_are_named(args, error, words):
    with pytest.raises(error) as e:
        smooth_targets(*args)
    assert words in str(e.value)


# ---- the loss ------------------------------------------------------------------------------------


@given(
    seed=seeds,
    n=st.integers(1, 9),
    c=st.integers(1, 12),
    extra=st.sampled_from([(), (3,), (2, 3)]),
    eps=st.floats(0, 0.99),
    weighted=st.booleans(),
    kind=st.sampled_from(["index", "ignored", "soft"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_the_same_as_torch(seed, n, c, extra, eps, weighted, kind, reduction):
    x, y = batch(seed, n, c, extra)
    if kind == "soft":
        y = x.flip(0).softmax(1)
    if kind == "ignored":
        y = torch.where(torch.rand(y.shape) < 0.3, -100, y)
    w = torch.rand(c, dtype=x.dtype) + 0.1 if weighted else None
    ours = with_grad(smooth_cross_entropy, x, y, eps, w, reduction)
    theirs = with_grad(nn.CrossEntropyLoss(w, label_smoothing=eps, reduction=reduction), x, y)
    for a, b in zip(ours, theirs):
        close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
def test_ignored_images(reduction, ignore_index):
    x, y = batch(0, 40)
    y[::3] = ignore_index
    kwargs, keep = dict(reduction=reduction, ignore_index=ignore_index), y != ignore_index
    ours = SmoothCrossEntropy(0.1, **kwargs)(x, y)
    close(ours, nn.CrossEntropyLoss(label_smoothing=0.1, **kwargs)(x, y))
    if reduction == "mean":
        close(ours, SmoothCrossEntropy(0.1)(x[keep], y[keep]))


@pytest.mark.parametrize("n, y", [(0, []), (3, [-100] * 3)])
def test_nothing_to_average(n, y):
    """An empty batch, and one in which all is ignored, as torch has it: the mean of nothing is
    undefined, and the sum is 0."""
    x, y = torch.randn(n, 4), torch.tensor(y, dtype=torch.long)
    for r in ("mean", "sum", "none"):
        close(
            smooth_cross_entropy(x, y, reduction=r),
            F.cross_entropy(x, y, label_smoothing=0.1, reduction=r),
        )


def test_one_image_without_a_batch():
    x = torch.randn(6)
    for y in (torch.tensor(2), x.softmax(0)):
        close(smooth_cross_entropy(x, y), F.cross_entropy(x, y, label_smoothing=0.1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_names_a_class(dtype):
    x, y = batch(1)
    close(smooth_cross_entropy(x, y.to(dtype)), F.cross_entropy(x, y, label_smoothing=0.1))


@given(
    seed=seeds,
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    c=st.sampled_from([2, 10, 1000]),
)
def test_half_precision_is_as_good_as_its_input(seed, dtype, c):
    x, y = batch(seed, 16, c, dtype=dtype)
    loss, grad = with_grad(smooth_cross_entropy, x, y)
    exact, exact_grad = with_grad(partial(F.cross_entropy, label_smoothing=0.1), x.double(), y)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-2, atol=1e-3)


def test_half_precision_doesnt_overflow():
    x, y = torch.full((2048, 10), -6e4).half(), torch.zeros(2048).long()
    x[:, 1] = 6e4
    loss, grad = with_grad(partial(smooth_cross_entropy, reduction="sum"), x, y)
    assert loss.isfinite() and grad.isfinite().all()
    assert F.cross_entropy(x, y, label_smoothing=0.1, reduction="sum").isinf()


def test_under_autocast():
    x, y = batch(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = SmoothCrossEntropy()(x @ torch.eye(5), y)
        assert (x @ torch.eye(5)).dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(x.bfloat16().float(), y, label_smoothing=0.1))


def test_extreme_logits():
    x, y = torch.tensor([[1e30, -1e30, 0.0], [0.0, -math.inf, 0.0]]), torch.tensor([0, 0])
    hard = smooth_cross_entropy(x, y, eps=0).item()
    assert hard == pytest.approx(math.log(2) / 2), "a class ruled out costs nothing"
    assert smooth_cross_entropy(x, y).isinf()
    assert smooth_cross_entropy(torch.tensor([[math.nan, 1.0]]), torch.tensor([0])).isnan()


def test_layouts():
    x, y = batch(3, 4, 6, (5, 7))
    want = F.cross_entropy(x, y, label_smoothing=0.1)
    for o in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.repeat_interleave(2, 3)[..., ::2],
    ):
        close(smooth_cross_entropy(o, y), want)


def test_nothing_of_the_caller_changes():
    x, y = batch(4)
    w, q = torch.rand(5), x.softmax(1)
    y[0] = -100
    before = copy.deepcopy((x, y, w, q))
    for t in (y, q):
        smooth_cross_entropy(x, t, 0.1, w)
    smooth_targets(q, 5)
    smooth_targets(y[1:], 5)
    for a, b in zip((x, y, w, q), before):
        assert torch.equal(a, b)


X, Y, INDEX = torch.randn(2, 5), torch.rand(2, 5), torch.tensor([0, 1])
# Logits, targets, options, the error and words of its message.
BAD = [
    (
        X,
        torch.tensor([0, 5]),
        {},
        ValueError,
        "class 5 is out of range: there are 5 classes, 0 to 4",
    ),
    (X, torch.tensor([0, -1]), {}, ValueError, "class -1 is out of range"),
    (X, torch.tensor([0, -100]), dict(ignore_index=0), ValueError, "class -100 is out of range"),
    (X, torch.tensor([0.0, 1.0]), {}, ValueError, "class indices need .long()"),
    (X, torch.eye(5)[:2].long(), {}, ValueError, "distributions need .float()"),
    (X, torch.tensor([[0], [1]]), {}, ValueError, "of shape (2, 1)"),
    (X, torch.rand(2, 4), {}, ValueError, "of shape (2, 4)"),
    (X, torch.tensor([True, False]), {}, TypeError, "not torch.bool"),
    (torch.ones(2, 5).long(), INDEX, {}, TypeError, "are they a model's output"),
    (torch.tensor(1.0), torch.tensor(0), {}, ValueError, "an axis of classes"),
    (torch.randn(2, 0), torch.tensor([0, 0]), {}, ValueError, "an axis of classes"),
    (X, INDEX, dict(eps=1), ValueError, "eps is 1"),
    (X, INDEX, dict(eps=math.nan), ValueError, "eps is nan"),
    (X, INDEX, dict(reduction="avg"), ValueError, "mean, sum or none"),
    (X, INDEX, dict(weight=torch.ones(4)), ValueError, "one number for each class, 5 of them"),
    (X, INDEX, dict(weight=[1, 1, 1, 1, -1.0]), ValueError, "negative"),
    (X, Y, dict(ignore_index=1), ValueError, "these targets are distributions"),
]


@pytest.mark.parametrize("x, y, kwargs, error, words", BAD)
def test_bad_input_is_named(x, y, kwargs, error, words):
    with pytest.raises(error) as e:
        smooth_cross_entropy(x, y, **kwargs)
    assert words in str(e.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(eps=1),
        dict(eps=-1e-9),
        dict(reduction="max"),
        dict(weight=[-1.0, 1.0]),
        dict(weight=torch.ones(2, 2)),
    ],
)
def test_a_bad_setting_is_named_before_training(kwargs):
    with pytest.raises(ValueError):
        SmoothCrossEntropy(**kwargs)


# ---- the peers, and where they differ ------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_same_as_fastai_without_weights(reduction):
    x, y = batch(5, 64, 10)
    ours = SmoothCrossEntropy(0.1, reduction=reduction)(x, y)
    for f in (LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat):
        theirs = f(eps=0.1, reduction=reduction)(x, y)
        close(ours, torch.Tensor(theirs), check_dtype=False)


def test_the_same_as_timm():
    timm = pytest.importorskip("timm.loss")
    x, y = batch(6, 64, 10)
    for e in (0, 0.1, 0.6):
        close(SmoothCrossEntropy(e)(x, y), timm.LabelSmoothingCrossEntropy(e)(x, y))
    close(SmoothCrossEntropy(0)(x, x.softmax(1)), timm.SoftTargetCrossEntropy()(x, x.softmax(1)))


def test_timms_mixup_smooths_by_itself_and_the_same_way():
    "timm's Mixup smooths by 0.1 unless told, even where nothing is mixed: its targets are ours."
    mixup = pytest.importorskip("timm.data").Mixup(mixup_alpha=1.0, prob=0.0, num_classes=10)
    y = torch.arange(10)
    close(mixup(torch.rand(10, 3, 4, 4), y)[1].cpu(), smooth_targets(y, 10, 0.1))


def test_fastai_leaves_the_uniform_part_unweighted():
    x, y = batch(7, 64, 10)
    w = torch.linspace(0.5, 1.5, 10, dtype=x.dtype)
    theirs = LabelSmoothingCrossEntropy(0.1, weight=w)(x, y)
    ours = smooth_cross_entropy(x, y, 0.1, w)
    close(ours, F.cross_entropy(x, y, w, label_smoothing=0.1))
    assert abs(ours - theirs) > 1e-3
    close(theirs, 0.9 * F.nll_loss(x.log_softmax(1), y, w) - 0.1 * x.log_softmax(1).mean())


def test_the_weighted_mean_of_indices_and_of_one_hot_targets():
    """They differ, as torch's do: one divides by the labels' weights, the other by the images.
    Their sums agree."""
    x, y = batch(8, 64, 10)
    w, q = torch.linspace(0.5, 1.5, 10, dtype=x.dtype), F.one_hot(y, 10).double()
    assert abs(smooth_cross_entropy(x, y, 0.1, w) - smooth_cross_entropy(x, q, 0.1, w)) > 1e-3
    close(smooth_cross_entropy(x, y, 0.1, w, "sum"), smooth_cross_entropy(x, q, 0.1, w, "sum"))
    close(smooth_cross_entropy(x, y), smooth_cross_entropy(x, q))


# ---- gradient and rest ---------------------------------------------------------------------------


@given(seed=seeds, eps=st.floats(0, 0.99))
def test_the_gradient_is_prediction_minus_target(seed, eps):
    x, y = batch(seed)
    _, grad = with_grad(partial(smooth_cross_entropy, reduction="sum"), x, y, eps)
    close(grad, x.softmax(1) - smooth_targets(y, 5, eps), check_dtype=False)


@pytest.mark.parametrize("n, eps", [(2, 0.1), (10, 0.1), (10, 0.5), (1000, 0.1)])
def test_the_best_gap_is_where_an_optimizer_stops(n, eps):
    z = torch.zeros(1, n, dtype=torch.double, requires_grad=True)
    kwargs = dict(max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-15)
    opt = torch.optim.LBFGS([z], line_search_fn="strong_wolfe", **kwargs)

    def loss():
        opt.zero_grad()
        res = smooth_cross_entropy(z, torch.tensor([0]), eps)
        res.backward()
        return res

    opt.step(loss)
    assert (z[0, 0] - z[0, 1]).item() == pytest.approx(best_gap(n, eps), abs=1e-4)
    assert loss().item() == pytest.approx(least_loss(n, eps), abs=1e-6)


def test_hard_targets_have_no_rest():
    assert best_gap(10, 0) == math.inf and least_loss(10, 0) == 0


# ---- in a learner --------------------------------------------------------------------------------


def learner(loss, **kwargs):
    data = [(torch.randn(6), torch.tensor(i % 4)) for i in range(32)]
    return Learner(
        DataLoaders(DataLoader(data, bs=8, shuffle=True), DataLoader(data, bs=10)),
        nn.Linear(6, 4),
        loss_func=loss,
        **kwargs,
    )


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0, 4.0]])
def test_in_a_learner(weight):
    learn = learner(SmoothCrossEntropy(weight=weight))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        probs, y, pred, losses = learn.get_preds(with_loss=True, with_decoded=True)
    close(probs.sum(1), torch.ones(32))
    assert torch.equal(pred, probs.argmax(1)) and losses.shape == (32,)
    assert learn.loss_func.reduction == "mean"


@pytest.mark.parametrize("module", ["fastai.callback.mixup", "sota_course.training.mixing"])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0, 4.0]])
def test_with_mixup(module, weight):
    "The callback asks for losses one by one, and leaves the reduction as it was."
    learn = learner(SmoothCrossEntropy(weight=weight), cbs=pytest.importorskip(module).MixUp(0.4))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert np.isfinite(learn.recorder.losses).all() and learn.loss_func.reduction == "mean"


def test_weights_move_with_the_module_and_it_survives_pickling():
    loss = SmoothCrossEntropy(0.2, weight=[1.0, 2.0, 3.0, 4.0, 5.0], ignore_index=-1)
    x, y = batch(9)
    again = pickle.loads(pickle.dumps(loss))
    close(again(x, y), loss(x, y))
    assert again.double().weight.dtype == torch.float64
    assert list(dict(loss.named_buffers())) == ["weight"]
    assert "eps=0.2" in repr(loss)


def test_the_record_of_a_run_has_its_settings():
    from sota_course.training.settings import differences

    a, b = (dict(loss=SmoothCrossEntropy(o).__name__) for o in (0.1, 0.2))
    assert differences(a, b) == {"loss": (a["loss"], b["loss"])} and "eps=0.2" in b["loss"]


def test_fastai_types_go_in_and_plain_tensors_come_out():
    from fastai.torch_core import TensorBase, TensorCategory

    x, y = batch(10)
    assert type(smooth_cross_entropy(TensorBase(x), TensorCategory(y))) is torch.Tensor


@pytest.mark.parametrize("module", ["mixup", "label_smoothing", "training.metrics"])
def test_importing_needs_no_fastai_and_no_plots(module):
    code = f"""import sys, sota_course.{module}
heavy = {{"fastai", "fastcore", "pandas", "matplotlib", "PIL", "scipy"}} & sys.modules.keys()
sys.exit(", ".join(heavy) or 0)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- calibration ---------------------------------------------------------------------------------


def predictions(seed, n=60, c=6):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, c, generator=g) * 2).double()
    return logits, torch.randint(c, (n,), generator=g)


@given(seed=seeds, bins=st.integers(1, 30))
def test_reliability_and_ece_are_the_papers_sums_over_bins(seed, bins):
    logits, y = predictions(seed)
    r, p = reliability(logits.softmax(1), y, bins), logits.softmax(1).numpy()
    conf, right = p.max(1), p.argmax(1) == y.numpy()
    inside = [(conf > i / bins) & (conf <= (i + 1) / bins) for i in range(bins)]
    assert r["share"].sum().item() == pytest.approx(1)
    assert r["share"].tolist() == pytest.approx([o.mean() for o in inside])
    want = sum(abs(conf[o].sum() - right[o].sum()) for o in inside) / len(y)
    assert ece(logits.softmax(1), y, bins) == pytest.approx(want, abs=1e-9)
    full, numbers = r["share"] > 0, torch.arange(1, bins + 1)
    assert full.any()
    assert ((r["confidence"] * bins).ceil().clamp(1, bins) == numbers)[full].all()


@given(seed=seeds)
def test_the_same_as_torchmetrics(seed):
    tm = pytest.importorskip("torchmetrics.functional")
    logits, y = predictions(seed)
    p = logits.softmax(1)
    perplexity = tm.text.perplexity(logits[None], y[None])
    assert nll(logits.log_softmax(1), y) == pytest.approx(perplexity.log().item(), abs=1e-5)
    squares = tm.mean_squared_error(p, F.one_hot(y, 6).double())
    assert brier(p, y) == pytest.approx(squares.item() * 6, abs=1e-6)
    r = reliability(p, y)
    error = (r["share"] * (r["confidence"] - r["accuracy"]).abs()).sum().item()
    theirs = tm.calibration_error(p, y, "multiclass", num_classes=6)
    assert error == pytest.approx(theirs.item(), abs=1e-5)


def test_the_scores_of_a_run():
    logits, y = predictions(0)
    s = score(logits.log_softmax(1), y)
    assert nll(logits.log_softmax(1), y) == pytest.approx(s["nll"])
    assert 0 <= brier(logits.softmax(1), y) <= 2


@given(seed=seeds, factor=st.floats(0.05, 20))
def test_temperature_undoes_a_factor_and_is_the_best(seed, factor):
    logits = predictions(seed, 400)[0]
    y = logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(seed))[:, 0]
    T = fit_temperature(logits, y)
    assert fit_temperature(logits * factor, y) == pytest.approx(T * factor, rel=1e-4)
    best = F.cross_entropy(logits / T, y)
    for other in (0.9 * T, 1.1 * T):
        assert F.cross_entropy(logits / other, y) > best
    assert torch.equal((logits / T).argmax(1), logits.argmax(1))


@given(
    seed=seeds, exponent=st.integers(-300, 300), digits=st.floats(1, 9.99), spread=st.floats(0, 3)
)
def test_property_the_temperature_has_the_scale_of_the_logits(seed, exponent, digits, spread):
    "T(c*logits) is c*T(logits) over all of float64, whatever the images' own scales."
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 5, generator=g, dtype=torch.float64)
    logits *= 10 ** (spread * torch.rand(60, 1, generator=g, dtype=torch.float64))
    y = torch.where(torch.rand(60, generator=g) < 0.7, logits.argmax(1), logits.argmin(1))
    y[0] = logits[0].argmin()
    try:
        T = fit_temperature(logits, y)
    except ValueError as e:  # for every scale the same
        with pytest.raises(ValueError, match=str(e)[:30]):
            fit_temperature(logits * (digits * 10.0**exponent), y)
        return

    def loss(t):
        return F.cross_entropy(logits / t, y).item()

    assert all(loss(T * o) >= loss(T) - 1e-12 for o in (0.5, 0.99, 1.01, 2))
    scaled = fit_temperature(logits * (digits * 10.0**exponent), y)
    assert scaled / 10.0**exponent == pytest.approx(T * digits, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-7, 1e-6, 1e-3, 1, 1e3])
def test_small_and_large_logits_have_a_temperature(dtype, scale):
    logits, y = predictions(2, 400)
    y = torch.where(torch.arange(400) % 3 == 0, logits.argmin(1), logits.argmax(1))
    small = (logits * scale).to(dtype)
    T = fit_temperature(small, y)

    def loss(t):  # what rounding has made of the logits is what has a temperature
        return F.cross_entropy(small.double() / t, y).item()

    assert T > 0 and all(loss(T) <= loss(T * o) for o in (0.9, 0.99, 1.01, 1.1))
    if dtype != torch.float16 or scale > 1e-4:
        assert T == pytest.approx(fit_temperature(logits, y) * scale, rel=3e-2)


@pytest.mark.parametrize("scale", [1e308, 1e300, 1e-300, 1e-308, 1e-310])
def test_temperatures_at_the_ends_of_float64(scale):
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, -1.0]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    T = fit_temperature(logits, y)
    assert fit_temperature(logits * scale, y) / scale == pytest.approx(T, rel=1e-9)
    if scale < 1e308:
        return
    near_chance = torch.tensor([[1.0, 0.0], [0.0, 0.9]], dtype=torch.float64)
    with pytest.raises(ValueError, match="too large or too small"):
        fit_temperature(near_chance * scale, y)


def test_temperature_without_gradients_and_in_half_precision():
    logits, y = predictions(1, 300)
    right = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.6
    y = torch.where(right, logits.argmax(1), y)
    with torch.no_grad():
        half, whole = fit_temperature(logits.half(), y), fit_temperature(logits, y)
    assert half == pytest.approx(whole, rel=1e-2)


UNDEFINED = torch.full((4, 4), math.nan)


@pytest.mark.parametrize(
    "f, args, words",
    [
        (fit_temperature, (torch.eye(4), torch.arange(4)), "right on all"),
        (fit_temperature, (torch.eye(4), torch.tensor([1, 2, 3, 0])), "no better than chance"),
        (fit_temperature, (torch.eye(4) / 0.0, torch.arange(4)), "infinite or undefined"),
        (fit_temperature, (torch.randn(0, 4), torch.arange(0)), "no images"),
        (nll, (torch.eye(4), torch.arange(4)), "not probabilities or logits"),
        (nll, (torch.eye(4).log(), torch.arange(1, 5)), "class 4 is out of range"),
        (brier, (torch.randn(4, 4), torch.arange(4)), "give logits.softmax(1)"),
        (brier, (torch.eye(4), torch.eye(4)), "one class index a row"),
        (reliability, (UNDEFINED, torch.arange(4)), "the rows must be probabilities"),
        (nll, (torch.full((4, 4), -5.0), torch.arange(4)), "not probabilities or logits"),
        (nll, (UNDEFINED, torch.arange(4)), "not probabilities or logits"),
        (nll, (torch.full((4, 4), -math.inf), torch.arange(4)), "not probabilities or logits"),
        (nll, (torch.full((4, 4), 0.25), torch.arange(4)), "not probabilities or logits"),
        (ece, (torch.randn(4, 4), torch.arange(4)), "give logits.softmax(1)"),
        (ece, (UNDEFINED, torch.arange(4)), "give logits.softmax(1)"),
        (ece, (torch.full((4, 4), 0.3), torch.arange(4)), "give logits.softmax(1)"),
        (ece, (torch.eye(4), torch.arange(3)), "one class index a row"),
    ],
)
def test_bad_predictions_are_named(f, args, words):
    with pytest.raises(ValueError) as e:
        f(*args)
    assert words in str(e.value)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
WHOLE = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, *SIGNED]


@given(
    seed=seeds,
    n=st.integers(1, 9),
    c=st.integers(2, 200),
    label=st.sampled_from(WHOLE),
    weighted=st.booleans(),
    eps=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dtype=st.sampled_from(FLOATS),
)
def test_property_labels_of_every_type(seed, n, c, label, weighted, eps, reduction, dtype):
    "Everything that takes class indices takes them in every type: the same numbers as for int64."
    if label == torch.int8:
        c = min(c, 128)
    logits, y = batch(seed, n, c, dtype=dtype)
    y[0] = c - 1
    small = y.to(label)
    w = torch.linspace(0.5, 2, c).to(dtype) if weighted else None
    wide = w.double() if weighted else None
    want = F.cross_entropy(logits.double(), y, wide, label_smoothing=eps, reduction=reduction)
    for f in (
        partial(smooth_cross_entropy, eps=eps, weight=w, reduction=reduction),
        SmoothCrossEntropy(eps, w, reduction),
    ):
        torch.testing.assert_close(f(logits, small).double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(smooth_targets(small, c, eps), smooth_targets(y, c, eps))
    p = logits.double().softmax(1)
    for f in (ece, brier):
        assert f(p, small) == f(p, y)
    assert nll(p.log(), small) == nll(p.log(), y)
    if label in (torch.uint8, torch.uint16):
        assert torch.equal(small, y.to(label))  # unchanged


ZERO, TRUTHS, ONE_ROW = torch.tensor([0]), torch.tensor([True, False]), torch.randn(1, 4)
# The error, words of its message, the function, and what it is called with.
NONSENSE = [
    (ValueError, "n must be 1 or more, not 0", smooth_targets, ([], 0)),
    (ValueError, "n must be 1 or more", smooth_targets, (torch.zeros(0).long(), -1)),
    (TypeError, "n must be a whole number", smooth_targets, ([0], 5.0)),
    (TypeError, "n must be a whole number", smooth_targets, ([0], True)),
    (TypeError, "the targets must be a tensor or numbers", smooth_targets, ("abc", 5)),
    (TypeError, "not list", smooth_targets, (["a"], 5)),
    (TypeError, "eps must be a number", smooth_targets, ([0], 5, "0.1")),
    (TypeError, "eps must be a number", smooth_targets, ([0], 5, None)),
    (TypeError, "eps must be a number", smooth_targets, ([0], 5, torch.tensor(0.1))),
    (
        ValueError,
        "class 5 is out of range",
        smooth_targets,
        (torch.tensor([5]).to(torch.uint16), 5),
    ),
    (ValueError, "n must be 1 or more", best_gap, (0,)),
    (ValueError, "n must be 1 or more", least_loss, (0,)),
    (TypeError, "n must be", best_gap, ("9",)),
    (TypeError, "the logits must be a tensor or numbers", smooth_cross_entropy, ("abc", ZERO)),
    (TypeError, "the targets must be a tensor or numbers", smooth_cross_entropy, (ONE_ROW, "a")),
    (
        TypeError,
        "weight must be a tensor or numbers",
        partial(smooth_cross_entropy, weight="abcd"),
        (ONE_ROW, ZERO),
    ),
    (ValueError, "infinite", partial(SmoothCrossEntropy, weight=[1.0, math.inf]), ()),
    (TypeError, "weight must be", partial(SmoothCrossEntropy, weight=object()), ()),
    (TypeError, "the predictions must be", fit_temperature, ("abc", ZERO)),
    (TypeError, "the predictions must be", nll, (None, ZERO)),
    (ValueError, "torch.bool", fit_temperature, (torch.eye(2), TRUTHS)),
    (ValueError, "torch.bool", brier, (torch.eye(2), TRUTHS)),
]
for error, values in ((ValueError, (0, -3)), (TypeError, (15.0, "15", True, None))):
    for f in (ece, reliability, reliability_diagram):
        NONSENSE += [(error, "bins must be", f, (torch.eye(4), torch.arange(4), o)) for o in values]


@pytest.mark.parametrize("error, words, f, args", NONSENSE)
def test_what_makes_no_sense_is_named(error, words, f, args):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    with pytest.raises(error) as e:
        f(*args)
    assert words in str(e.value) and plt.get_fignums() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("c", [2, 10, 1000])
def test_rounded_predictions_are_predictions(dtype, c):
    "Half precision leaves the sums of rows a little off 1, and is no reason to refuse them."
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(200, c, generator=g) * 3, torch.randint(c, (200,), generator=g)
    p, logp = logits.softmax(1), logits.log_softmax(1)
    near = partial(pytest.approx, rel=3e-2, abs=2e-2)
    assert brier(p.to(dtype), y) == near(brier(p, y))
    assert nll(logp.to(dtype), y) == near(nll(logp, y))
    assert ece(p.to(dtype), y, 5) == near(ece(p, y, 5), abs=0.1)
    assert reliability(p.to(dtype), y)["share"].sum().item() == pytest.approx(1)


def test_a_diverged_model_is_scored_as_undefined():
    s = score(torch.full((4, 3), math.nan).double(), torch.tensor([0, 1, 2, 0]))
    assert math.isnan(s["nll"]) and math.isnan(s["ece"])


class Known(nn.Module):
    "A model that says of each image what it was told to."

    def __init__(self, answers):
        super().__init__()
        self.answers, self.seen, self.w = answers, 0, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        rows = self.answers[self.seen : self.seen + len(x)]
        self.seen += len(x)
        return F.one_hot(rows, 10) * 9.0 + self.w


@pytest.mark.parametrize(
    "give, label, cls", [("label", 1, 0), ("class", 0, 1), ("other", 0, 0), ("half", 0.5, 0.5)]
)
def test_what_a_model_says_to_wrong_labels(give, label, cls):
    from sota_course.data import get_data, get_dls
    from sota_course.images.drawn import CLASSES, plan

    data = get_data("drawn", n_train=40, n_val=20, noise=0.5, progress=False)
    dls = get_dls(7, 16, data, progress=False)
    rows = {o["path"].rpartition("/")[2]: o for o in plan(40, 20, 42, 0.5)}
    number = {o: dls.vocab.o2i[v] for o, v in CLASSES.items()}
    given, true = (
        torch.tensor([number[rows[o.name][k]] for o in dls.train.items])
        for k in ("label", "clean_label")
    )
    wrong = given != true
    assert 5 < wrong.sum() < 35
    pairs = zip(given.tolist(), true.tolist())
    other = torch.tensor([next(k for k in range(10) if k not in pair) for pair in pairs])
    alternate = torch.where(wrong.cumsum(0) % 2 == 0, given, true)
    answers = dict(label=given, other=other, half=alternate) | {"class": true}
    learn = Learner(dls, Known(answers[give]), loss_func=F.cross_entropy)
    got = on_wrong(learn, lambda o: CLASSES[rows[o.name]["clean_label"]])
    slack = 0.51 / wrong.sum().item() if give == "half" else 1e-9
    assert got["label"] == pytest.approx(label, abs=slack)
    assert got["class"] == pytest.approx(cls, abs=slack)


def test_without_wrong_labels_there_is_nothing_to_say():
    from sota_course.data import get_data, get_dls
    from sota_course.images.drawn import CLASSES, plan

    dls = get_dls(7, 16, get_data("drawn", n_train=40, n_val=20, progress=False), progress=False)
    learn = Learner(dls, Known(torch.zeros(40, dtype=torch.long)), loss_func=F.cross_entropy)
    right = {o["path"].rpartition("/")[2]: CLASSES[o["clean_label"]] for o in plan(40, 20, 42, 0.0)}
    assert on_wrong(learn, lambda o: right[o.name]) == {}


def test_the_diagram():
    import matplotlib

    matplotlib.use("agg")
    logits, y = predictions(2)
    ax = reliability_diagram(logits.softmax(1), y, 10, title="some")
    assert len(ax.patches) == 10 and f"ECE {ece(logits.softmax(1), y, 10):.3f}" in ax.get_title()


# ---- exercises -----------------------------------------------------------------------------------


def q(y, n, eps):
    return smooth_targets(y, n, eps)


def no_log(x, y, e):
    return -(q(y, x.shape[1], e) * x.softmax(1)).sum(1).mean()


def summed(x, y, e):
    return F.cross_entropy(x, y, label_smoothing=e, reduction="sum")


def swapped(x, y, e):
    return F.cross_entropy(x, y, label_smoothing=1 - e)


def others(x, y, e):
    hard = F.one_hot(y, x.shape[1])
    return -((hard * (1 - e) + (1 - hard) * e / (x.shape[1] - 1)) * x.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize(
    "name, answer",
    [
        (1, [0.05, 0.05, 0.85, 0.05]),
        (1, torch.tensor([0.05, 0.05, 0.85, 0.05])),
        (2, lambda x, y, e: F.cross_entropy(x, y, label_smoothing=e)),
        (3, lambda x, y, e: (x.softmax(1) - q(y, x.shape[1], e)) / len(x)),
        (4, 0.275),
        (5, 10 / (math.exp(3) + 9)),
    ],
)
def test_solutions_are_right(name, answer):
    assert check(f"label_smoothing.{name}", answer), check(f"label_smoothing.{name}", answer)


@pytest.mark.parametrize(
    "name, answer, mistake",
    [
        (1, [0.2 / 3, 0.2 / 3, 0.8, 0.2 / 3], "other classes only"),
        (1, [0.05, 0.05, 0.8, 0.05], "don't sum to 1"),
        *[(1, smooth_targets(o, 4, 0.2), "at another class") for o in (0, 1, 3)],
        (1, [0.02, 0.02, 0.82, 0.02], "those of ten classes"),
        (1, [0, 0, 1, 0], "hard target"),
        (1, [0.05, 0.85, 0.05], "shape"),
        (2, no_log, "no logarithm"),
        (2, summed, "sum over the images"),
        (2, swapped, "swapped"),
        (2, others, "other classes only"),
        (2, lambda x, y, e: F.cross_entropy(x, y), "nothing is smoothed"),
        (2, lambda x, y, e: x.nope, "raised AttributeError"),
        (2, 3.0, "must be a function"),
        (3, lambda x, y, e: x.softmax(1) - q(y, 4, e), "gradient of the sum"),
        (3, lambda x, y, e: (q(y, 4, e) - x.softmax(1)) / 3, "wrong way round"),
        (3, lambda x, y, e: (x.softmax(1) - F.one_hot(y, 4)) / 3, "the hard one"),
        (3, lambda x, y, e: (x - q(y, 4, e)) / 3, "logits were compared"),
        (4, 0.075, "all images at once"),
        (4, 0.25, "without their sizes"),
        (4, 0.35, "one image's distance"),
        (4, 27.5, "percent"),
        (4, 0.525, "wholly wrong"),
        (4, 0.175, "wholly right"),
        (5, 10 / (math.exp(3) + 10), "own part"),
        (5, 1 / (math.exp(3) + 1), "without the number of classes"),
        (5, 10 / 1009, "base 10"),
        (5, 9 / (math.exp(3) + 9), "all nine"),
        (1, ..., "no answer yet"),
    ],
)
def test_mistakes_are_named(name, answer, mistake):
    verdict = check(f"label_smoothing.{name}", answer)
    assert not verdict and mistake in verdict.mistake


def test_hints_dont_give_the_answer():
    for n, answer in ((4, 0.075), (5, 10 / 1009)):
        hint = check(f"label_smoothing.{n}", answer).hint
        assert "0.275" not in hint and f"{10 / (math.exp(3) + 9):.3f}" not in hint
