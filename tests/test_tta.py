"""Crops equal to torchvision's, predictions equal to what is done by hand, and the traps of
fastai's tta, ttach and FiveCrop."""

import random
import re
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
import torchvision.transforms.v2.functional as TF2
from fastai.data.load import DataLoader as FastaiLoader
from fastai.losses import (
    BaseLoss,
    BCELossFlat,
    DiceLoss,
    FocalLoss,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from fastai.vision.all import (
    BCEWithLogitsLossFlat,
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    DataLoaders,
    GrandparentSplitter,
    ImageBlock,
    Learner,
    MaskBlock,
    LabelSmoothingCrossEntropy,
    MixedPrecision,
    MultiCategoryBlock,
    Normalize,
    PILImage,
    PILImageBW,
    Pipeline,
    PointBlock,
    RandomCrop,
    Resize,
    TensorImage,
    Transform,
    aug_transforms,
    imagenet_stats,
    parent_label,
    set_seed,
)
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from torchvision.transforms import FiveCrop

from sota_course.baseline import xresnet10
from sota_course.course.exercises import check, exercises
from sota_course.images.decode import image_files
from sota_course.label_smoothing import SmoothCrossEntropy, smooth_cross_entropy
from sota_course.images.cache import load_presized
from sota_course.images.loader import cached_dls
from sota_course.training.models import ACTIVATIONS, _activation
from sota_course.training.runs import Result
from sota_course.training.dense import dense_five_crop, pool_regions, region_weights, split_model
from sota_course.training.views import RATIO, activation_of, rescore, tta_predict
from sota_course.tta import changed_predictions, five_crop, merge_views, ten_crop
from sota_course.tta_checks import PAD_MODES
from sota_course.training.compare import compare

SIZES = [(32, 32), (44, 33), (33, 52), (36, 80), (100, 37)]
mean, std = (torch.tensor(o).view(3, 1, 1) for o in imagenet_stats)
predict = partial(tta_predict, progress=False)
fast = partial(settings, deadline=None)


def photo(seed, w, h):
    a = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(a).resize((w, h), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "16 training and 11 validation photos of two classes and five shapes"
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 16), ("val", 11)):
        for i in range(n):
            f = root / split / ("cat", "dog")[i % 2] / f"{i:02}.jpg"
            f.parent.mkdir(parents=True, exist_ok=True)
            photo(100 * (split == "val") + i, *SIZES[i % 5]).save(f, quality=95)
    return root


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOTA_COURSE_HOME", str(tmp_path))


def net(n_out=2):
    torch.manual_seed(0)
    m = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, n_out),
    )
    m[-1].weight.data.mul_(5)
    return m


def cached(photos, **kwargs):
    return cached_dls(
        photos, **{**dict(bs=4, size=24, stats=imagenet_stats, progress=False), **kwargs}
    )


def block(
    photos,
    item_tfms=Resize(48),
    batch_tfms=None,
    blocks=(ImageBlock, CategoryBlock),
    get_y=parent_label,
    **kwargs,
):
    "fastai's own loaders, as the book makes them"
    if batch_tfms is None:
        batch_tfms = aug_transforms(size=24, min_scale=0.75)
        batch_tfms.append(Normalize.from_stats(*imagenet_stats))
    return DataBlock(
        blocks,
        get_items=image_files,
        get_y=get_y,
        splitter=GrandparentSplitter(valid_name="val"),
        item_tfms=item_tfms,
        batch_tfms=batch_tfms,
    ).dataloaders(photos, bs=4, num_workers=0, **kwargs)


def learner(dls, model=None, loss=None):
    learn = Learner(dls, model or net(dls.c), loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def by_hand(
    model,
    files,
    views=five_crop,
    size=24,
    act=partial(torch.softmax, dim=-1),
    ratio=RATIO,
    method="crop",
):
    "One image after the other, without any loader"
    rows = []
    for f in files:
        x = torch.tensor(load_presized(f, round(size * ratio), method)).permute(2, 0, 1)
        with torch.no_grad():
            rows.append(act(model.eval()(views((x / 255 - mean) / std, size))).mean(0))
    return torch.stack(rows)


# ---- crops ---------------------------------------------------------------------------------------


@fast(max_examples=60)
@given(st.integers(1, 17), st.integers(1, 17), st.data())
def test_crops_are_torchvisions(h, w, data):
    size = data.draw(st.integers(1, min(h, w))), data.draw(st.integers(1, min(h, w)))
    x = torch.rand(2, 3, h, w)
    for ours, theirs in (
        (five_crop, TF.five_crop),
        (five_crop, TF2.five_crop),
        (ten_crop, TF.ten_crop),
        (ten_crop, TF2.ten_crop),
    ):
        assert torch.equal(ours(x, size), torch.stack(theirs(x, size)))
    assert torch.equal(
        ten_crop(x, size, vertical=True), torch.stack(TF.ten_crop(x, size, vertical_flip=True))
    )


@pytest.mark.parametrize(
    "h, w, size", [(224, 256, 224), (375, 500, 224), (81, 108, 64), (5, 8, 4), (7, 7, 4)]
)
def test_crops_of_pil_images_are_the_same(h, w, size):
    img = photo(0, w, h)
    x = torch.from_numpy(np.asarray(img).copy()).permute(2, 0, 1)
    for a, b in zip(ten_crop(x, size), TF.ten_crop(img, size), strict=True):
        assert (a.permute(1, 2, 0).numpy() == np.asarray(b)).all()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool]
)
@pytest.mark.parametrize(
    "shape", [(9, 12), (3, 9, 12), (0, 3, 9, 12), (1, 3, 9, 12), (2, 2, 3, 9, 12)]
)
@pytest.mark.parametrize("size, pad", [(5, None), ((4, 7), None), *((15, o) for o in PAD_MODES)])
def test_types_and_shapes(dtype, shape, size, pad):
    x = torch.randint(0, 2, shape).to(dtype)
    before = x.clone()
    y, side = five_crop(x, size, pad), size if isinstance(size, tuple) else (size, size)
    assert y.dtype == dtype and y.shape == (5, *shape[:-2], *side) and torch.equal(x, before)
    assert ten_crop(x, size, pad=pad).shape == (10, *shape[:-2], *side)


def test_channels_last_and_subclasses():
    x = torch.rand(2, 3, 9, 11)
    assert torch.equal(five_crop(x.to(memory_format=torch.channels_last), 5), five_crop(x, 5))
    assert isinstance(five_crop(TensorImage(x), 5), TensorImage)


@fast(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 20), st.sampled_from(PAD_MODES))
def test_padding(h, w, size, pad):
    x = torch.arange(1.0, h * w + 1).view(1, h, w)
    y = five_crop(x, size, pad)
    assert y.shape == (5, 1, size, size)
    if pad == "zeros" and size >= max(h, w):
        assert torch.equal(y[4], TF.center_crop(x, size))
    if pad == "reflection" and (size - min(h, w) + 1) // 2 < min(h, w) and size >= max(h, w):
        top, left = (size - h) // 2, (size - w) // 2
        sides = (left, size - w - left, top, size - h - top)
        assert torch.equal(y[0], F.pad(x[None], sides, mode="reflect")[0])
    if pad != "zeros":
        assert set(y.unique().tolist()) <= set(x.unique().tolist())


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((torch.zeros(3, 8, 8), 9), ValueError, "9 x 9 doesn't fit into 8 x 8"),
        ((torch.zeros(8, 8, 3), 4), ValueError, "channels last"),
        ((torch.zeros(3, 8, 8), 0), ValueError, "at least 1"),
        ((torch.zeros(3, 8, 8), 2.5), ValueError, "whole number"),
        ((torch.zeros(3, 8, 8), (1, 2, 3)), ValueError, "height, width"),
        ((torch.zeros(3, 8, 8), True), ValueError, "whole number"),
        ((np.zeros((8, 8)), 4), TypeError, "not from ndarray"),
        ((PIL.Image.new("RGB", (8, 8)), 4), TypeError, "to_tensor"),
        ((torch.zeros(8), 4), TypeError, "height, width"),
        ((torch.zeros(3, 0, 8), 4, "zeros"), ValueError, "doesn't fit into 0 x 8"),
        ((torch.zeros(3, 8, 8), 4, "mirror"), ValueError, "pad must be"),
    ],
)
def test_bad_crops(args, error, words):
    with pytest.raises(error, match=words):
        five_crop(*args)
    kwargs = dict(pad=args[2]) if len(args) == 3 else {}
    with pytest.raises(error, match=words):
        ten_crop(*args[:2], **kwargs)


# ---- merging -------------------------------------------------------------------------------------


@fast(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 7), st.sampled_from(["mean", "max"]))
def test_rows_sum_to_one(v, n, c, reduce):
    p = (torch.randn(v, n, c) * 4).softmax(-1)
    out = merge_views(p, reduce)
    assert out.shape == (n, c) and torch.allclose(out.sum(-1), torch.ones(n))
    assert torch.allclose(merge_views(p[torch.randperm(v)], reduce), out, atol=1e-6)


def test_maximum_forgets_how_many():
    p = torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]], [[0.4, 0.6]]])
    assert merge_views(p)[0, 0] > 0.5
    assert torch.allclose(merge_views(p, "max"), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    "loss, act",
    [
        (nn.CrossEntropyLoss(), "softmax"),
        (F.cross_entropy, "softmax"),
        (partial(F.cross_entropy, label_smoothing=0.1), "softmax"),
        (CrossEntropyLossFlat(), "softmax"),
        (LabelSmoothingCrossEntropy(), "softmax"),
        (None, "softmax"),
        (nn.NLLLoss(), "exp"),
        (nn.BCEWithLogitsLoss(), "sigmoid"),
        (BCEWithLogitsLossFlat(), "sigmoid"),
        (F.binary_cross_entropy_with_logits, "sigmoid"),
    ],
)
def test_activations(loss, act):
    x = torch.randn(3, 4)
    assert torch.allclose(
        activation_of(loss)(x), x.softmax(-1) if act == "softmax" else getattr(torch, act)(x)
    )


def test_an_unknown_loss_is_an_error():
    def my_loss(pred, y):
        return pred.sum()

    with pytest.raises(ValueError, match="my_loss isn't known.*act="):
        activation_of(my_loss)


# ---- on loaders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "views, cut",
    [
        ("five", five_crop),
        ("ten", ten_crop),
        ("centre", lambda x, s: five_crop(x, s)[4:]),
        ("flip", lambda x, s: ten_crop(x, s)[[4, 9]]),
        ("whole", lambda x, s: x[None]),
        (lambda x, s: five_crop(x, s)[:2], lambda x, s: five_crop(x, s)[:2]),
    ],
)
@pytest.mark.parametrize("make", [cached, block], ids=["cached", "fastai"])
def test_the_learner_does_what_is_done_by_hand(photos, make, views, cut):
    learn = learner(make(photos))
    p, y = learn.five_crop_tta(views=views)
    q, targets = learn.get_preds()
    assert torch.equal(y, targets) and p.shape == q.shape and (p.sum(1) - 1).abs().max() < 1e-5
    slack = 0.1 if make is cached else 1e-5  # a cached image was resized twice
    assert (p - by_hand(learn.model, learn.dls.valid.items, cut)).abs().max() < slack


def test_the_cache_is_used_as_it_is(photos):
    learn = learner(cached(photos))
    p, _ = learn.five_crop_tta(ratio=30 / 24)
    assert (p - by_hand(learn.model, learn.dls.valid.items, ratio=30 / 24)).abs().max() < 1e-5
    more, _ = learn.five_crop_tta(ratio=1.5)  # larger than the cache has them: decoded anew
    assert (more - by_hand(learn.model, learn.dls.valid.items, ratio=1.5)).abs().max() < 1e-5


def test_what_beta_means(photos):
    learn = learner(block(photos))
    p, q = learn.five_crop_tta()[0], learn.get_preds()[0]
    mixed, y = learn.five_crop_tta(beta=0.25)
    assert torch.allclose(mixed, torch.lerp(p, q, 0.25), atol=1e-5)
    assert torch.equal(y, learn.get_preds()[1])
    assert torch.allclose(learn.five_crop_tta(beta=1.0)[0], q, atol=1e-5)
    (views, plain), _ = learn.five_crop_tta(beta=None)
    assert torch.allclose(views, p, atol=1e-6) and torch.allclose(plain, q, atol=1e-5)
    m = learn.five_crop_tta(reduce="max", beta=0.25)[0]
    assert torch.allclose(m.sum(1), torch.ones(len(m)))
    assert not torch.allclose(m, learn.five_crop_tta(reduce="max")[0])


def test_fastais_maximum_ignores_beta_and_leaves_sums_above_one(photos):
    learn = learner(block(photos))
    set_seed(0)
    a = learn.tta(use_max=True, beta=0.0)[0]
    set_seed(0)
    b = learn.tta(use_max=True, beta=1.0)[0]
    assert torch.equal(a, b) and a.sum(1).max() > 1.01


def test_each_file_is_opened_once(photos, monkeypatch):
    learn, opened, pil_open = learner(block(photos)), [], PIL.Image.open

    def noting(*args, **kwargs):
        opened.append(1)
        return pil_open(*args, **kwargs)

    learn.five_crop_tta()
    monkeypatch.setattr(PIL.Image, "open", noting)
    learn.five_crop_tta(views="ten")
    ours, n = len(opened), len(learn.dls.valid.items)
    learn.tta()
    assert n <= ours <= n + 4, "a few more to see what the loader feeds"
    assert len(opened) - ours >= 5 * n


def test_a_crop_in_place_of_the_item_transforms(photos):
    """fastai: what is given is all that is left of the pipeline, the conversions to tensors and to
    floats included."""
    learn = learner(block(photos))

    class Five(Transform):
        def encodes(self, x: PILImage):
            return torch.stack([TF.to_tensor(o) for o in FiveCrop(24)(x)])

    with pytest.raises(TypeError, match="batch must contain tensors.*PILImage"):
        learn.tta(item_tfms=Resize(24), batch_tfms=[])
    with pytest.raises(RuntimeError, match=r"3D .* or 4D .* got input of size: .4, 5, 3, 24, 24"):
        learn.tta(item_tfms=Five())  # five views have an axis of their own
    assert learn.five_crop_tta()[0].shape == (11, 2)


def test_without_resize_a_crop_has_the_files_own_pixels(tmp_path):
    "Trap: `RandomCrop` in place of `Resize` cuts a small window out of a large photo."
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "large" / split / name).mkdir(parents=True)
            photo(i, 480, 360).save(tmp_path / "large" / split / name / "0.png")

    def fed(*tfms):
        blocks = DataBlock(
            (ImageBlock, CategoryBlock),
            get_items=image_files,
            get_y=parent_label,
            splitter=GrandparentSplitter(valid_name="val"),
            item_tfms=tfms,
            batch_tfms=[],
        )
        dls = blocks.dataloaders(tmp_path / "large", bs=2, num_workers=0)
        return dls.valid.one_batch()[0].as_subclass(torch.Tensor)

    def of_file(cut):
        files = sorted((tmp_path / "large" / "val").rglob("*.png"))
        return torch.stack([cut(TF.to_tensor(PIL.Image.open(f))) for f in files])

    native = of_file(lambda x: TF.center_crop(x, 24))
    assert (fed(RandomCrop(24)) - native).abs().max() < 1e-5
    whole = of_file(lambda x: TF.resize(TF.center_crop(x, 360), 24, antialias=True))
    assert (fed(Resize(24)) - whole).abs().mean() < 0.05 < (native - whole).abs().mean()


def test_five_crop_in_fastais_pipeline_meets_the_label():
    "A plain function is applied to every element of the item."
    img, pipe = PIL.Image.new("RGB", (8, 8)), Pipeline([FiveCrop(4)])
    assert [o.size for o in pipe((img,))[0]] == [(4, 4)] * 5
    with pytest.raises(TypeError, match="Tensor is not a torch image"):
        pipe((img, torch.tensor(1)))


def test_ttach_orders_crops_otherwise_and_averages_logits():
    ttach = pytest.importorskip("ttach")
    x = torch.randn(2, 3, 9, 12)

    def theirs(x, size):
        return [o.augment_image(x) for o in ttach.aliases.five_crop_transform(size, size)]

    ours, crops = five_crop(x, 4), theirs(x, 4)
    assert all(torch.equal(ours[i], crops[j]) for i, j in ((0, 0), (1, 3), (2, 1), (3, 2)))
    assert not torch.equal(ours[1], crops[1])
    square, odd = x[..., :9, :9], x[..., :7, :7]
    assert torch.equal(five_crop(square, 5)[4], theirs(square, 5)[4])
    assert not torch.equal(five_crop(odd, 4)[4], theirs(odd, 4)[4])
    model = net().eval()
    big = torch.randn(4, 3, 30, 30) * 5
    wrapper = ttach.ClassificationTTAWrapper(model, ttach.aliases.five_crop_transform(24, 24))
    with torch.no_grad():
        merged = wrapper(big)
        logits = model(five_crop(big, 24).flatten(0, 1)).view(5, 4, 2)
    assert torch.allclose(merged, logits.mean(0), atol=1e-5)
    assert not torch.allclose(merged.softmax(-1), predict(model, big, size=24)[0], atol=1e-4)


def test_squishing_stays_squishing(photos):
    learn = learner(block(photos, item_tfms=Resize(48, method="squish")))
    right = by_hand(learn.model, learn.dls.valid.items, method="squish")
    assert (learn.five_crop_tta()[0] - right).abs().max() < 1e-5


def test_the_learner_is_left_as_it_was(photos):
    learn = learner(block(photos))
    learn.model.train()
    learn.model[1].eval()
    state = learn.dls.valid.rng.getstate()
    rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.five_crop_tta()
    assert learn.model.training
    assert not learn.model[1].training
    assert learn.dls.valid.rng.getstate() == state
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == random.getstate()
    assert (rng[2] == np.random.get_state()[1]).all()
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_the_training_set_in_order(photos):
    for make in (cached, block):
        learn = learner(make(photos))
        p, y = learn.five_crop_tta(ds_idx=0)
        assert len(p) == 16
        assert [learn.dls.vocab[o] for o in y] == [f.parent.name for f in learn.dls.train.items]


def test_the_training_sets_plain_prediction_is_not_augmented(photos):
    "And nobody's random numbers are used up for it."
    for make in (cached, block):
        learn = learner(make(photos))

        def states():
            return (
                torch.get_rng_state(),
                random.getstate(),
                np.random.get_state()[1].tolist(),
                learn.dls.train.rng.getstate(),
            )

        before = states()
        p, _ = learn.five_crop_tta(ds_idx=0, beta=1.0)
        after = states()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        assert learn.dls.train_ds.split_idx == 0
        with learn.dls.train_ds.set_split_idx(1):
            q, _ = learn.get_preds(dl=learn.dls.train.new(shuffle=False, drop_last=False))
        assert torch.allclose(p, q, atol=1e-5)
        assert torch.allclose(learn.five_crop_tta(ds_idx=0, beta=1.0)[0], p, atol=1e-6)
        first, second = (learn.get_preds(ds_idx=0)[0] for _ in range(2))
        assert not torch.allclose(first, second, atol=1e-3), "fastai's own are augmented"


def test_files_and_test_loaders(photos):
    for make in (cached, block):
        learn = learner(make(photos))
        files = image_files(photos / "val")[::-1]
        p, y = learn.five_crop_tta(dl=files)
        assert y is None
        assert (p - by_hand(learn.model, files)).abs().max() < (0.1 if make is cached else 1e-5)
        assert torch.allclose(learn.five_crop_tta(dl=learn.dls.test_dl(files))[0], p, atol=1e-6)
        labelled = learn.dls.test_dl(files, with_labels=True)
        assert torch.equal(learn.five_crop_tta(dl=labelled)[1], learn.get_preds(dl=labelled)[1])


def test_multi_label(photos):
    dls = block(
        photos,
        blocks=(ImageBlock, MultiCategoryBlock(vocab=["cat", "dog", "fox"])),
        get_y=lambda o: [o.parent.name, "fox"],
    )
    learn = learner(dls, net(3), BCEWithLogitsLossFlat())
    for loss in (BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()):
        learn.loss_func = loss
        p, y = learn.five_crop_tta()
        assert torch.equal(y, learn.get_preds()[1])
        assert (p - by_hand(learn.model, dls.valid.items, act=torch.sigmoid)).abs().max() < 1e-5
        highest, _ = learn.five_crop_tta(reduce="max")
        assert (highest >= p - 1e-6).all() and highest.max() <= 1  # not divided by its sum


def test_a_loss_without_activation(photos):
    learn = learner(block(photos), loss=nn.CrossEntropyLoss())
    assert (learn.five_crop_tta()[0].sum(1) - 1).abs().max() < 1e-5
    assert (learn.tta()[0].sum(1) - 1).abs().max() > 0.01  # fastai's gives logits
    learn.loss_func = lambda pred, y: pred.sum()
    with pytest.raises(ValueError, match="act="):
        learn.five_crop_tta()
    assert learn.five_crop_tta(act=torch.sigmoid)[0].shape == (11, 2)


@pytest.mark.parametrize("loss", [nn.NLLLoss(), F.nll_loss, nn.CrossEntropyLoss()])
def test_the_maximum_is_a_distribution_where_the_loss_wants_one(photos, loss):
    learn = learner(block(photos), nn.Sequential(net(), nn.LogSoftmax(-1)), loss)
    for views in ("five", "ten"):
        p = learn.five_crop_tta(views=views, reduce="max")[0]
        assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)


def test_other_transforms_stay(photos):
    class Dark(Transform):
        def encodes(self, x: PILImage):
            return PILImage.create((np.asarray(x) // 2).astype(np.uint8))

    class Relabel(Transform):
        order = 200

        def encodes(self, x: TensorImage):
            return x * 0

    dark, plain = learner(block(photos, item_tfms=[Resize(48), Dark()])), learner(block(photos))
    dark.model = plain.model
    assert not torch.allclose(dark.five_crop_tta()[0], plain.five_crop_tta()[0], atol=1e-3)
    zero = learner(block(photos, batch_tfms=[*aug_transforms(size=24), Relabel()]), plain.model)
    p = zero.five_crop_tta()[0]
    assert torch.allclose(p, p[:1].expand_as(p), atol=1e-6)


def test_grey_images_go_by_batches(photos):
    dls = block(photos, blocks=(ImageBlock(PILImageBW), CategoryBlock), batch_tfms=[])
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    learn = learner(dls, model)
    with pytest.raises(ValueError, match="pass size="):
        learn.five_crop_tta()
    p, y = learn.five_crop_tta(size=24)
    assert p.shape == (11, 2) and torch.equal(y, learn.get_preds()[1])


def test_any_loader_of_tensors():
    x, y, model = torch.randn(10, 3, 30, 37), torch.arange(10), net()
    with torch.no_grad():
        right = model.eval()(five_crop(x, 24).flatten(0, 1)).view(5, 10, 2).softmax(-1).mean(0)
    p, t = predict(model, DataLoader(TensorDataset(x, y), batch_size=3), size=24)
    assert torch.allclose(p, right, atol=1e-5) and torch.equal(t, y)
    p, t = predict(
        model, DataLoader(TensorDataset(x, y, y + 1), batch_size=3, shuffle=True), size=24, beta=0.5
    )
    assert torch.equal(t[1], t[0] + 1)
    assert torch.allclose(p, predict(model, x, size=24, beta=0.5)[0][t[0]], atol=1e-5)
    assert predict(model, x, size=24)[1] is None and model.training is False


def test_lists_of_many_shapes():
    model, xs = net(), [torch.randn(3, *o) for o in SIZES * 2]
    p, _ = predict(model, xs, size=24, bs=4)
    assert torch.allclose(
        p, torch.cat([predict(model, o[None], size=24)[0] for o in xs]), atol=1e-5
    )


def test_views_of_ones_own():
    model, xs, sizes = net(), [torch.randn(3, *o) for o in SIZES], []

    def some(x, size):
        sizes.append(size)
        return five_crop(x, size)[:3]

    def fewer_of_tall_ones(x, size):
        return five_crop(x, size)[: 5 if x.shape[-2] < 50 else 2]

    one_by_one = torch.cat([predict(model, o[None], some, size=24)[0] for o in xs])
    assert torch.allclose(predict(model, xs, some, size=24)[0], one_by_one, atol=1e-5)
    assert set(sizes) == {(24, 24)}
    words = r"same number of views.*5 were cut from \d+ x \d+ pixels, 2 were cut from 100 x 37"
    with pytest.raises(ValueError, match=words):
        predict(model, xs, fewer_of_tall_ones, size=24)
    with pytest.raises(ValueError, match="at least 1: 0 were cut"):
        predict(model, xs, lambda x, size: [], size=24)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("views", ["five", "ten", "whole", "dense"])
def test_few_images(n, views):
    p, _ = predict(xresnet10(4), torch.randn(n, 3, 40, 48), views, size=32)
    assert p.shape == (n, 4)


def test_nan_stays_where_it_is():
    x, model = torch.randn(3, 3, 30, 30), net()
    clean = predict(model, x, size=24)[0]
    x[1] = float("nan")
    for reduce in ("mean", "max"):
        p = predict(model, x, size=24, reduce=reduce)[0]
        assert p[1].isnan().all() and not p[[0, 2]].isnan().any()
    assert torch.allclose(predict(model, x, size=24)[0][[0, 2]], clean[[0, 2]])


def test_half_precision(photos):
    x, model = torch.randn(4, 3, 30, 30), net()
    p = predict(model, x, size=24)[0]
    assert (predict(net().bfloat16(), x, size=24)[0] - p).abs().max() < 0.1
    assert predict(net().bfloat16(), x, size=24)[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (predict(model, x, size=24)[0] - p).abs().max() < 0.1
    assert predict(model, x.half(), size=24)[0].dtype == torch.float32
    learn = learner(block(photos))
    q = learn.five_crop_tta()[0]
    assert torch.allclose(learn.add_cb(MixedPrecision()).five_crop_tta()[0], q, atol=0.05)


def test_channels_last_batches():
    x, model = torch.randn(4, 3, 30, 33), net()
    last = x.to(memory_format=torch.channels_last)
    p, q = (predict(model, o, size=24)[0] for o in (last, x))
    assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(photos):
    learn = learner(block(photos))
    p, y = learn.five_crop_tta()
    assert p.device.type == "cpu"
    assert (p - by_hand(learn.model.cpu(), learn.dls.valid.items)).abs().max() < 1e-2


def test_never_more_than_a_batch_ahead(photos, monkeypatch):
    from sota_course.training import views

    loaded, most = [], []

    def load(i):
        loaded.append(i)
        return i

    for k, _ in enumerate(views._ahead(load, 40, 4)):
        most.append(len(loaded) - 4 * k)
    assert max(most) <= 8 and sorted(loaded) == list(range(40))


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        (dict(views="six"), ValueError, "views must be centre"),
        (dict(reduce="median"), ValueError, "mean or max"),
        (dict(beta=1.5), ValueError, "from 0 to 1"),
        (dict(size=None), ValueError, "pass size="),
        (dict(ratio=1.2), ValueError, "loaders of files"),
        (dict(ratio=0.5), ValueError, "at least 1"),
        (dict(size=99), ValueError, "doesn't fit"),
        (dict(dl=torch.zeros(3, 30, 30)), ValueError, r"x\[None\]"),
        (dict(dl=[]), ValueError, "no images"),
        (dict(dl=torch.zeros(2, 3, 30, 30, dtype=torch.uint8)), TypeError, "normalize them"),
        (dict(dl=["a.jpg"]), TypeError, "holds tensors"),
        (dict(dl=None), ValueError, "no images"),
        (dict(dl=[{"x": 1}]), TypeError, "holds tensors"),
        (dict(dl=DataLoader([{"x": torch.zeros(3)}])), TypeError, "must be a tensor"),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        predict(net(), **{**dict(dl=torch.zeros(2, 3, 30, 30), size=24), **kwargs})


def test_what_is_no_classifier():
    with pytest.raises(TypeError, match="not function"):
        tta_predict(lambda x: x, torch.zeros(1, 3, 8, 8), size=4)
    with pytest.raises(ValueError, match="a row of outputs"):
        predict(nn.Conv2d(3, 2, 3), torch.zeros(1, 3, 8, 8), size=4)
    with pytest.raises(ValueError, match="act=torch.sigmoid"):
        predict(net(1), torch.zeros(1, 3, 30, 30), size=24)
    assert predict(net(1), torch.zeros(1, 3, 30, 30), size=24, act=torch.sigmoid)[0].shape == (1, 1)


# ---- any loss, any views, any batch size -------------------------------------------------------
# The reference looks at one image at a time and at one crop of it at a time, applies the
# activation to a single row, and merges in double precision.


def rows(x):
    return x.softmax(1)


def as_is(x):
    return x


EXCLUSIVE = [
    None,
    SmoothCrossEntropy(),
    SmoothCrossEntropy(eps=0.0, weight=torch.ones(3)),
    partial(SmoothCrossEntropy(), reduction="none"),
    smooth_cross_entropy,
    partial(smooth_cross_entropy, eps=0.2),
    CrossEntropyLossFlat(),
    CrossEntropyLossFlat(axis=1),
    partial(CrossEntropyLossFlat(axis=1)),
    FocalLoss(),
    FocalLossFlat(),
    FocalLossFlat(axis=1),
    LabelSmoothingCrossEntropy(),
    LabelSmoothingCrossEntropyFlat(),
    LabelSmoothingCrossEntropyFlat(axis=1),
    DiceLoss(),
    BaseLoss(nn.CrossEntropyLoss),
    BaseLoss(nn.CrossEntropyLoss, axis=1),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    F.cross_entropy,
    partial(partial(F.cross_entropy, label_smoothing=0.1), reduction="sum"),
]
LOG_PROBABILITIES = [
    nn.NLLLoss(),
    F.nll_loss,
    partial(F.nll_loss, reduction="sum"),
    BaseLoss(nn.NLLLoss),
]
MULTI_LABEL = [
    BCEWithLogitsLossFlat(),
    BaseLoss(nn.BCEWithLogitsLoss),
    nn.BCEWithLogitsLoss(),
    F.binary_cross_entropy_with_logits,
    nn.MultiLabelSoftMarginLoss(),
    F.multilabel_soft_margin_loss,
]
NUMBERS = [MSELossFlat(), L1LossFlat(), nn.MSELoss(), nn.L1Loss(), F.mse_loss, F.l1_loss]
ALREADY = [BCELossFlat(), nn.BCELoss(), F.binary_cross_entropy]
# For each loss: the activation of a row, what ends the network, whether rows sum to 1.
KNOWN = (
    [(o, rows, nn.Identity, True) for o in EXCLUSIVE]
    + [(o, torch.exp, partial(nn.LogSoftmax, 1), True) for o in LOG_PROBABILITIES]
    + [(o, torch.sigmoid, nn.Identity, False) for o in MULTI_LABEL]
    + [(o, as_is, nn.Identity, False) for o in NUMBERS]
    + [(o, as_is, nn.Sigmoid, False) for o in ALREADY]
)
UNKNOWN = [
    nn.MultiMarginLoss(),
    nn.HingeEmbeddingLoss(),
    nn.KLDivLoss(),
    nn.PoissonNLLLoss(),
    F.multi_margin_loss,
    F.kl_div,
    BaseLoss(nn.MultiMarginLoss),
    partial(F.gaussian_nll_loss),
    lambda pred, y: pred.sum(),
]
NAMED = {"centre": [4], "flip": [4, 9], "five": range(5), "ten": range(10)}


def small_net(last=nn.Identity):
    "What it says of two crops differs."
    torch.manual_seed(3)
    m = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
        last(),
    ).eval()
    m[5].weight.data.mul_(20)
    return m


def places(h, w, th, tw):
    middle = round((h - th) / 2), round((w - tw) / 2)
    return [(0, 0), (0, w - tw), (h - th, 0), (h - th, w - tw), middle]


def crops_of(x, size, views):
    "A list of single crops (1, 3, height, width) of a single image; or the image alone."
    if views == "whole":
        return [x[None]]
    (th, tw), crops = size, []
    for o in (x, x.flip(-1)):
        for top, left in places(*x.shape[-2:], th, tw):
            crops.append(o[None, :, top : top + th, left : left + tw])
    return [crops[i] for i in ([3, 0] if callable(views) else NAMED[views])]


def plain_of(x, size):
    "The largest part in the middle that has the shape of `size`, at `size`."
    (h, w), (th, tw) = x.shape[-2:], size
    scale = min(h / th, w / tw)
    ch, cw = round(th * scale), round(tw * scale)
    top, left = places(h, w, ch, cw)[-1]
    middle = x[None, :, top : top + ch, left : left + cw]
    return F.interpolate(middle, size, mode="bilinear", antialias=True)


def merged(ps, reduce, exclusive):
    p = torch.cat(ps).double()
    if reduce == "mean":
        return p.mean(0)
    return p.amax(0) / p.amax(0).sum() if exclusive else p.amax(0)


@torch.no_grad()
def brute_force(model, xs, size, views, act, reduce, beta, exclusive):
    "A table for each prediction that is asked for: one, or two where `beta` is None."
    out = []
    for x in xs:
        if views == "dense":
            outputs = dense_five_crop(model, x[None], size)
        else:
            outputs = [model(o) for o in crops_of(x, size, views)]
        plain = act(model(plain_of(x, size)))[0].double()
        seen = merged([act(o) for o in outputs], reduce, exclusive)
        out.append((seen, plain) if beta is None else [(1 - beta) * seen + beta * plain])
    return list(map(torch.stack, zip(*out)))


def same(got, right):
    for a, b in zip(got if isinstance(got, tuple) else [got], right, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() < 2e-5 * max(1, b.abs().max())


def two(x, size):
    return five_crop(x, size)[[3, 0]]


class Pairs:
    def __init__(self, xs):
        self.xs = xs

    def __len__(self):
        return len(self.xs)

    def __getitem__(self, i):
        return self.xs[i], torch.tensor(i)


def learner_of(xs, model, loss, bs):
    dls = DataLoaders(*(FastaiLoader(Pairs(xs), bs=bs) for _ in range(2)))
    dls.c = 3
    learn = Learner(dls, model, loss_func=nn.MSELoss())
    learn.loss_func = loss
    return learn


@given(
    known=st.sampled_from(KNOWN),
    views=st.sampled_from([*NAMED, "whole", "dense", two]),
    reduce=st.sampled_from(["mean", "max"]),
    beta=st.sampled_from([0.0, 0.25, 1.0, None]),
    n=st.integers(1, 6),
    bs=st.integers(1, 7),
    shape=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    size=st.tuples(st.integers(4, 7), st.integers(4, 7)),
    source=st.sampled_from(["tensor", "list", "loader", "learner"]),
)
def test_property_views_are_one_crop_at_a_time(
    known, views, reduce, beta, n, bs, shape, size, source
):
    loss, act, last, exclusive = known
    model = small_net(last)
    xs = torch.randn(n, 3, *shape, generator=torch.Generator().manual_seed(n))
    learn, loader = learner_of(xs, model, loss, bs), DataLoader(Pairs(xs), batch_size=bs)
    dl = dict(tensor=xs, list=list(xs), loader=loader, learner=learn.dls.valid)[source]
    kwargs = dict(views=views, reduce=reduce, beta=beta, size=size)
    if source in ("tensor", "list"):
        kwargs["bs"] = bs
    for who in (learn, model) if act is rows else (learn,):
        if loss in NUMBERS and reduce == "max":
            with pytest.raises(ValueError, match='leaves outputs as they are.*reduce="mean"'):
                predict(who, dl, **kwargs)
            continue
        p, y = predict(who, dl, **kwargs)
        same(p, brute_force(model, xs, size, views, act, reduce, beta, exclusive))
        if source in ("loader", "learner"):
            assert torch.equal(y, torch.arange(n))


@given(
    known=st.sampled_from(KNOWN),
    views=st.sampled_from(["flip", "five", "ten", "whole", "dense", two]),
    sides=st.lists(st.tuples(st.integers(6, 9), st.integers(6, 9)), min_size=1, max_size=5),
    bs=st.integers(1, 6),
)
def test_property_shapes_mixed_in_a_batch_change_nothing(known, views, sides, bs):
    loss, act, last, exclusive = known
    model = small_net(last)
    xs = [torch.randn(3, *o) for o in sides]
    p, _ = predict(learner_of(xs, model, loss, 1), xs, views, beta=0.5, size=(6, 5), bs=bs)
    same(p, brute_force(model, xs, (6, 5), views, act, "mean", 0.5, exclusive))


@pytest.mark.parametrize(
    "loss", [SmoothCrossEntropy(), CrossEntropyLossFlat(axis=1), FocalLossFlat(axis=1), DiceLoss()]
)
@pytest.mark.parametrize("make", [cached, block], ids=["cached", "fastai"])
def test_the_batch_size_changes_nothing_on_files(photos, make, loss):
    learn = learner(make(photos), loss=loss)
    right = by_hand(learn.model, learn.dls.valid.items, ratio=30 / 24, act=rows)
    for bs in (1, 4, 5, 11):
        p, _ = learn.five_crop_tta(ratio=30 / 24, bs=bs)
        assert (p - right).abs().max() < 1e-5


@pytest.mark.parametrize("loss", UNKNOWN)
def test_a_loss_that_says_nothing_of_probabilities_is_an_error(loss):
    with pytest.raises(ValueError, match="isn't known.*act="):
        activation_of(loss)
    learn = learner_of(torch.zeros(2, 3, 8, 8), small_net(), loss, 2)
    with pytest.raises(ValueError, match="act="):
        predict(learn, size=6)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss,
        CrossEntropyLossFlat,
        SmoothCrossEntropy,
        partial(nn.CrossEntropyLoss, label_smoothing=0.1),
    ],
)
def test_a_class_is_no_loss_yet(loss):
    name = getattr(loss, "__name__", "CrossEntropyLoss")
    with pytest.raises(ValueError, match=rf"{name} is a class.*{name}\(\)"):
        activation_of(loss)


@pytest.mark.parametrize(
    "act",
    [
        partial(torch.softmax, dim=0),
        CrossEntropyLossFlat(axis=0).activation,
        CrossEntropyLossFlat(axis=-2).activation,
        lambda x: x / x.max(),
        lambda x: x - x.mean(0),
        lambda x: x.flip(0),
        lambda x: x.softmax(-1) * len(x),
        nn.Dropout(0.5),
        torch.rand_like,
    ],
)
def test_an_activation_that_mixes_images_is_refused(act):
    for n in (1, 5):
        for views in ("centre", "five"):
            with pytest.raises(ValueError, match="depends on the other images, or on chance"):
                predict(small_net(), torch.randn(n, 3, 9, 9), views, size=6, act=act)


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda x: x.argmax(-1), "a row for each image"),
        (lambda x: x.sum(), "a row for each image"),
        (lambda x: x.tolist(), "a row for each image"),
        (partial(torch.softmax, dim=2), "can't be applied.*Dimension out of range"),
        (nn.Linear(4, 4), "can't be applied"),
        (nn.BatchNorm1d(3), "can't be applied"),
    ],
)
def test_an_activation_that_cant_be_applied_is_refused(act, words):
    with pytest.raises(ValueError, match=words):
        predict(small_net(), torch.randn(2, 3, 9, 9), size=6, act=act)


def test_many_labels_are_no_distribution():
    "With ten thousands of labels the sigmoids of small probabilities sum to nearly 1."
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 30_000))
    x = torch.randn(2, 3, 9, 9)
    p, _ = predict(model, x, size=6, act=torch.sigmoid, reduce="max")
    with torch.no_grad():
        each = torch.stack([model(o).sigmoid() for o in five_crop(x, 6)])
    assert torch.allclose(p, each.amax(0), atol=1e-6)
    for act, last in ((None, nn.Identity()), (torch.exp, nn.LogSoftmax(1))):
        p, _ = predict(nn.Sequential(model, last), x, size=6, act=act, reduce="max")
        assert torch.allclose(p.sum(1), torch.ones(2), atol=1e-4)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_outputs_that_are_no_log_probabilities_are_refused(reduce):
    class Below(nn.Module):
        def forward(self, x):
            return -x.abs()

    x = torch.randn(2, 3, 9, 9)
    for last, words in ((nn.Identity, "from 0 to 1"), (Below, "rows of probabilities sum to 1")):
        with pytest.raises(ValueError, match=words):
            predict(small_net(last), x, size=6, act=torch.exp, reduce=reduce)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_models_of_other_types_have_a_plain_prediction(dtype, beta):
    x = torch.randn(2, 3, 9, 9)
    right = predict(small_net(), x, size=6, beta=beta)[0]
    got = predict(small_net().to(dtype), x, size=6, beta=beta)[0]
    assert got.dtype == torch.float32
    assert (got - right).abs().max() < (1e-6 if dtype == torch.float64 else 0.2)


# ---- what a saved model's card says of it ------------------------------------------------------


@given(known=st.sampled_from(KNOWN), n=st.integers(2, 40))
def test_property_a_card_names_the_activation_of_the_loss(known, n):
    loss, act, last, exclusive = known
    if isinstance(loss, SmoothCrossEntropy) and loss.weight is not None:
        n = 3
    if act is as_is:
        with pytest.raises(ValueError, match="activation="):
            _activation(loss, n)
        return
    x = torch.randn(5, n).log_softmax(1)
    with torch.no_grad():
        right = torch.cat([act(o) for o in x.split(1)])
    assert torch.allclose(ACTIVATIONS[_activation(loss, n)](x), right, atol=1e-6)


class Scaled(nn.Module):
    "A loss with a temperature for each of four classes."

    def __init__(self, t):
        super().__init__()
        self.t = torch.tensor(t)

    def activation(self, x):
        return (x / self.t).softmax(-1)


class Topped(nn.Module):
    "Softmax of what is below 0, so that it differs from softmax above it only."

    def activation(self, x):
        return x.clamp(max=0).softmax(-1)


@pytest.mark.parametrize("loss", [*UNKNOWN, Scaled([2.0]), Topped(), CrossEntropyLossFlat(axis=0)])
def test_a_card_refuses_what_it_has_no_name_for(loss):
    with pytest.raises(ValueError, match="activation=|what act makes"):
        _activation(loss, 4)


def test_a_card_tries_as_many_classes_as_there_are():
    assert _activation(Scaled([1.0] * 4), 4) == "softmax"
    with pytest.raises(ValueError, match="can't be applied to outputs"):
        _activation(Scaled([1.0] * 4), 3)


# ---- what can't be merged ----------------------------------------------------------------------


def views_of(fill):
    return torch.full((2, 2, 3), fill)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(
    "p, error, words",
    [
        (torch.ones(0, 2, 3), ValueError, "no views"),
        (views_of(0.0), ValueError, "rows of probabilities sum to 1"),
        (views_of(0.5), ValueError, "distribution=False"),
        (views_of(float("inf")), ValueError, "from 0 to 1"),
        (torch.linspace(-9, 9, 12).view(2, 2, 3), ValueError, "from 0 to 1.*softmax comes first"),
        (torch.ones(2, 2, 1, dtype=torch.long), TypeError, "tensor of floats, not torch.int64"),
        ([[0.5, 0.5]], TypeError, "tensor of floats, not list"),
        (np.ones((2, 2, 1)), TypeError, "tensor of floats"),
        (torch.ones(3), ValueError, r"\(views, …, classes\)"),
    ],
)
def test_what_cant_be_merged_is_named(p, reduce, error, words):
    with pytest.raises(error, match=words):
        merge_views(p, reduce)


def test_what_is_no_distribution_is_merged_where_that_is_said():
    assert torch.equal(
        merge_views(views_of(0.5), "max", distribution=False), torch.full((2, 3), 0.5)
    )
    with pytest.raises(ValueError, match="no views"):
        merge_views(views_of(0.5)[:0], "max", False)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_an_undefined_probability_stays_with_its_image(reduce):
    p = torch.rand(5, 3, 4).softmax(-1)
    p[2, 1] = float("nan")
    q = merge_views(p, reduce)
    assert q[1].isnan().all() and torch.allclose(q[[0, 2]].sum(-1), torch.ones(2))


def test_beta_of_one_is_the_plain_prediction_whatever_the_views_are():
    x = torch.randn(1, 3, 9, 9)

    def undefined(x, size):
        return five_crop(x, size) * float("nan")

    plain, got = (predict(small_net(), x, o, size=6, beta=1.0)[0] for o in ("five", undefined))
    assert plain.isfinite().all() and torch.equal(got, plain)
    assert predict(small_net(), x, undefined, size=6, beta=0.5)[0].isnan().all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_half_precise_probabilities_are_merged(half, reduce):
    q = merge_views(torch.randn(5, 3, 1000).softmax(-1).to(half), reduce)
    assert q.dtype == half and (q.sum(-1, dtype=torch.float32) - 1).abs().max() < 0.02


def swapped(x, size):
    return five_crop(x, size).transpose(0, 1)


def only_one(x, size):
    return five_crop(x, size)[:, :1]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(bs=0), "bs must be"),
        (dict(bs=-1), "bs must be"),
        (dict(bs=2.5), "bs must be"),
        (dict(bs=True), "bs must be"),
        (dict(size=0), "at least 1"),
        (dict(views=swapped), "every view must hold all 2 images"),
        (dict(views=only_one), "every view must hold all 2 images"),
        (dict(dl=[torch.zeros(30, 30)]), "channels, height, width"),
        (dict(dl=[torch.zeros(1, 3, 30, 30)]), "channels, height, width"),
    ],
)
def test_more_bad_arguments(kwargs, words):
    kwargs = dict(dl=torch.zeros(2, 3, 30, 30), size=24) | kwargs
    with pytest.raises(ValueError, match=words):
        predict(net(), **kwargs)


def test_a_size_or_batch_of_zero_isnt_taken_for_none(photos):
    learn = learner(block(photos))
    for kwargs in (dict(size=0), dict(bs=0)):
        with pytest.raises(ValueError, match="at least 1"):
            learn.five_crop_tta(**kwargs)


def test_models_that_give_no_tensor():
    class Two(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), x

    x = torch.zeros(2, 3, 9, 9)
    with pytest.raises(TypeError, match="this model gives tuple"):
        predict(Two(), x, size=6)


# ---- masks, points -----------------------------------------------------------------------------


@pytest.fixture
def mask_of(tmp_path, photos):
    "The file of a photo's mask, of the photo's size."

    def name(o):
        return tmp_path / f"{o.parent.name}_{o.stem}.png"

    for f in photos.rglob("*.jpg"):
        PIL.Image.new("L", PIL.Image.open(f).size).save(name(f))
    return name


@pytest.mark.parametrize("image", [ImageBlock, ImageBlock(PILImageBW)], ids=["colour", "grey"])
@pytest.mark.parametrize("target", ["mask", "points"])
def test_targets_that_lie_in_the_image_are_refused(photos, mask_of, image, target):
    targets = dict(
        mask=(MaskBlock(codes=["a", "b"]), mask_of),
        points=(PointBlock, lambda o: torch.tensor([[4.0, 5.0]])),
    )
    target, get_y = targets[target]
    dls = block(photos, Resize(48, method="squish"), [], (image, target), get_y)
    for model in (nn.Conv2d(3, 2, 1), net()):
        learn = learner(dls, model, CrossEntropyLossFlat(axis=1))
        for views in ("five", "dense", "flip"):
            with pytest.raises(ValueError, match="masks, points or boxes.*get_preds"):
                learn.five_crop_tta(views=views, size=24)


def test_masks_in_any_loader_are_refused():
    x = torch.randn(4, 3, 9, 9)
    masks = DataLoader(TensorDataset(x, torch.zeros(4, 9, 9).long()), batch_size=2)
    texts = DataLoader([(o, "a") for o in x], batch_size=2)
    with pytest.raises(ValueError, match="masks, points or"):
        predict(small_net(), masks, size=6)
    with pytest.raises(ValueError, match="row.*masks"):
        predict(nn.Conv2d(3, 2, 1), x, size=6)
    with pytest.raises(TypeError, match="must be tensors"):
        predict(small_net(), texts, size=6)


# ---- scores and changes of what is no prediction -------------------------------------------------


def plain_result():
    return Result("plain", 0, {}, [], 0.5, 1.0, 0.1, 10.0, 1.0)


@pytest.mark.parametrize(
    "p, y, words",
    [
        (torch.rand(4, 3), torch.zeros(4, 1).long(), "class indices"),
        (torch.rand(4, 3), torch.zeros(4), "class indices"),
        (torch.rand(4, 3), torch.zeros(3).long(), "class indices"),
        (torch.rand(4, 3), torch.zeros(4).bool(), "class indices"),
        (torch.rand(4, 3), None, "class indices"),
        (torch.rand(4), torch.zeros(4).long(), r"\(n, classes\)"),
        (torch.rand(4, 3), torch.full((4,), 3), "0 to 2"),
        (torch.rand(4, 3), torch.full((4,), -1), "0 to 2"),
    ],
)
def test_changes_and_scores_want_predictions_and_their_classes(p, y, words):
    good, p = torch.rand(4, 3).softmax(-1), p.softmax(-1)
    with pytest.raises(ValueError, match=words):
        changed_predictions(p, good, y)
    with pytest.raises(ValueError, match=words):
        changed_predictions(good, p, y)
    with pytest.raises(ValueError, match=words):
        rescore(plain_result(), "x", lambda: (p, y))


def test_changes_of_undefined_numbers_are_refused():
    p, nan, y = torch.rand(4, 3), torch.full((4, 3), float("nan")), torch.zeros(4).long()
    for before, after in ((p, nan), (nan, p)):
        with pytest.raises(ValueError, match="NaN"):
            changed_predictions(before, after, y)


@pytest.mark.parametrize(
    "p", [[[3.0, -1.0], [0.2, 4.0]], [[0.9, 0.8], [0.1, 0.3]], [[0.0, 0.0], [0.0, 0.0]]]
)
def test_scores_want_distributions(p):
    "The likelihood of anything else is a number that means nothing."

    def predicted():
        return torch.tensor(p), torch.tensor([0, 1])

    with pytest.raises(ValueError, match="sum of 1"):
        rescore(plain_result(), "x", predicted)


# ---- the whole image -----------------------------------------------------------------------------


class TwentyFour(nn.Module):
    "Takes 24 x 24 pixels and nothing else, as timm's vision transformers say it."

    def forward(self, x):
        assert x.shape[-2:] == (24, 24), "Input height (30) doesn't match model (24)."
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Flatten(), nn.Linear(3 * 24**2, 2)), TwentyFour()]
)
def test_a_model_of_one_size_cant_take_the_whole_image(model):
    words = '(?s)fed 24 x 24 pixels, fails on a view of 30 x 36.*views="five"'
    with pytest.raises(ValueError, match=words) as e:
        predict(model, torch.zeros(1, 3, 30, 36), "whole", size=24)
    assert isinstance(e.value.__cause__, (RuntimeError, AssertionError))
    assert predict(model, torch.zeros(1, 3, 24, 24), "whole", size=24)[0].shape[0] == 1


@pytest.mark.parametrize("views, side", [("five", 24), ("whole", 30)])
def test_other_failures_of_a_model_keep_their_name(views, side):
    class Fails(nn.Module):
        def forward(self, x):
            error = RuntimeError if x.shape[-1] == 24 else torch.cuda.OutOfMemoryError
            raise error("of its own")

    with pytest.raises(RuntimeError, match="^of its own$"):
        predict(Fails(), torch.zeros(1, 3, side, side), views, size=24)


def test_the_whole_image_of_the_size_of_a_view_is_that_view():
    x = torch.randn(3, 3, 24, 24)
    p, q = (predict(net(), x, o, size=24)[0] for o in ("whole", "centre"))
    assert torch.equal(p, q)


# ---- dense ---------------------------------------------------------------------------------------


@fast(max_examples=60)
@given(st.integers(1, 80), st.integers(0, 60), st.integers(1, 12))
def test_region_weights_are_a_distribution(size, margin, cells):
    pixels = size + margin
    w = region_weights([0, round(margin / 2), margin], size, pixels, min(cells, pixels))
    assert w.shape == (3, min(cells, pixels))
    assert (w >= 0).all()
    assert torch.allclose(w.sum(1), torch.ones(3))


def test_without_padding_dense_is_exact():
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
    )
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)):
        head = nn.Sequential(pool, nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5))
        model = nn.Sequential(body, head).eval()
        for h, w in ((24, 24), (32, 24), (24, 48)):
            x = torch.randn(3, 3, h, w)
            with torch.no_grad():
                dense = dense_five_crop(model, x, 16)
                five = torch.stack([model(o) for o in five_crop(x, 16)])
            assert torch.allclose(dense, five, atol=1e-5)


@pytest.mark.parametrize("extra", [2, 3])
def test_a_remainder_that_has_no_cell_belongs_to_no_crop(extra):
    "A convolution without padding rounds down, for the image as for a crop."
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.ReLU())
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    x = torch.randn(3, 3, 24 + extra, 24 + extra)
    for size in (16, 18):
        with torch.no_grad():
            dense = dense_five_crop(model, x, size)
            first = model(x[..., :size, :size])
        assert torch.allclose(dense[0], first, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 45])
def test_dense_on_the_image_itself_is_the_model(size):
    "Without a margin all five regions are the whole map."
    x = torch.randn(2, 3, size, size)
    for model in (xresnet10(4), vision_learner_model()):
        with torch.no_grad():
            out = dense_five_crop(model.eval(), x, size)
            assert torch.allclose(out, model(x).expand(5, -1, -1), atol=1e-4)


def vision_learner_model():
    from fastai.vision.all import create_vision_model

    torch.manual_seed(0)
    return create_vision_model(resnet18, 4, pretrained=False)


def test_dense_is_near_to_the_crops_on_larger_images():
    set_seed(0)
    model = xresnet10(10).eval()
    x = F.interpolate(torch.randn(4, 3, 40, 40), (320, 320), mode="bicubic")
    with torch.no_grad():
        dense = dense_five_crop(model, x, 256)
        five = torch.stack([model(o) for o in five_crop(x, 256)])
    # As vectors around each image's mean over all: the same direction
    a, b = ((o - five.mean((0, 1))).flatten() for o in (dense, five))
    assert F.cosine_similarity(a, b, 0) > 0.8


def test_dense_through_the_front_door(photos):
    for make in (cached, block):
        learn = learner(make(photos), xresnet10(2))
        p, y = learn.five_crop_tta(views="dense")
        assert p.shape == (11, 2)
        assert (p.sum(1) - 1).abs().max() < 1e-5
        assert torch.equal(y, learn.get_preds()[1])


@pytest.mark.parametrize(
    "model",
    [
        resnet18(num_classes=2),
        nn.Sequential(nn.Flatten(), nn.Linear(2700, 2)),
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    ],
)
def test_models_that_cant_be_split(model):
    with pytest.raises(ValueError, match="can't be split.*nn.Sequential"):
        predict(model, torch.zeros(1, 3, 30, 30), "dense", size=24)


def test_split_models():
    body, kinds, head = split_model(vision_learner_model())
    x = torch.randn(2, 3, 64, 64)
    assert kinds == ("max", "avg")
    assert body(x).shape == (2, 512, 2, 2)
    assert head(torch.randn(2, 1024, 1, 1)).shape == (2, 4)
    half = torch.ones(1, 2) / 2
    assert pool_regions(body(x), half, half, kinds).shape == (1, 2, 1024, 1, 1)


# ---- lessons' functions and exercises ------------------------------------------------------------


def test_changes_are_the_gain():
    p, q, y = torch.rand(50, 4).softmax(1), torch.rand(50, 4).softmax(1), torch.randint(4, (50,))
    better, worse = changed_predictions(p, q, y)
    gain = (q.argmax(1) == y).float().mean() - (p.argmax(1) == y).float().mean()
    assert abs(gain - (len(better) - len(worse)) / 50) < 1e-6
    assert not set(better.tolist()) & set(worse.tolist())


def test_rescore():
    def result(seed):
        return Result("plain", seed, dict(lr=1), [], 0.5, 1.0, 0.1, 10.0, 1.0)

    p = torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.2, 0.8], [0.7, 0.3]])
    y = torch.tensor([0, 1, 1, 1])
    runs = [result(i) for i in range(3)]
    better = [rescore(o, "five", lambda: (p, y)) for o in runs]
    assert better[0].accuracy == 0.75
    assert better[0].train_seconds == 10.0
    assert better[0].config == dict(lr=1, views="five")
    assert runs[0].accuracy == 0.5
    verdict = compare(runs, better).verdict("five")
    assert verdict.startswith("five is better than plain: accuracy +0.250 ± 0.000 over the same")
    half_right = p[:2].repeat(2, 1), torch.tensor([0, 1, 1, 0])
    same = [rescore(o, "same", lambda: half_right) for o in runs]
    assert "can't be told apart" in compare(runs, same).verdict("same")
    assert "from a single seed" in compare(runs[:1], better[:1]).verdict("five")


def softmax(x):
    return x.softmax(-1)


def changed(before, after):
    return (before.argmax(1) != after.argmax(1)).sum()


ANSWERS = {
    "tta.1": (
        (0, 2),
        [
            ((1, 2), "rounded up"),
            ((2, 0), "left comes before top"),
            ((2, 4), "middle of the image"),
            ((1, 4), "not half of it"),
        ],
    ),
    "tta.2": (
        lambda x: softmax(x).mean(0),
        [
            (lambda x: softmax(x.mean(0)), "logits were averaged"),
            (lambda x: x.mean(0), "logits still"),
            (lambda x: softmax(x).sum(0), "sum over the views"),
            (lambda x: x.softmax(0).mean(0), "over the views"),
            (lambda x: softmax(x).mean(1), "over the images"),
        ],
    ),
    "tta.3": (
        lambda p: p.amax(0) / p.amax(0).sum(-1, keepdim=True),
        [
            (lambda p: p.amax(0), "don't sum to 1"),
            (lambda p: softmax(p.amax(0)), "softmax was taken of probabilities"),
            (lambda p: p.amax(0) / p.amax(0).sum(0, keepdim=True), "columns"),
            (lambda p: p.mean(0), "this is the mean"),
        ],
    ),
    "tta.4": (
        2.25,
        [(1.5, "sides were compared"), (0.444, "upside down"), (5, "five separate crops")],
    ),
    "tta.5": (
        lambda b, a, y: tuple(map(len, changed_predictions(b, a, y))),
        [
            (lambda b, a, y: tuple(map(len, changed_predictions(b, a, y)))[::-1], "other order"),
            (lambda b, a, y: (4, int(changed(b, a)) - 4), "had been wrong|wrong before"),
            (lambda b, a, y: (changed(b, a), changed(b, a)), "all changed"),
        ],
    ),
}


def test_every_exercise_is_tried():
    assert exercises("tta") == sorted(ANSWERS)


@pytest.mark.parametrize("name", ANSWERS)
def test_exercises(name):
    right, wrong = ANSWERS[name]
    assert check(name, right)
    for answer, mistake in wrong:
        verdict = check(name, answer)
        assert not verdict and re.search(mistake, verdict.mistake) and verdict.hint


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64]
)
def test_changed_predictions_for_labels_of_every_type(dtype):
    before, after = torch.eye(3), torch.eye(3)[[1, 1, 2]]
    right, wrong = changed_predictions(before, after, torch.tensor([0, 1, 2]).to(dtype))
    assert right.tolist() == [] and wrong.tolist() == [0]
