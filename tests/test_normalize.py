"""Statistics in any pieces, processes and types; normalizing against fastai and torchvision; saved
models, whole, damaged and hostile."""

import json
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from fastai.data.transforms import Normalize as FastaiNormalize
from fastai.torch_core import TensorCategory, TensorImage, TensorImageBW, set_seed
from fastai.vision.all import (
    Learner,
    RandomErasing,
    Resize,
    Transform,
    create_vision_model,
    resnet18,
    vision_learner,
)
from fastai.vision.core import imagenet_stats
from fastai.vision.learner import _add_norm
from hypothesis import given, settings, strategies as st
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import nn

from sota_course.training import models
from sota_course.training.learner import baseline_learner
from sota_course.data import data_block, get_dls
from sota_course.course.exercises import check, exercises
from sota_course.core import BadImages
from sota_course.images.loader import cached_dls
from sota_course.training.models import load_model, read_card, save_model
from sota_course.images.normalization import ChannelStats, Normalize, dataset_stats
from sota_course.normalize import channel_stats, denormalize, normalize
from sota_course.normalize_checks import check_stats, check_unit_stats

quick = settings(deadline=None, max_examples=40)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of 16 training and 8 validation photos of two classes, of several shapes, and a home
    for caches."""
    monkeypatch.setenv("SOTA_COURSE_HOME", str(tmp_path / "home"))
    for i in range(24):
        split = "val" if i % 3 == 2 else "train"
        f = tmp_path / "photos" / split / ("cat", "dog")[i // 3 % 2] / f"{i:02}.jpg"
        f.parent.mkdir(parents=True, exist_ok=True)
        a = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        size = ((60, 48), (48, 60), (130, 90))[i % 3]
        img = PIL.Image.fromarray(a).resize(size, PIL.Image.Resampling.BICUBIC)
        img.save(f, quality=95)
    return tmp_path / "photos"


def images(seed, n=5, c=3, h=6, w=7, dtype=torch.uint8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=g)
    return x if dtype == torch.uint8 else (x / 255).to(dtype)


# ---- statistics ----------------------------------------------------------------------------------


@quick
@given(
    st.integers(0, 99),
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4
    ),
    st.sampled_from([torch.uint8, *FLOATS]),
    st.integers(1, 4),
)
def test_pieces_of_any_size_and_type(seed, shapes, dtype, c):
    parts = [images(seed + i, n, c, h, w, dtype) for i, (n, h, w) in enumerate(shapes)]
    scale = 255 if dtype == torch.uint8 else 1
    flat = torch.cat([o.double().transpose(0, 1).reshape(c, -1) / scale for o in parts], 1).numpy()
    one, other = ChannelStats(c), ChannelStats(c)
    for i, o in enumerate(parts):
        (one if i % 2 else other).update(o)
    one.merge(other)
    assert one.pixels == flat.shape[1]
    np.testing.assert_allclose(one.mean, flat.mean(1), atol=1e-9, rtol=0)
    np.testing.assert_allclose(one.std, flat.std(1), atol=1e-9, rtol=0)


def test_bytes_are_exact():
    "The nearest double to the true mean and variance, for counts far beyond what floats add up."
    stats = ChannelStats(1)
    stats.hist[0, [0, 1, 255]] = 10**12, 3, 10**12 + 7
    n, s, s2 = 2 * 10**12 + 10, 3 + 255 * (10**12 + 7), 3 + 255**2 * (10**12 + 7)
    var = Fraction(n * s2 - s**2, n**2 * 255**2)
    assert stats.mean.item() == pytest.approx(float(Fraction(s, n * 255)), abs=1e-15)
    assert stats.std.item() == pytest.approx(float(var) ** 0.5, abs=1e-15)


def test_order_and_grouping_dont_matter_for_bytes():
    parts = [images(i, h=5 + i) for i in range(4)]
    forward, backward = ChannelStats(), ChannelStats()
    for o in parts:
        forward.update(o)
    for o in parts[::-1]:
        backward.merge(ChannelStats().update(o))
    assert forward.pair == backward.pair


@pytest.mark.parametrize("x", [images(0), images(0, dtype=torch.float32)], ids=["bytes", "floats"])
def test_layout_and_input_stay(x):
    before = x.clone()
    last = x.contiguous(memory_format=torch.channels_last)
    for f in (
        lambda o: ChannelStats().update(o).pair,
        lambda o: tuple(v.tolist() for v in channel_stats(o)),
    ):
        np.testing.assert_allclose(f(x), f(last), atol=1e-12)
        np.testing.assert_allclose(f(x[0]), f(x[:1]), atol=1e-12)
    assert x.equal(before)


def test_pil_images_and_tensors_agree():
    a = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy(a).permute(2, 0, 1)
    assert ChannelStats().update(PIL.Image.fromarray(a)).pair == ChannelStats().update(tensor).pair
    assert ChannelStats(1).update(PIL.Image.fromarray(a[..., 0])).pixels == 35
    with pytest.raises(ValueError, match="must be L or RGB, not RGBA"):
        ChannelStats().update(PIL.Image.new("RGBA", (2, 2)))
    with pytest.raises(TypeError, match="not ndarray"):
        ChannelStats().update(a)


def test_processes():
    "What another process collected comes back whole."
    code = """
import pickle, sys, torch
from sota_course.images.normalization import ChannelStats
x = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(ChannelStats().update(x).update(x / 255)))
"""
    x, y = images(0), images(1)
    there = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(x), capture_output=True, check=True
    ).stdout
    here = ChannelStats().update(y).update(x).update(x / 255)
    merged = ChannelStats().update(y).merge(pickle.loads(there))
    np.testing.assert_allclose(merged.pair, here.pair, atol=1e-12)


@pytest.mark.parametrize(
    "x, error",
    [
        (images(0, n=0), "no pixels"),
        (images(0, h=0), "no pixels"),
        (torch.full((1, 3, 2, 2), torch.nan), "not a number"),
        (torch.full((1, 3, 2, 2), torch.inf), "infinite"),
        (images(0).long(), "uint8 or floats, not torch.int64"),
        (torch.zeros(2, 2), r"this has the shape \(2, 2\)"),
    ],
)
def test_bad_batches(x, error):
    for f in (channel_stats, ChannelStats().update):
        with pytest.raises(ValueError, match=error):
            f(x)


def test_bad_merges():
    with pytest.raises(ValueError, match="of 3 and of 1 channels"):
        ChannelStats().merge(ChannelStats(1))
    with pytest.raises(TypeError, match="not list"):
        ChannelStats().merge([])
    with pytest.raises(ValueError, match="ChannelStats\\(channels=1\\)"):
        ChannelStats().update(images(0, c=1))
    assert ChannelStats().merge(ChannelStats()).pixels == 0
    assert "no pixels" in repr(ChannelStats())
    assert "210 pixels" in repr(ChannelStats().update(images(0)))


def test_a_failed_update_leaves_no_trace():
    stats = ChannelStats().update(images(0, dtype=torch.float32))
    before = stats.pair
    with pytest.raises(ValueError):
        stats.update(torch.full((1, 3, 2, 2), torch.nan))
    assert stats.pair == before


@given(
    st.integers(0, 99),
    st.booleans(),
    st.lists(st.sampled_from([torch.uint8, *FLOATS]), min_size=1, max_size=3),
)
def test_property_what_was_read_out_is_independent(seed, join, dtypes):
    "Changed results change no statistics, later statistics no result, merged ones not one another."
    stats, other = ChannelStats(), ChannelStats()
    for i, dtype in enumerate(dtypes):
        (other if join else stats).update(images(seed + i, dtype=dtype))
    if join:
        stats.merge(other)
    want, theirs = stats.pair, other.pair if join else None
    mean, std = stats.mean, stats.std
    for o in (mean, std):
        o.fill_(7)
    assert stats.pair == want and stats.mean.tolist() == want[0] and stats.std.tolist() == want[1]
    mean, std = stats.mean, stats.std
    stats.update(images(seed + 9, dtype=torch.float32)).update(images(seed + 8))
    assert (mean.tolist(), std.tolist()) == want and stats.pair != want
    if not join:
        return
    assert other.pair == theirs
    before, other_mean = stats.pair, other.mean
    other.update(images(seed + 7, dtype=torch.float64))
    assert stats.pair == before and other_mean.tolist() == theirs[0]


def test_merging_with_itself_counts_twice():
    for dtype in (torch.uint8, torch.float32):
        stats = ChannelStats().update(images(0, dtype=dtype))
        pair, pixels = stats.pair, stats.pixels
        stats.merge(stats)
        assert stats.pixels == 2 * pixels
        np.testing.assert_allclose(stats.pair, pair, atol=1e-12)


@pytest.mark.parametrize(
    "make", [lambda: torch.full((3,), 0.5, dtype=torch.float64), lambda: np.full(3, 0.5)]
)
def test_checked_statistics_are_copies(make):
    "What the checks return isn't what they were given, and a transform keeps its own."
    mean, std = make(), make()
    for o in (*check_stats(mean, std), *check_unit_stats(mean, std)):
        o.fill_(7)
    transform = Normalize(mean, std)
    assert (np.asarray(mean) == 0.5).all() and (np.asarray(std) == 0.5).all()
    mean[:], std[:] = 7, 7
    assert (transform.mean == 0.5).all() and (transform.std == 0.5).all()


# ---- of a data set -------------------------------------------------------------------------------


def test_training_images_only(photos):
    files = sorted((photos / "train").rglob("*.jpg"))
    want = ChannelStats()
    for f in files:
        want.update(torch.from_numpy(np.asarray(PIL.Image.open(f)).copy()).permute(2, 0, 1))
    assert dataset_stats(photos, progress=False).pair == want.pair
    assert dataset_stats(files, n_workers=1, progress=False).pair == want.pair
    assert dataset_stats(photos / "val", progress=False).pair != want.pair
    assert get_dls(4, 16, photos, stats=want.pair, progress=False).args["stats"] == want.pair


def test_all_bad_images_are_named(photos):
    bad = sorted((photos / "train").rglob("*.jpg"))[:3]
    for f in bad:
        f.write_bytes(b"no image")
    with pytest.raises(BadImages) as e:
        dataset_stats(photos, progress=False)
    assert len(e.value.errors) == 3 and all(f.name in str(e.value) for f in bad)


def test_grey_and_transparent_files(tmp_path):
    PIL.Image.new("L", (4, 4), 51).save(tmp_path / "grey.png")
    PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    found = dataset_stats(tmp_path, progress=False)
    np.testing.assert_allclose(found.mean, [0.6] * 3, atol=1e-12)  # transparent is white


def test_no_files(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        dataset_stats(tmp_path, progress=False)
    with pytest.raises(FileNotFoundError):
        dataset_stats(tmp_path / "nowhere", progress=False)


# ---- normalize -----------------------------------------------------------------------------------


@quick
@given(
    st.integers(0, 99), st.sampled_from(FLOATS), st.integers(0, 4), st.integers(1, 9), st.booleans()
)
def test_as_torchvision_and_back(seed, dtype, n, side, last):
    x = images(seed, n, 3, side, side + 1, dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = normalize(x, *imagenet_stats)
    eps = dict(atol=4 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    assert y.dtype == dtype and y.shape == x.shape
    mean, std = (torch.tensor(o, dtype=torch.float64)[:, None, None] for o in imagenet_stats)
    torch.testing.assert_close(y, ((x.double() - mean) / std).to(dtype), **eps)
    if dtype == torch.float32 and n:
        torch.testing.assert_close(y, TF.normalize(x, *map(list, imagenet_stats)), atol=0, rtol=0)
    torch.testing.assert_close(denormalize(y, *imagenet_stats), x, **eps)


def test_undefined_pixels_stay_where_they_are():
    x = images(0, dtype=torch.float32)
    x[1, 2, 3, 4] = torch.nan
    assert Normalize(*imagenet_stats)(TensorImage(x)).isnan().sum() == 1
    assert normalize(x, *imagenet_stats).isnan().sum() == 1


def test_the_input_stays_and_gradients_flow():
    x = images(0, dtype=torch.float32).requires_grad_()
    before = x.detach().clone()
    normalize(x, *imagenet_stats).sum().backward()
    assert x.detach().equal(before)
    torch.testing.assert_close(x.grad[0, :, 0, 0], 1 / torch.tensor(imagenet_stats[1]))


@pytest.mark.parametrize(
    "x", [torch.rand(2, 1, 4, 4), torch.rand(2, 4, 4, 3), torch.rand(3), torch.rand(4, 4)]
)
def test_channels_must_match(x):
    for f in (normalize, denormalize):
        with pytest.raises(ValueError, match="statistics for 3 channels"):
            f(x, *imagenet_stats)


@pytest.mark.parametrize(
    "mean, std, error",
    [
        ([0.5] * 3, [0.2, 0.0, 0.2], "standard deviation of 0"),
        ([0.5] * 3, [0.2, -0.1, 0.2], "of -0.1"),
        ([0.5] * 3, [0.2] * 2, "3 means and 2"),
        ([0.5, torch.nan, 0.5], [0.2] * 3, "finite"),
        ([], [], "0 means"),
    ],
)
def test_bad_statistics(mean, std, error):
    for f in (Normalize, lambda *stats: normalize(torch.rand(1, 3, 2, 2), *stats)):
        with pytest.raises(ValueError, match=error):
            f(mean, std)


# ---- the transform -------------------------------------------------------------------------------


def test_as_fastais():
    x = TensorImage(images(0, dtype=torch.float32))
    ours = Normalize(*imagenet_stats)
    theirs = FastaiNormalize.from_stats(*imagenet_stats, cuda=False)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.decode(ours(x)), theirs.decode(theirs(x)))
    assert type(ours(x)) is TensorImage
    assert type(Normalize([0.5], [0.2])(TensorImageBW(x[:, :1]))) is TensorImageBW
    y = TensorCategory(torch.tensor([1, 2]))
    assert ours((x, y))[1] is y
    assert Normalize.from_stats(*imagenet_stats).mean.equal(ours.mean)


def test_all_wrong_scales_are_named():
    x = TensorImage(images(0, dtype=torch.float32))
    big = [[v * 255 for v in o] for o in imagenet_stats]
    torch.testing.assert_close(
        Normalize(*big)(x * 255), Normalize(*imagenet_stats)(x), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="divide the pixels by 255"):
        Normalize(*imagenet_stats)(x * 255)
    with pytest.raises(ValueError, match="divide the statistics by 255"):
        Normalize(*big)(x)
    with pytest.raises(ValueError, match="normalized already"):
        Normalize(*imagenet_stats)(Normalize(*imagenet_stats)(x))
    with pytest.raises(ValueError, match="floats from 0 to 1"):
        Normalize(*imagenet_stats, check=False)(TensorImage(images(0)))
    assert Normalize(*imagenet_stats, check=False)(x * 255).max() > 100
    assert Normalize(*imagenet_stats)(x[:0]).shape == x[:0].shape


def test_fastais_normalize_without_statistics_takes_one_batch(photos):
    "Trap: two instances have two means, and neither is the data set's."
    means = []
    for seed in (0, 1):
        set_seed(seed)
        block = data_block(photos, Resize(16), [FastaiNormalize()])
        fs = block.dataloaders(photos, bs=4, num_workers=0).train.after_batch.fs
        transform = next(o for o in fs if isinstance(o, FastaiNormalize))
        means.append(transform.mean.flatten().cpu())
    assert (means[0] - means[1]).abs().max() > 1e-3


def test_imagenets_std_is_a_mean_of_per_image_stds():
    "Trap: over all pixels the standard deviation is larger by a fifth and more."
    file = Path(__file__).parents[1] / "results" / "normalize" / "statistics.json"
    found = json.loads(file.read_text())["sets"]["all training images"]
    ratio = {
        k: np.array(found[k]) / np.array(imagenet_stats[1]) for k in ("mean_image_std", "pixel_std")
    }
    assert abs(ratio["mean_image_std"] - 1).max() < 0.06 and ratio["pixel_std"].min() > 1.2


@pytest.mark.parametrize(
    "stats, error",
    [
        (([0.5] * 3, [0.2, 0.0, 0.2]), "standard deviation of 0"),
        (([0.5] * 3, [0.2] * 2), "3 means and 2"),
        (([0.5, float("nan"), 0.5], [0.2] * 3), "finite"),
        (([124, 116, 104], [58, 57, 57]), "0 to 1 scale"),
        (([0.5] * 3, [0.2, 0.2, 58.0]), "0 to 1 scale"),
    ],
)
@pytest.mark.parametrize("pipeline", ["cached", "fastai"])
def test_bad_statistics_for_loaders(photos, pipeline, stats, error):
    with pytest.raises(ValueError, match=error):
        get_dls(4, 16, photos, stats=stats, pipeline=pipeline, progress=False)


@pytest.mark.parametrize(
    "stats, error",
    [
        (([0.5] * 3, [0.2, 0.0, 0.2]), "standard deviation of 0"),
        (([124, 116, 104], [58, 57, 57]), "0 to 1 scale"),
    ],
)
def test_bad_statistics_for_cached_loaders(photos, stats, error):
    with pytest.raises(ValueError, match=error):
        cached_dls(photos, bs=4, size=16, stats=stats, progress=False)


def test_a_black_batch_has_no_scale():
    black = TensorImage(torch.zeros(2, 3, 4, 4))
    assert Normalize([124.0] * 3, [58.0] * 3)(black).max() < -2
    assert Normalize(*imagenet_stats)(black).max() < -1
    white = TensorImage(torch.full((2, 3, 4, 4), 255.0))
    with pytest.raises(ValueError, match="divide the pixels by 255"):
        Normalize(*imagenet_stats)(white)


def test_normalizing_after_fastais_is_noticed(photos):
    dls = get_dls(4, 16, photos, progress=False)
    with pytest.raises(ValueError, match="normalized already"):
        dls.add_tfms([Normalize(*imagenet_stats)], "after_batch")
        dls.one_batch()


def test_vision_learner_adds_no_second_one(photos):
    dls = get_dls(4, 16, photos, stats=None, progress=False)
    dls.add_tfms([Normalize([0.4] * 3, [0.2] * 3)], "after_batch")
    _add_norm(dls, dict(stats=imagenet_stats), pretrained=True)
    assert sum(isinstance(o, FastaiNormalize) for o in dls.train.after_batch.fs) == 1


def test_statistics_move_with_the_loader(photos):
    dls = cached_dls(
        photos, bs=4, size=16, progress=False, after_batch=[Normalize(*imagenet_stats)]
    )
    want = get_dls(4, 16, photos, presize=20, progress=False)
    torch.testing.assert_close(dls.valid.one_batch()[0], want.valid.one_batch()[0])
    dls.to(torch.device("cpu"))
    assert pickle.loads(pickle.dumps(Normalize(*imagenet_stats))).std.equal(
        dls.valid.after_batch.fs[-1].std
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    x = TensorImage(images(0, dtype=torch.float32))
    torch.testing.assert_close(
        Normalize(*imagenet_stats)(x.cuda()).cpu(), Normalize(*imagenet_stats)(x)
    )
    assert ChannelStats().update(images(0).cuda()).pair == ChannelStats().update(images(0)).pair


# ---- saved models --------------------------------------------------------------------------------


def tiny(n_out, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, n_out),
    )


def learner(photos, arch="xresnet10", **kwargs):
    set_seed(0)
    return baseline_learner(get_dls(4, 16, photos, progress=False, **kwargs), arch)


@pytest.fixture
def saved(photos, tmp_path):
    return save_model(learner(photos), tmp_path / "saved")


@pytest.mark.parametrize("method", ["crop", "squish", "pad"])
@pytest.mark.parametrize(
    "stats", ["imagenet", None, ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])], ids=["imagenet", "none", "own"]
)
def test_predicts_what_the_learner_predicts(photos, tmp_path, method, stats):
    learn = learner(photos, method=method, stats=stats)
    with learn.no_bar():
        probs, _ = learn.get_preds()
    model = load_model(save_model(learn, tmp_path / "saved"))
    files = learn.dls.valid_ds.items
    torch.testing.assert_close(
        model.probabilities(files), probs.as_subclass(torch.Tensor), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        model.probabilities(files, bs=3), model.probabilities(files), atol=1e-5, rtol=0
    )
    one = model.predict(files[0])
    assert list(one.values()) == sorted(one.values(), reverse=True)
    assert set(one) == set(learn.dls.vocab) == {"cat", "dog"}
    assert one["cat"] == pytest.approx(probs[0, 0].item(), abs=1e-5)


def test_other_sizes_and_our_own_transform(photos, tmp_path):
    dls = cached_dls(
        photos,
        bs=4,
        size=24,
        presize=30,
        progress=False,
        after_batch=[Normalize([0.4] * 3, [0.2] * 3)],
    )
    set_seed(0)
    learn = Learner(dls, tiny(2), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar():
        logits, _ = learn.get_preds()
    model = load_model(save_model(learn, tmp_path / "saved", arch="tiny"), tiny)
    assert model.card["input"] == dict(size=24, presize=30, method="crop")
    assert model.card["statistics"]["mean"] == pytest.approx([0.4] * 3)
    torch.testing.assert_close(
        model.probabilities(dls.valid_ds.items),
        logits.as_subclass(torch.Tensor).softmax(1),
        atol=1e-5,
        rtol=0,
    )


def test_fastais_pipeline_is_close(photos, tmp_path):
    learn = learner(photos, pipeline="fastai", presize=20, num_workers=0)
    with learn.no_bar():
        probs, _ = learn.get_preds()
    model = load_model(save_model(learn, tmp_path / "saved"))
    assert (model.probabilities(learn.dls.valid_ds.items) - probs).abs().max() < 0.1


def test_forms_of_an_image(saved, photos):
    model, f = load_model(saved), next((photos / "val").rglob("*.jpg"))
    img = PIL.Image.open(f)
    a = np.asarray(img.convert("RGB"))
    assert model.predict(f) == model.predict(str(f)) == model.predict(f.read_bytes())
    tensor = torch.from_numpy(a.copy()).permute(2, 0, 1)
    assert model.predict(a) == model.predict(img) == model.predict(tensor)
    assert model.probabilities([]).shape == (0, 2)
    assert model.probabilities([a, np.zeros((1, 100, 3), dtype=np.uint8)]).shape == (2, 2)
    assert model.predict(np.zeros((5, 5), dtype=np.uint8))  # grey
    with pytest.raises(TypeError, match="one image"):
        model.probabilities(a)
    with pytest.raises(TypeError, match="uint8"):
        model.predict(a / 255)
    with pytest.raises(ValueError, match="can't be read"):
        model.predict(photos / "nothing.jpg")


def test_nothing_is_pickled(saved, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    load_model(saved)
    assert sorted(o.name for o in saved.iterdir()) == ["card.json", "model.safetensors"]
    assert saved.parent.name not in (saved / "card.json").read_text()


def test_saving_again_replaces(photos, saved):
    before = read_card(saved)["weights"]["sha256"]
    learn = learner(photos)
    with torch.no_grad():
        learn.model[0][0].weight.mul_(2)
    save_model(learn, saved)
    assert read_card(saved)["weights"]["sha256"] != before and load_model(saved)


def test_weights_keep_their_type_and_learn_on(photos, saved):
    model = load_model(saved).model
    assert not model.training
    assert all(o.dtype == torch.float32 and o.requires_grad for o in model.parameters())
    learn = Learner(get_dls(4, 16, photos, progress=False), model, loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)


def test_arguments_of_the_architecture(photos, tmp_path):
    from functools import partial
    from sota_course.baseline import xresnet10

    learn = learner(photos, partial(xresnet10, widen=0.25))
    folder = save_model(learn, tmp_path / "saved", arch="xresnet10", args=dict(widen=0.25))
    assert read_card(folder)["arch"] == dict(name="xresnet10", args=dict(widen=0.25))
    assert load_model(folder).model[-1].in_features == 128


# what must not be saved


def test_statistics_that_are_there_twice(photos, tmp_path):
    learn = learner(photos)
    for dl in learn.dls.loaders:
        dl.after_batch.add(FastaiNormalize.from_stats(*imagenet_stats, cuda=False))
    with pytest.raises(ValueError, match="normalized 2 times"):
        save_model(learn, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_diverged_training(photos, tmp_path):
    learn = learner(photos)
    with torch.no_grad():
        learn.model[0][0].weight[0] = torch.nan
    with pytest.raises(ValueError, match="infinite or undefined"):
        save_model(learn, tmp_path / "saved")


def test_a_name_that_isnt_the_networks(photos, tmp_path):
    for arch, args, error in (
        ("xresnet18", {}, "another network"),
        ("xresnet10", dict(widen=2), "another network"),
        ("xresnet10", dict(wide=2), "can't be built"),
    ):
        with pytest.raises(ValueError, match=error):
            save_model(learner(photos), tmp_path / "saved", arch=arch, args=args)
    with pytest.raises(ValueError, match="'arch.args'"):
        save_model(learner(photos, tiny), tmp_path / "saved", arch="tiny", args=dict(act=nn.ReLU))


class Inverted(Transform):
    order = 50

    def encodes(self, x: TensorImage):
        return 1 - x


@pytest.mark.parametrize("pipeline", ["cached", "fastai"])
def test_transforms_that_the_card_cant_describe(photos, tmp_path, pipeline):
    learn = learner(photos, pipeline=pipeline, num_workers=0)
    assert save_model(learn, tmp_path / "saved")
    learn.dls.add_tfms([RandomErasing()], "after_batch")  # in training only
    assert save_model(learn, tmp_path / "saved")
    learn.dls.add_tfms([Inverted()], "after_batch")
    with pytest.raises(
        ValueError, match="go through Inverted .after_batch., which a card can't describe"
    ):
        save_model(learn, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_item_transforms_that_the_card_cant_describe(photos, tmp_path):
    learn = learner(photos, pipeline="fastai", num_workers=0)

    def mirrored(x):
        if not isinstance(x, PIL.Image.Image):
            return x
        return x.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)

    learn.dls.add_tfms([Transform(mirrored)], "after_item")
    with pytest.raises(ValueError, match="mirrored .after_item."):
        save_model(learn, tmp_path / "saved")


def test_a_vision_learner_needs_a_name(photos, tmp_path):
    dls = get_dls(4, 16, photos, progress=False)
    learn = vision_learner(dls, resnet18, pretrained=False)
    with pytest.raises(
        ValueError, match="made with resnet18, which is not the whole of it: name it with arch="
    ):
        save_model(learn, tmp_path / "saved")

    def build(n_out):
        return create_vision_model(resnet18, n_out, pretrained=False)

    folder = save_model(learn, tmp_path / "saved", arch="resnet18 with fastai's head")
    model = load_model(folder, build)
    with learn.no_bar():
        probs, _ = learn.get_preds()
    torch.testing.assert_close(
        model.probabilities(dls.valid_ds.items), probs.as_subclass(torch.Tensor), atol=1e-5, rtol=0
    )


def test_log_probabilities(photos, tmp_path):
    set_seed(0)
    learn = Learner(
        get_dls(4, 16, photos, progress=False),
        nn.Sequential(tiny(2), nn.LogSoftmax(-1)),
        loss_func=nn.NLLLoss(),
    )
    with learn.no_bar():
        logp, _ = learn.get_preds()
    model = load_model(
        save_model(learn, tmp_path / "saved", arch="tiny"),
        lambda n_out: nn.Sequential(tiny(n_out), nn.LogSoftmax(-1)),
    )
    torch.testing.assert_close(
        model.probabilities(learn.dls.valid_ds.items),
        logp.as_subclass(torch.Tensor).exp(),
        atol=1e-5,
        rtol=0,
    )


def test_loaders_that_say_nothing(photos, tmp_path):
    dls = cached_dls(photos, bs=4, size=16, progress=False, aug=lambda x: x)
    learn = Learner(dls, tiny(2), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="make them with get_dls"):
        save_model(learn, tmp_path / "saved")


# files that are damaged, or made to do harm


def rewrite(saved, change):
    "Change the card's JSON."
    card = json.loads((saved / "card.json").read_text())
    change(card)
    (saved / "card.json").write_text(json.dumps(card))


def put(saved, name, value):
    *outer, last = name.split(".")

    def change(card):
        for o in outer:
            card = card[o]
        card[last] = value

    rewrite(saved, change)


BAD = [
    ("format", 2),
    ("format", True),
    ("format", "1"),
    ("package", 3),
    ("arch.name", ["xresnet10"]),
    ("arch.name", ""),
    ("arch.args", []),
    ("arch.args", {"n_out": 3}),
    ("arch.args", {"pretrained": True}),
    ("arch.args", {"act_cls": "os.system"}),
    ("arch.args", {"widen": None}),
    ("arch.args", {"widen": 10**400}),
    ("arch.args", {"widen": [1, -(10**400)]}),
    ("arch.args", {"widen": 1e40}),
    ("statistics.mean", [0, 0, 10**400]),
    ("arch.args", {"a b": 1}),
    ("classes", []),
    ("classes", ["a", "a"]),
    ("classes", ["a", 1]),
    ("classes", {"a": 0, "b": 1}),
    ("classes", "ab"),
    ("input.size", 0),
    ("input.size", 16.0),
    ("input.size", True),
    ("input.size", 10**9),
    ("input.presize", -1),
    ("input.presize", "20"),
    ("input.method", "stretch"),
    ("input.method", ["crop"]),
    ("statistics", [1, 2]),
    ("statistics", {"mean": [0, 0, 0], "std": [1, 1, 0]}),
    ("statistics", {"mean": [0, 0], "std": [1, 1]}),
    ("statistics", {"mean": "000", "std": [1, 1, 1]}),
    ("statistics.mean", [True, 0, 0]),
    ("activation", "eval"),
    ("activation", None),
    ("weights.file", "../model.safetensors"),
    ("weights.file", "/etc/model.safetensors"),
    ("weights.file", "a\\model.safetensors"),
    ("weights.file", "C:model.safetensors"),
    ("weights.file", "model.pkl"),
    ("weights.file", ".safetensors"),
    ("weights.file", 1),
    ("weights.bytes", -1),
    ("weights.bytes", 1e9),
    ("weights.sha256", "0"),
    ("weights.sha256", None),
]


@pytest.mark.parametrize("name, value", BAD, ids=[f"{k}={v}"[:40] for k, v in BAD])
def test_bad_entries_are_named(saved, name, value):
    put(saved, name, value)
    with pytest.raises(ValueError, match=f"the card's entry '{name.split('.')[0]}"):
        load_model(saved)


ENTRIES = (
    "format arch arch.name classes input input.method statistics statistics.std weights "
    "weights.sha256"
)


@pytest.mark.parametrize("name", ENTRIES.split())
def test_missing_entries_are_named(saved, name):
    *outer, last = name.split(".")

    def drop(card):
        for o in outer:
            card = card[o]
        del card[last]

    rewrite(saved, drop)
    with pytest.raises(ValueError, match=f"the card has no entry '{name}"):
        load_model(saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"card"',
        "[" * 100_000,
        '{"format": NaN}',
        '{"format": 1e999}',
        '{"format": 1, "arch": 3}',
        "\0\1",
        "{" * 50 + "}" * 50,
    ],
)
def test_cards_that_are_none(saved, text):
    (saved / "card.json").write_text(text)
    with pytest.raises(ValueError, match="card"):
        load_model(saved)


def test_a_card_that_isnt_text(saved):
    (saved / "card.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="damaged"):
        load_model(saved)
    with open(saved / "card.json", "wb") as f:
        f.truncate(2**34)  # 16 GB of nothing, which must not be read
    with pytest.raises(ValueError, match="bytes, and 10,000,000 at most"):
        load_model(saved)


KEYS = st.sampled_from("format arch name args classes input statistics weights x".split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda o: st.lists(o, max_size=3) | st.dictionaries(KEYS, o, max_size=4),
)


@settings(deadline=None, max_examples=50)
@given(JSON)
def test_no_json_gets_through(card):
    with pytest.raises(ValueError, match="the card"):
        models.check_card(card)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1],
        lambda d: d[:100],
        lambda d: b"",
        lambda d: d + b"x",
        lambda d: d[:-1] + bytes([d[-1] ^ 1]),
        lambda d: bytes([d[0] ^ 1]) + d[1:],
    ],
    ids=["cut by one", "cut", "empty", "longer", "last bit", "first bit"],
)
def test_damaged_weights(saved, damage):
    f = saved / "model.safetensors"
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match="cut short|at most|checksum"):
        load_model(saved)


def forge(saved, data):
    "Other weights, with a card that agrees with them."
    (saved / "model.safetensors").write_bytes(data)
    weights = dict(file="model.safetensors", bytes=len(data), sha256=sha256(data).hexdigest())
    put(saved, "weights", weights)


def tensors(saved):
    return load_tensors((saved / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    "head",
    [
        b"\xff" * 8,
        (2**40).to_bytes(8, "little"),
        (3).to_bytes(8, "little") + b"abc",
        (2).to_bytes(8, "little") + b"[]",
        (65).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
    ],
)
def test_hostile_headers(saved, head):
    forge(saved, head + bytes(8))
    with pytest.raises(ValueError, match="is no file of weights|another network"):
        load_model(saved)


def test_weights_of_another_network(saved):
    good = tensors(saved)
    first = next(k for k, v in good.items() if v.ndim == 4)
    for change, error in (
        ({first: good[first][:1]}, f"'{first}' is"),
        ({first: good[first].int()}, "of type"),
        ({"extra": torch.zeros(1)}, "'extra' first"),
        ({first: torch.full_like(good[first], torch.nan)}, "infinite or undefined"),
    ):
        forge(saved, save_tensors({k: v.contiguous() for k, v in (good | change).items()}))
        with pytest.raises(ValueError, match=error):
            load_model(saved)
    forge(saved, save_tensors({k: v for k, v in good.items() if k != first}))
    with pytest.raises(ValueError, match=f"'{first}' first"):
        load_model(saved)


def test_half_precision_weights_load(saved):
    want = load_model(saved)
    img = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    halved = {k: v.half() if v.is_floating_point() else v for k, v in tensors(saved).items()}
    forge(saved, save_tensors(halved))
    half = load_model(saved)
    assert all(o.dtype == torch.float32 for o in half.model.parameters())
    torch.testing.assert_close(
        half.probabilities([img]), want.probabilities([img]), atol=1e-2, rtol=0
    )


def test_weights_of_another_training(photos, saved, tmp_path):
    other = learner(photos)
    with torch.no_grad():
        other.model[0][0].weight.add_(1)
    other = save_model(other, tmp_path / "other")
    os.replace(other / "model.safetensors", saved / "model.safetensors")
    with pytest.raises(ValueError, match="isn't the file that the card was written for"):
        load_model(saved)


@pytest.mark.parametrize("widen", [1e6, 1e300, -1, 0])
def test_a_network_that_would_fill_the_memory(saved, widen):
    put(saved, "arch.args", dict(widen=widen))
    with pytest.raises(ValueError):
        load_model(saved)


def test_a_network_of_ones_own_that_would_fill_the_memory(photos, tmp_path):
    folder, real = save_model(learner(photos, tiny), tmp_path / "saved"), []

    def wide(n_out, width=4):
        real.append(torch.empty(0).device.type)
        return tiny(n_out, width)

    assert load_model(folder, wide) and real == ["meta", "cpu"]
    put(folder, "arch.args", dict(width=10**7))
    with pytest.raises(ValueError, match="bytes of weights, and it names a file of"):
        load_model(folder, wide)
    assert real == ["meta", "cpu", "meta"]
    put(folder, "arch.args", dict(height=3))
    with pytest.raises(ValueError, match="tiny can't be built with"):
        load_model(folder, wide)


def test_a_network_that_cant_be_built_without_content(photos, tmp_path):
    def stubborn(n_out):
        m = tiny(n_out)
        with torch.no_grad():
            m[0].weight.mul_(m[0].weight.abs().max().item())
        m[0].register_buffer("of_its_own", torch.ones(1), persistent=False)
        return m

    folder = save_model(learner(photos, stubborn), tmp_path / "saved")
    assert load_model(folder, stubborn).model[0].of_its_own.item() == 1


def test_a_file_far_too_large_is_not_read(saved):
    with open(saved / "model.safetensors", "r+b") as f:
        f.truncate(2**36)
    with pytest.raises(ValueError, match="at most were expected"):
        load_model(saved)
    put(saved, "weights.bytes", 2**36)
    with pytest.raises(ValueError, match="bytes of weights"):
        load_model(saved)


def test_missing_files(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no file model.safetensors"):
        load_model(saved)
    with pytest.raises(ValueError, match="no file card.json"):
        load_model(tmp_path / "nowhere")


def test_number_of_classes(saved):
    put(saved, "classes", ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"\(2, 256\) in the file, and \(3, 256\)"):
        load_model(saved)


def test_another_architecture_needs_its_function(photos, tmp_path):
    folder = save_model(learner(photos, resnet18_), tmp_path / "saved")
    with pytest.raises(ValueError, match="'resnet18_', which isn't among .* as arch="):
        load_model(folder)
    assert load_model(folder, resnet18_).predict(np.zeros((20, 20, 3), dtype=np.uint8))


def resnet18_(n_out):
    return resnet18(num_classes=n_out)


# ---- exercises -----------------------------------------------------------------------------------


def wide(o):
    return o[:, None, None]


def no_pad(w, m, s, b):
    return w / wide(s), b - (w / wide(s) * wide(m)).sum((1, 2, 3))


def times(w, b, m, s):
    return w * wide(s), b - (w * wide(s) * wide(m)).sum((1, 2, 3))


def undivided(w, b, m, s):
    return w / wide(s), b - (w * wide(m)).sum((1, 2, 3))


def std_of_both(n1, m1, s1, n2, m2, s2):
    mean = (n1 * m1 + n2 * m2) / (n1 + n2)
    squares = (n1 * (s1**2 + m1**2) + n2 * (s2**2 + m2**2)) / (n1 + n2)
    return (squares - mean**2) ** 0.5


def without_means(n1, m1, s1, n2, m2, s2):
    return ((n1 * s1**2 + n2 * s2**2) / (n1 + n2)) ** 0.5


def without_sizes(n1, m1, s1, n2, m2, s2):
    return ((s1**2 + s2**2) / 2 + (m1 - m2) ** 2 / 4) ** 0.5


def mean_of_stds(x):
    return x.mean((0, 2, 3)), x.std((2, 3), correction=0).mean(0)


def with_variance(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


SCALES = dict(a="divided by 255 twice", b="right", c="not divided by 255", d="normalized twice")
RIGHT = {
    "normalize.1": lambda x: (x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)),
    "normalize.2": std_of_both,
    "normalize.3": lambda w, b, m, s: no_pad(w, m, s, b),
    "normalize.4": SCALES,
}
# The exercise, a wrong answer, and what is said of it.
WRONG = [
    (1, lambda x: (x.mean((0, 2, 3)), x.std((0, 2, 3))), "of a sample"),
    (1, mean_of_stds, "mean of the images' standard deviations"),
    (1, lambda x: (x.mean((2, 3)), x.std((2, 3))), "means of every single image"),
    (1, with_variance, "the variance"),
    (1, lambda x: x.mean((0, 2, 3)), "two things"),
    (2, lambda n1, m1, s1, n2, m2, s2: (s1 + s2) / 2, "average of the two"),
    (2, without_means, "difference between the two means is missing"),
    (2, without_sizes, "both groups count the same"),
    (3, lambda w, b, m, s: (w / wide(s), b), "bias has to change too"),
    (3, times, "multiplied"),
    (3, undivided, "before the division"),
    (3, lambda w, b, m, s: (w / s[:, None, None, None], b), "axis of the outputs"),
    (4, SCALES | dict(b="normalized twice"), "b was taken for 'normalized twice'"),
    (4, SCALES | dict(a="not divided by 255"), "a was taken for 'not divided by 255'"),
    (4, SCALES | dict(d="divided by 255 twice"), "d was taken for"),
    (4, dict(a="right"), "letters a, b, c and d"),
]


def test_every_exercise_is_tried():
    assert exercises("normalize") == sorted(RIGHT)


@pytest.mark.parametrize("name", RIGHT)
def test_solutions(name):
    assert check(name, RIGHT[name])
    assert "no answer yet" in check(name, ...).mistake


@pytest.mark.parametrize("n, answer, mistake", WRONG)
def test_mistakes_are_named(n, answer, mistake):
    verdict = check(f"normalize.{n}", answer)
    assert not verdict and mistake in verdict.mistake and verdict.hint
