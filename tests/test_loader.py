"""The cache under faults (two builders, kills, damage, full disks, changed sources), and fastai's
whole interface on top of it."""

import errno
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from fastai.vision.all import (
    BBoxBlock,
    CategoryBlock,
    ClassificationInterpretation,
    ColReader,
    ColSplitter,
    CrossEntropyLossFlat,
    DataBlock,
    FlipItem,
    GrandparentSplitter,
    ImageBlock,
    IntToFloatTensor,
    Learner,
    MaskBlock,
    MultiCategoryBlock,
    Normalize,
    PILImage,
    PointBlock,
    RandomErasing,
    RegressionBlock,
    Resize,
    TensorCategory,
    TensorImage,
    TensorMultiCategory,
    TransformBlock,
    accuracy,
    aug_transforms,
    imagenet_stats,
    load_learner,
    nn,
    parent_label,
    set_seed,
)
from hypothesis import given, strategies as st

from sota_course.core import BadImages, CacheError, ImageError
from sota_course.images import augment, cache as store
from sota_course.images.augment import BookAug, reduce_batch, resize_batch, warp_batch
from sota_course.images.cache import (
    build_cache,
    cache_info,
    clear_cache,
    load_presized,
    presize_image,
)
from sota_course.images.decode import image_files, open_image
from sota_course.images.loader import CachedDL, cached_dls, image_sources

matplotlib.use("agg")


def photo(seed, w=60, h=48):
    "Smooth colours, so that JPEG hardly changes them, and no two alike."
    a = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(a).resize((w, h), PIL.Image.Resampling.BICUBIC)


def save_photos(folder, n, sizes):
    "`n` photos of two classes, every fourth of them for validation."
    for i in range(n):
        split = "val" if i % 4 == 3 else "train"
        f = folder / split / ("cat", "dog")[i // 4 % 2] / f"{i:02}.jpg"
        f.parent.mkdir(parents=True, exist_ok=True)
        photo(i, *sizes[i % len(sizes)]).save(f, quality=95)
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    "A folder of 24 training and 8 validation photos of two classes, and a home for caches."
    monkeypatch.setenv("SOTA_COURSE_HOME", str(tmp_path / "home"))
    return save_photos(tmp_path / "photos", 32, ((60, 48), (48, 60), (50, 50)))


def build(files, size=40, **kwargs):
    return build_cache(files, size, progress=False, **kwargs)


def dls_of(source, **kwargs):
    return cached_dls(source, **{**dict(bs=8, size=32, progress=False), **kwargs})


def caches():
    return sorted(o for o in store.cache_home().rglob("*") if o.suffix in (".u8", ".json", ".part"))


def run(code, photos):
    "`code` in another process, started but not waited for."
    head = (
        "import time\nfrom pathlib import Path\n"
        "from sota_course.images import cache as store\n"
        "from sota_course.images.decode import image_files\n"
        f"files, load = image_files(Path({str(photos)!r})), store.load_presized\n"
    )
    return subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)


# ---- the cache -----------------------------------------------------------------------------------


def test_pixels_are_those_of_the_files(photos):
    files = image_files(photos)
    cache = build(files[::-1])
    assert all((cache[i] == load_presized(f, 40)).all() for i, f in enumerate(files[::-1]))
    assert cache.intact(None)


def test_two_builders_at_once(photos):
    slow = """
def slowly(*args):
    time.sleep(0.05)
    print("decoded", flush=True)
    return load(*args)

store.load_presized = slowly
print(store.build_cache(files, 40, progress=False).intact(None))
"""
    # Threads print at once, so that words may stand without a space between: count them in the
    # text.
    outs = [p.communicate(timeout=600)[0] for p in [run(slow, photos) for _ in range(2)]]
    assert sorted(o.count("decoded") for o in outs) == [0, 32]
    assert [o.split()[-1] for o in outs] == ["True"] * 2


def test_a_kill_leaves_no_cache(photos):
    hang = """
def hanging(f, *args):
    if f.endswith("31.jpg"):
        time.sleep(1000)
    return load(f, *args)

store.load_presized = hanging
store.build_cache(files, 40, n_workers=2, progress=False)
"""
    p = run(hang, photos)
    until = time.time() + 600  # importing alone can take minutes on a busy machine
    while not any(o.stat().st_size for o in caches()) and time.time() < until:
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert [o.suffix for o in caches()] == [".part"]
    assert build(image_files(photos)).intact(None)
    assert [o.suffix for o in caches()] == [".json", ".u8"]


def test_an_interrupted_build_cleans_up(photos, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "load_presized", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(image_files(photos))
    assert caches() == []


def truncate(p):
    p.write_bytes(p.read_bytes()[:-100])


def lengthen(p):
    p.write_bytes(p.read_bytes() + b"more")


def zero(p):
    data, at = bytearray(p.read_bytes()), 40 * 60 * 3 * 2
    data[at : at + 4096] = bytes(4096)
    p.write_bytes(data)


def garble(p):
    p.write_bytes(p.read_bytes().replace(b'"presize": 40', b'"presize": 41'))


def empty(p):
    p.write_bytes(b"")


PIXELS = [(".u8", o) for o in (truncate, zero, empty, Path.unlink)]
INDEX = [(".json", o) for o in (garble, empty, Path.unlink)]


@pytest.mark.parametrize(
    "suffix, damage", [*PIXELS, (".u8", lengthen), *INDEX, (".json", truncate)]
)
@pytest.mark.filterwarnings("ignore:the cache .* is damaged")
def test_a_damaged_cache_is_built_again(photos, suffix, damage):
    files = image_files(photos)
    build(files)
    damage(next(o for o in caches() if o.suffix == suffix))
    cache = build(files)
    assert cache.intact(None)
    assert len(caches()) == 2
    assert all((cache[i] == load_presized(f, 40)).all() for i, f in enumerate(files))


def test_another_version_is_not_read(photos, monkeypatch):
    old = build(image_files(photos))
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    new = build(image_files(photos))
    assert new.pixels is not old.pixels
    assert len(caches()) == 2
    assert store._read_index(new.path.with_suffix(".json"))["version"] == store.VERSION


def decodes(monkeypatch):
    "A list that fills with the files that are decoded."
    seen, load = [], store.load_presized

    def noting(f, *args):
        seen.append(f)
        return load(f, *args)

    monkeypatch.setattr(store, "load_presized", noting)
    return seen


def test_unchanged_files_are_not_decoded_again(photos, monkeypatch):
    files, seen = image_files(photos), decodes(monkeypatch)
    build(files)
    build(files)
    build(files[::-1])
    build(files[:5])
    build(image_files(photos / "train" / "cat"))
    assert len(seen) == 32


@pytest.mark.parametrize("method,size", [("squish", 40), ("crop", 41)])
def test_another_size_or_method_is_another_cache(photos, method, size):
    build(image_files(photos))
    build(image_files(photos), size, method=method)
    assert len(cache_info()) == 2


def test_a_changed_source_is_decoded_again_and_the_old_cache_goes(photos):
    files = image_files(photos)
    old = build(files)
    photo(99, 80, 70).save(files[3])
    new = build(files)
    assert (new[3] == load_presized(files[3], 40)).all()
    assert not old.path.exists()
    assert len(caches()) == 2
    assert old[0].shape and (old[0] == new[0]).all()  # a map that is in use stays readable


def test_a_new_time_alone_is_a_change(photos, monkeypatch):
    files = image_files(photos)
    build(files)
    seen = decodes(monkeypatch)
    os.utime(files[0], (1, 1))
    build(files)
    assert len(seen) == 32


def test_added_and_removed_files(photos):
    files = image_files(photos)
    build(files)
    added = photos / "train" / "cat" / "new.jpg"
    photo(50).save(added)
    assert len(build(image_files(photos))) == 33 and len(caches()) == 2
    files[0].unlink()
    assert len(build(image_files(photos))) == 32
    with pytest.raises(BadImages, match=files[0].name):
        build(files)


def test_all_bad_files_are_named_at_once(photos):
    files = image_files(photos)
    files[0].write_bytes(b"")
    files[9].write_bytes(files[9].read_bytes()[:300])
    files[20].write_text("no image")
    with pytest.raises(BadImages) as e:
        build(files)
    assert [o.name for o in e.value.errors] == [str(files[i]) for i in (0, 9, 20)]
    assert all(str(files[i]) in str(e.value) for i in (0, 9, 20))
    assert "leave them out" in str(e.value) and caches() == []
    assert len(build([f for i, f in enumerate(files) if i not in (0, 9, 20)])) == 29


def test_bad_files_stop_dls_before_fastai_opens_one(photos):
    files = image_files(photos)
    for f in (files[0], files[-1]):
        f.write_bytes(f.read_bytes()[:300])
    with pytest.raises(BadImages) as e:
        dls_of(photos)
    assert {o.name for o in e.value.errors} == {str(files[0]), str(files[-1])} and caches() == []
    assert pickle.loads(pickle.dumps(e.value)).errors[0].name == str(files[0])


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full"
)
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(photos, monkeypatch):
    files = image_files(photos)
    names, root, stats = store._source(files)
    folder = store._folder(store.cache_home(), root, 40, "crop")
    folder.mkdir(parents=True)
    (folder / f"{store._digest(stats)}.part").symlink_to("/dev/full")
    # Or it would be taken for the rest of a killed build.
    monkeypatch.setattr(store, "_sweep", lambda home: None)
    with pytest.raises(CacheError, match="No space left on device.*SOTA_COURSE_HOME") as e:
        build(files)
    assert caches() == [] and pickle.loads(pickle.dumps(e.value)).folder == e.value.folder
    assert build(files).intact(None)


def test_an_unwritable_place_is_a_clear_error_with_the_way_out(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cache_dir="):
        build(image_files(photos), cache_dir=tmp_path / "file" / "caches")
    assert build(image_files(photos), cache_dir=tmp_path / "other").intact(None)


def test_a_cache_that_may_only_be_read_is_used(photos, monkeypatch):
    build(image_files(photos))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "FileLock", refuse)
    assert len(build(image_files(photos))) == 32
    with pytest.raises(CacheError, match="Permission denied"):
        build(image_files(photos), 20)


# What changes a disk: on one that may only be read these fail, for root as well.
CHANGES = [(os, o) for o in ("replace", "unlink", "mkdir", "rename", "rmdir")]
CHANGES += [(Path, o) for o in ("unlink", "mkdir")]


@contextmanager
def read_only():
    "All disks as if mounted read-only: permissions don't stop root."

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def reading(open_):
        def opened(file, mode="r", *args, **kwargs):
            if set("wax+") & set(mode):
                refuse()
            return open_(file, mode, *args, **kwargs)

        return opened

    def no_lock(file, *args, **kwargs):
        refuse()

    with pytest.MonkeyPatch.context() as m:
        for where, name in CHANGES:
            m.setattr(where, name, refuse)
        m.setattr("builtins.open", reading(open))
        m.setattr("io.open", reading(io.open))
        m.setattr(store, "FileLock", no_lock)
        yield


@pytest.mark.parametrize("suffix, damage", [*PIXELS, *INDEX])
@pytest.mark.filterwarnings("ignore:the cache .* is damaged")
def test_a_damaged_cache_on_a_read_only_disk_is_a_clear_error(photos, tmp_path, suffix, damage):
    files = image_files(photos)
    build(files)
    damage(next(o for o in caches() if o.suffix == suffix))
    left = [(o, o.read_bytes()) for o in caches()]
    words = "Read-only file system.*cache_dir=.*SOTA_COURSE_HOME"
    sources = [
        partial(build, files),
        partial(build, files[:3]),
        partial(dls_of, photos, presize=40),
    ]
    for source in sources:
        with read_only(), pytest.raises(CacheError, match=words) as e:
            source()
        assert e.value.errno == errno.EROFS
    assert [(o, o.read_bytes()) for o in caches()] == left
    assert build(files, cache_dir=tmp_path / "other").intact(None) and build(files).intact(None)


def test_a_whole_cache_on_a_read_only_disk_is_used_also_beside_a_rest(photos):
    files = image_files(photos)
    folder = build(files).path.parent
    (folder / "dead.part").write_bytes(b"rest")
    with read_only():
        cache = build(files)
        assert cache.intact(None)
        assert len(dls_of(photos, presize=40).one_batch()[0]) == 8
        assert len(cache_info()) == 1
        with pytest.raises(CacheError, match="can't be deleted: Read-only"):
            clear_cache()
    assert cache_info()[folder.name] > len(files) * 40 * 40 * 3


@pytest.mark.parametrize("step", ["mkdir", "lock", "open", "write", "pixels", "index"])
def test_each_step_of_a_build_that_fails_is_a_clear_error(photos, monkeypatch, step):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    replace, calls = os.replace, []

    def refuse_one(*args):
        "The first call moves the pixels to their place, the second the index."
        calls.append(args)
        if len(calls) == ("pixels", "index").index(step) + 1:
            refuse()
        return replace(*args)

    def blank(f, size, *args):
        return np.zeros((size, size, 3), np.uint8)  # opens no file

    steps = dict(
        mkdir=(Path, "mkdir", refuse),
        lock=(store, "FileLock", refuse),
        open=("builtins.open", refuse),
        write=(store, "_write_all", refuse),
        pixels=(os, "replace", refuse_one),
        index=(os, "replace", refuse_one),
    )
    monkeypatch.setattr(*steps[step])
    monkeypatch.setattr(store, "load_presized", blank)
    with pytest.raises(CacheError, match="Read-only file system.*cache_dir="):
        build(image_files(photos))
    monkeypatch.undo()
    assert not [o for o in store.cache_home().rglob("*.part")]


def test_errors_in_tidying_up_hide_nothing(photos, monkeypatch):
    files = image_files(photos)
    build(files)
    photo(99).save(files[0])
    files[1].write_bytes(b"")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", refuse)
        with pytest.raises(BadImages, match=files[1].name):
            build(files)
        photo(98).save(files[1])
        assert build(files).intact(None)


def test_a_disk_without_locks_is_a_clear_error(photos, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(store, "FileLock", refuse)
    with pytest.raises(CacheError, match="flock.*cache_dir="):
        build(image_files(photos))


def test_a_cache_that_can_not_be_read_back_is_an_error(photos, monkeypatch):
    monkeypatch.setattr(store.ImageCache, "intact", lambda *args: False)
    warned = pytest.warns(UserWarning, match="damaged")
    with warned, pytest.raises(CacheError, match="can't be read back"):
        build(image_files(photos))


def test_the_rest_of_a_killed_build_goes_at_the_next_start_of_another(photos, tmp_path):
    dead = store.cache_home() / f"photos-224-crop-{'0' * 16}"
    dead.mkdir(parents=True)
    for o in ("a.part", "b.u8", ".lock"):
        (dead / o).write_bytes(b"rest")
    other = store.cache_home() / "my-holiday-photos-2020"
    other.mkdir()
    (other / "a.part").write_bytes(b"not ours")
    whole = build(image_files(photos))
    assert [o.name for o in dead.iterdir() if o.name != ".lock"] == []
    assert (other / "a.part").exists()
    assert whole.path.exists()
    (dead / "a.part").write_bytes(b"rest")
    build(image_files(photos))  # found, not built
    assert not (dead / "a.part").exists()


def test_what_a_living_process_writes_is_left_alone(photos):
    busy = store.cache_home() / f"photos-224-crop-{'0' * 16}"
    busy.mkdir(parents=True)
    (busy / "a.part").write_bytes(b"half")
    code = f"""
import sys
from filelock import FileLock
with FileLock({str(busy / ".lock")!r}):
    print("locked", flush=True)
    sys.stdin.read()
"""
    p = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert p.stdout.readline() == "locked\n"
        build(image_files(photos))
        assert (busy / "a.part").read_bytes() == b"half"
    finally:
        p.communicate("")
    build(image_files(photos))
    assert not (busy / "a.part").exists()


def test_clearing_leaves_what_is_not_a_cache(photos):
    build(image_files(photos))
    strange = "a-40-crop-notahash", "photos-40-stretch-0123456789abcdef"
    for name in ("my-holiday-photos-2020", *strange):
        (store.cache_home() / name).mkdir()
        (store.cache_home() / name / "photo.jpg").write_bytes(b"mine")
    assert len(cache_info()) == 1 and clear_cache() > 0
    assert len(list(store.cache_home().glob("*/photo.jpg"))) == 3


def test_home_and_clearing(photos, tmp_path, monkeypatch):
    build(image_files(photos))
    build(image_files(photos), 20)
    assert sum(cache_info().values()) > 32 * 40 * 40 * 3 and len(cache_info()) == 2
    with pytest.raises(ValueError, match="there are photos-20-crop"):
        clear_cache("other")
    assert clear_cache(next(iter(cache_info()))) > 0 and clear_cache() > 0 and cache_info() == {}
    monkeypatch.delenv("SOTA_COURSE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert store.cache_home() == tmp_path / "me" / ".cache" / "sota_course" / "pixels"


def test_a_cache_travels_to_another_process_without_its_pixels(photos):
    cache = build(image_files(photos))
    data = pickle.dumps(cache)
    assert len(data) < 20000 and (pickle.loads(data)[5] == cache[5]).all()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.sampled_from(store.METHODS))
def test_any_shape_gives_squares_to_cut(w, h, size, method):
    a = presize_image(PIL.Image.new("RGB", (w, h)), size, method)
    assert a.dtype == np.uint8 and min(a.shape[:2]) == size and a.shape[2] == 3
    assert max(a.shape[:2]) <= size * (store.MAX_ASPECT if method == "crop" else 2) + 1


def test_odd_files_in_the_cache(photos):
    folder = photos / "train" / "cat"
    base = photo(1, 64, 48)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif, quality=95)
    base.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    base.convert("P").save(folder / "palette.png")
    deep = np.asarray(base.convert("L")).astype(np.uint16) * 257
    PIL.Image.fromarray(deep).save(folder / "deep.png")
    base.putalpha(0)
    base.save(folder / "clear.png")
    cache = build(image_files(folder))

    def get(name):
        return cache[cache.row(folder / name)].astype(int)

    straight = presize_image(photo(1, 64, 48), 40).astype(int)
    assert get("turned.jpg").shape == (53, 40, 3)
    assert abs(get("turned.jpg") - np.rot90(straight, 3)).mean() < 4
    assert (get("clear.png") == 255).all() and abs(get("cmyk.jpg") - straight).mean() < 4
    grey = presize_image(photo(1, 64, 48).convert("L").convert("RGB"), 40).astype(int)
    assert abs(get("deep.png") - grey).max() <= 1


def test_opening_leaves_the_callers_image_alone(photos):
    with PIL.Image.open(image_files(photos)[0]) as img:
        size = tuple(img.size)
        open_image(img, 8)
        assert tuple(img.size) == size


@pytest.mark.parametrize("side", [0, -1, 1.5, True, "8", [], float("nan")])
def test_a_side_that_is_none_is_not_blamed_on_the_image(photos, side):
    with pytest.raises(ValueError, match="min_side must be (a whole number|1 or more)") as e:
        open_image(image_files(photos)[0], side)
    assert not isinstance(e.value, ImageError)


# ---- the loader ----------------------------------------------------------------------------------


def datasets(photos, blocks=(ImageBlock, CategoryBlock), **kwargs):
    kwargs = {**dict(get_items=image_files, get_y=parent_label), **kwargs}
    block = DataBlock(blocks, splitter=GrandparentSplitter(valid_name="val"), **kwargs)
    return block.datasets(photos)


def test_batches_are_cut_from_the_cache(photos):
    dls = dls_of(photos, aug=False, presize=32)
    x, y = dls.valid.one_batch()
    want = [load_presized(f, 32) for f in dls.valid_ds.items[:8]]
    centre = [a[(a.shape[0] - 32) // 2 :][:32, (a.shape[1] - 32) // 2 :][:, :32] for a in want]
    assert torch.allclose(
        x.as_subclass(torch.Tensor), torch.from_numpy(np.stack(centre)).permute(0, 3, 1, 2) / 255
    )
    assert [dls.vocab[o] for o in y] == [f.parent.name for f in dls.valid_ds.items[:8]]
    assert type(x) is TensorImage and type(y) is TensorCategory and x.dtype == torch.float32
    assert len(dls.train) == 3
    assert len(dls.valid) == 1
    assert dls.train.shuffle
    assert not dls.valid.shuffle


def test_training_crops_vary_along_the_long_side_and_validation_is_central(photos):
    f = image_files(photos / "train")[0]  # 60 x 48
    dls = dls_of(photos, aug=False, presize=32, bs=4)
    i = list(dls.train_ds.items).index(f)
    crops = torch.stack([dls.train.create_batch([i])[0][0] for _ in range(40)]).permute(0, 2, 3, 1)
    full = torch.from_numpy(np.array(load_presized(f, 32)))
    windows = full.unfold(1, 32, 1).permute(1, 0, 3, 2)  # one for each place along the side
    crops = crops.as_subclass(torch.Tensor)
    at = [next(i for i, o in enumerate(windows) if torch.equal(c, o)) for c in crops]
    assert len(set(at)) > 4
    with dls.train_ds.set_split_idx(1):
        centre = dls.train.create_batch([i])[0][0].permute(1, 2, 0)
    assert torch.equal(
        centre.as_subclass(torch.Tensor), full[:, (full.shape[1] - 32) // 2 :][:, :32]
    )


def test_all_of_fastai_on_top(photos, tmp_path):
    """show_batch, training, tta, results, interpretation, test sets, prediction, export: as with
    fastai's own loaders."""
    dls = dls_of(datasets(photos), stats=imagenet_stats, path=tmp_path)
    dls.show_batch()
    dls.valid.show_batch(max_n=2)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    learn = Learner(dls, model, metrics=accuracy, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        preds, targs = learn.get_preds()
        plain, aug = learn.tta(beta=1)[0], learn.tta(beta=0)[0]
        assert torch.allclose(plain, preds) and not torch.allclose(aug, preds, atol=1e-4)
        learn.show_results(max_n=2)
        interp = ClassificationInterpretation.from_learner(learn)
        interp.plot_top_losses(2)
        assert interp.confusion_matrix().sum() == 8
        predicts_new_files(learn, preds, targs)
        learn.lr_find(num_it=3, show_plot=False)
        exports(learn)


def predicts_new_files(learn, preds, targs):
    "In every form in which fastai takes an image, with labels and without."
    dls = learn.dls
    f = dls.valid_ds.items[0]
    for item in (f, str(f), PILImage.create(f), np.array(PIL.Image.open(f))):
        assert torch.allclose(learn.predict(item)[2], preds[0], atol=1e-5)
    assert learn.predict(f)[0] in dls.vocab
    labelled = dls.test_dl(dls.valid_ds.items, with_labels=True)
    assert torch.equal(learn.get_preds(dl=labelled)[1], targs)
    new = learn.path / "new.png"
    photo(77).save(new)
    (x,) = dls.test_dl([new]).one_batch()
    assert x.shape == (1, 3, 32, 32)


def exports(learn):
    f = learn.dls.valid_ds.items[0]
    learn.export("model.pkl")
    assert (learn.path / "model.pkl").stat().st_size < 100000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load_learner(learn.path / "model.pkl")
    with again.no_bar():
        assert torch.allclose(again.predict(f)[2], learn.predict(f)[2], atol=1e-5)


def test_a_bad_new_file_is_named(photos, tmp_path):
    dls = dls_of(photos)
    (tmp_path / "bad.jpg").write_text("no image")
    with pytest.raises(ImageError, match="bad.jpg"):
        dls.test_dl([tmp_path / "bad.jpg"]).one_batch()


def test_multi_label_regression_and_tables(photos):
    def labels(f):
        return ["pet", f.parent.name]

    def half(f):
        return int(f.stem) / 2

    _, y = dls_of(datasets(photos, (ImageBlock, MultiCategoryBlock), get_y=labels)).one_batch()
    assert type(y) is TensorMultiCategory and y.shape == (8, 3) and (y.sum(1) == 2).all()
    _, y = dls_of(datasets(photos, (ImageBlock, RegressionBlock), get_y=half)).valid.one_batch()
    assert [float(o) for o in y] == [half(f) for f in image_files(photos / "val")]
    df = pd.DataFrame(dict(name=[str(f.relative_to(photos)) for f in image_files(photos)]))
    df["label"], df["is_val"] = df.name.str.split("/").str[1], df.name.str.startswith("val")
    dsets = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=ColReader("name", pref=f"{photos}/"),
        get_y=ColReader("label"),
        splitter=ColSplitter("is_val"),
    ).datasets(df)
    dls = dls_of(dsets)
    assert dls.train.cache is not None
    assert [dls.vocab[o] for o in dls.valid.one_batch()[1]] == list(df[df.is_val].label)
    dls.valid.one_batch()
    assert None not in dls.valid._rows


def test_targets_that_do_not_stack(photos):
    dsets = datasets(photos, (ImageBlock, TransformBlock), get_y=lambda f: f.name)
    assert list(dls_of(dsets).valid.one_batch()[1]) == [f.name for f in image_files(photos / "val")]


def test_an_epoch_depends_on_the_loaders_rng_alone(photos):
    dls = dls_of(photos)

    def epoch(seed, noise=0):
        dls.train.rng = random.Random(seed)
        out = []
        for x, y in dls.train:
            torch.rand(noise)
            np.random.rand(noise + 1)
            random.random()
            out.append((x, y))
        return torch.cat([o[0] for o in out]), torch.cat([o[1] for o in out])

    a, b, c = epoch(1), epoch(1, noise=5), epoch(2)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    set_seed(3)
    d = dls_of(photos).one_batch()[0]
    set_seed(3)
    e = dls_of(photos).one_batch()[0]
    assert torch.equal(d, e)


def test_images_of_a_batch_are_augmented_apart(photos):
    dls = dls_of(photos)
    x = dls.train.after_batch(dls.train.create_batch([0] * 6))[0]
    assert all(not torch.allclose(x[0], o, atol=1e-3) for o in x[1:])


@pytest.mark.parametrize(
    "aug,same",
    [
        (False, True),
        (None, True),
        (dict(max_lighting=0), False),
        (dict(max_lighting=0.5), False),
        (True, False),
    ],
)
def test_augmentation_is_a_choice(photos, aug, same):
    dls = dls_of(photos, aug=aug, presize=32, method="squish")
    x = dls.train.after_batch(dls.train.create_batch([5]))[0]
    pixels = np.array(load_presized(dls.train_ds.items[5], 32, "squish"))
    want = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert torch.allclose(x.as_subclass(torch.Tensor), want, atol=1e-6) == same


def test_more_batch_transforms_and_statistics_from_a_batch(photos):
    dls = dls_of(photos, after_batch=[Normalize(), RandomErasing(p=1.0)])
    x = dls.valid.one_batch()[0]
    assert abs(float(x.mean())) < 0.8 and x.min() < 0
    own = dls_of(photos, aug=aug_transforms(size=24), after_batch=IntToFloatTensor())
    assert own.one_batch()[0].shape == (8, 3, 24, 24)


def test_validation_is_training_without_draws(photos):
    aug, x = BookAug(32), torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    aug.train = False
    plain = warp_batch(x / 255, torch.eye(3).expand(3, 3, 3), 32)
    assert torch.allclose(aug.apply(x), plain, atol=1e-4)


def test_far_too_large_images_do_not_alias():
    "A checkerboard of single pixels is grey from afar; picking pixels would give stripes."
    x = ((torch.arange(320)[:, None] + torch.arange(320)) % 2).float().expand(2, 3, 320, 320)
    aug = BookAug(32, max_lighting=0)
    for aug.train in (True, False):
        assert (aug.apply(x, seed=1) - 0.5).abs().max() < 0.02


def test_draws_follow_the_seed_or_torch():
    aug = BookAug(32)
    x = torch.rand(4, 3, 40, 40)
    assert torch.equal(aug.apply(x, 5), aug.apply(x, 5))
    assert not torch.equal(aug.apply(x, 5), aug.apply(x, 6))
    torch.manual_seed(1)
    a = aug.apply(x)
    torch.manual_seed(1)
    b = aug.apply(x)
    assert torch.equal(a, b) and not torch.equal(b, aug.apply(x))


def test_the_callers_batch_is_not_changed():
    x = torch.rand(4, 3, 32, 32)
    before = x.clone()
    for train in (True, False):
        for kwargs in ({}, dict(min_scale=1, do_flip=False, max_rotate=0, max_zoom=1, max_warp=0)):
            aug = BookAug(32, **kwargs)
            aug.train = train
            aug.apply(x, 1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [0, 1, 33])
def test_batches_of_any_number(n):
    x = torch.zeros(n, 3, 80, 80, dtype=torch.uint8)
    assert BookAug(64).apply(x, 1).shape == (n, 3, 64, 64)


def test_a_batch_in_pieces_is_the_batch(monkeypatch):
    aug, x = BookAug(32), torch.randint(0, 256, (9, 3, 40, 40), dtype=torch.uint8)
    whole = aug.apply(x, 3)

    def pairs(n, *args):
        return [slice(i, i + 2) for i in range(0, n, 2)]

    monkeypatch.setattr(augment, "_pieces", pairs)
    assert torch.allclose(aug.apply(x, 3), whole, atol=1e-6)


def test_crops_of_other_ratios_fit_and_vary():
    d = BookAug(32, min_scale=0.2, ratio=(0.5, 2)).draw(2000, 60, 40, seed=1)
    height, width = d.side[:, 0] * 60, d.side[:, 1] * 40
    ratio, area = width / height, height * width / 2400
    assert d.side.max() <= 1
    assert (ratio > 0.499).all()
    assert (ratio < 2.001).all()
    assert area.min() > 0.199
    assert ratio.std() > 0.2


@pytest.mark.parametrize(
    "change,error",
    [
        (dict(bs=64), "64 can't be made of 24"),
        (dict(method="stretch"), "crop, squish, pad"),
        (dict(size=0, presize=None), "1 or more"),
        (dict(aug=dict(min_scale=0)), "min_scale"),
        (dict(aug=dict(max_lighting=1)), "max_lighting"),
        (dict(presize=40.5), "whole number"),
    ],
)
def test_bad_arguments_are_named(photos, change, error):
    with pytest.raises(ValueError, match=error):
        dls_of(photos, **change)


def test_what_a_cache_cannot_do_is_said(photos):
    with pytest.raises(ValueError, match="batch transforms"):
        dls_of(photos).train.new(after_item=Resize(20))
    with pytest.raises(ValueError, match="2 inputs"):
        dls_of(datasets(photos, (ImageBlock, ImageBlock, CategoryBlock), n_inp=2))
    late = TransformBlock(type_tfms=[PILImage.create, FlipItem()])
    with pytest.raises(ValueError, match="after it is opened"):
        dls_of(datasets(photos, (late, CategoryBlock)))
    with pytest.raises(ValueError, match="needs a batch size"):
        dls_of(photos).train.new(bs=None)
    with pytest.raises(FileNotFoundError, match="train and val"):
        dls_of(photos / "train")
    with pytest.raises(ValueError, match="empty"):
        build([])


def test_small_sets_keep_the_incomplete_batch_on_request(photos):
    assert len(dls_of(photos, bs=64, drop_last=False).one_batch()[0]) == 24


def test_sources_of_images(photos):
    assert image_sources(datasets(photos).valid) == image_files(photos / "val")


# ---- targets that would have to move with the image ----------------------------------------------


def boxes(f):
    return [[1, 1, 9, 9]]


def corners(f):
    return [[1, 1], [9, 9]]


@pytest.mark.parametrize(
    "block,get_y,kind",
    [
        (MaskBlock(), lambda f: f, "PILMask"),
        (ImageBlock(), lambda f: f, "PILImage"),
        (PointBlock, corners, "TensorPoint"),
        (BBoxBlock, boxes, "TensorBBox"),
    ],
)
def test_masks_points_and_boxes_are_refused(photos, block, get_y, kind):
    dsets = datasets(photos, (ImageBlock, block), get_y=get_y)
    for make in (dls_of, image_sources, lambda o: CachedDL(o.train, 4).one_batch()):
        with pytest.raises(ValueError, match=f"not for a {kind}: .*use fastai's own loaders"):
            make(dsets)
    assert caches() == []


@pytest.mark.parametrize(
    "f",
    [
        lambda x, size: BookAug(size).apply(x),
        resize_batch,
        reduce_batch,
        lambda x, size: warp_batch(x, torch.eye(3).expand(2, 3, 3), size),
    ],
)
def test_what_is_no_batch_of_images_is_refused(f):
    x = torch.rand(2, 3, 8, 8)
    for size in (0, -1, 1.5, None, True, "8", float("nan")):
        with pytest.raises(ValueError, match="size must be"):
            f(x, size)
    for bad in (None, [1.0], np.zeros((2, 3, 8, 8))):
        with pytest.raises(TypeError, match="are a tensor"):
            f(bad, 4)
    with pytest.raises(ValueError, match=r"not of the shape \(3, 8, 8\)"):
        f(x[0], 4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_pixels_of_another_type_are_not_taken_for_shares(dtype):
    with pytest.raises(ValueError, match="uint8, or floats from 0 to 1"):
        BookAug(8).apply(torch.ones(2, 3, 8, 8, dtype=dtype))


def test_what_is_no_image_is_refused():
    with pytest.raises(TypeError, match="takes a Pillow image"):
        presize_image(np.zeros((8, 8, 3), np.uint8), 8)
    with pytest.raises(ImageError, match="3 x height x width"):
        load_presized(torch.zeros(3, dtype=torch.uint8), 8)


# ---- arguments of any type, any damage -----------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 48),
    st.floats(width=16),
    st.sampled_from([np.int64(24), np.float32(0.5), torch.tensor(24), np.nan]),
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=4),
    st.binary(max_size=3),
    st.lists(NUMBERS, max_size=4),
    st.tuples(NUMBERS, NUMBERS),
    st.tuples(*[st.lists(st.floats(-1, 2, width=16), min_size=3, max_size=3)] * 2),
    st.just(object),
    st.dictionaries(
        st.sampled_from(["min_scale", "max_lighting", "ratio", "max_rotate", "p_affine", "nosuch"]),
        NUMBERS,
        max_size=2,
    ),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "Twelve photos, for tests that change none, and a home for their caches."
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SOTA_COURSE_HOME", str(folder / "home"))
        yield save_photos(folder / "photos", 12, [(40, 32)])


ARGUMENTS = (
    "bs size presize method aug stats after_batch cache n_workers val_bs dsets"  # of cached_dls
).split()


@given(st.sampled_from(ARGUMENTS), ANYTHING)
@pytest.mark.filterwarnings("ignore")
def test_property_any_argument_works_or_is_refused(shared, name, value):
    args = dict(dsets=shared, bs=4, size=16, progress=False) | {name: value}
    try:
        dls = cached_dls(args.pop("dsets"), **args)
    except (ValueError, TypeError):
        return
    except FileNotFoundError:
        assert name == "dsets" and isinstance(value, str)
        return
    x, y = dls.one_batch()
    assert x.shape == (int(args["bs"]), 3, int(args["size"]), int(args["size"]))
    assert x.isfinite().all()
    assert len(y) == int(args["bs"])


@pytest.mark.parametrize("name", ["bs", "size", "presize", "n_workers", "val_bs"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5, float("nan"), "8", [8]])
def test_counts_are_whole_numbers(photos, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, not "):
        dls_of(photos, **{name: value})


@pytest.mark.parametrize(
    "change,error",
    [
        (dict(presize=31), "presize=31 is less than size=32"),
        (dict(aug=3), "transforms, not 3"),
        (dict(aug=[]), "has no transform"),
        (dict(after_batch="flip"), "not 'flip'"),
        (dict(stats=5), "means and the standard deviations"),
        (dict(stats="imagenet"), "means and the standard deviations"),
        (dict(cache="folder"), "must come from `build_cache`"),
        (dict(cache_dir=5), "cache_dir must name a folder"),
        (dict(cache_dir=""), "cache_dir must name"),
        (dict(cache_dir="~nosuchuser/x"), "no such home folder"),
        (dict(aug=dict(min_scale=float("nan"))), "min_scale"),
        (dict(aug=dict(min_scale=1.5)), "min_scale"),
        (dict(aug=dict(ratio=(2, 1))), "in this order"),
        (dict(aug=dict(p_affine=2)), "p_affine"),
        (dict(aug=dict(max_rotate="10")), "max_rotate"),
        (dict(aug=dict(pad_mode="mirror")), "pad_mode"),
    ],
)
def test_other_bad_arguments_are_named(photos, change, error):
    with pytest.raises((ValueError, TypeError), match=error):
        dls_of(photos, **change)


def test_a_cache_of_another_presize_is_not_silently_preferred(photos):
    cache = build(image_files(photos), 40)
    with pytest.raises(ValueError, match="presize=48, but the cache has its images at 40"):
        dls_of(photos, cache=cache, presize=48)
    assert dls_of(photos, cache=cache).train.presize == 40
    assert dls_of(photos, cache=cache, presize=40).train.presize == 40


@pytest.mark.parametrize("files", ["folder", b"folder", Path("folder"), 5, None, [5], [None]])
def test_what_is_no_list_of_files_is_refused(files):
    with pytest.raises(TypeError, match="the cache is of"):
        build_cache(files, 40)


def test_names_that_no_disk_knows_are_bad_images(tmp_path):
    with pytest.raises(BadImages, match="can't be read"):
        build([tmp_path / "a\0b.jpg", tmp_path / ("x" * 300)])


def test_changed_pixels_are_an_error_also_where_finding_did_not_look(tmp_path, monkeypatch):
    monkeypatch.setenv("SOTA_COURSE_HOME", str(tmp_path / "home"))
    (tmp_path / "photos").mkdir()
    for i in range(130):
        PIL.Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "photos" / f"{i:03}.png")
    files = image_files(tmp_path / "photos")
    cache = build(files, 8)
    data = bytearray(cache.path.read_bytes())
    data[8 * 8 * 3] ^= 1  # of the second image: 64 of 130 are looked at when the cache is found
    cache.path.write_bytes(data)
    again = build(files, 8)
    assert (again[0] == 0).all() and (again[2] == 2).all()
    with pytest.raises(CacheError, match=r"001\.png have changed.*") as e:
        again[1]
    assert "clear_cache()" in str(e.value)
    clear_cache()
    assert (build(files, 8)[1] == 1).all()


def damaged(path, draw):
    "Cuts, changes, deletes or extends the file, or puts a folder in its place."
    content = path.read_bytes() if path.exists() else b""
    kind = draw(st.sampled_from(["cut", "flip", "delete", "add", "folder"]))
    if kind == "cut":
        path.write_bytes(content[: draw(st.integers(0, max(0, len(content) - 1)))])
    if kind == "add":
        path.write_bytes(content + draw(st.binary(min_size=1, max_size=9)))
    if kind == "flip" and content:
        flipped = bytearray(content)
        flipped[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
        path.write_bytes(flipped)
    if kind in ("delete", "folder"):
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()


@given(st.data())
@pytest.mark.filterwarnings("ignore:the cache .* is damaged")
def test_property_any_damage_gives_right_pixels_or_a_clear_error(shared, data):
    files = image_files(shared)
    want = [load_presized(f, 20) for f in files]
    whole = build(files, 20).path
    paths = [whole, whole.with_suffix(".json"), whole.parent / ".lock"]
    path = data.draw(st.sampled_from(paths))
    damaged(path, data.draw)
    try:
        for source in (lambda: build(files, 20), lambda: build(files[1:5], 20)):
            with read_only() if data.draw(st.booleans()) else nullcontext():
                try:
                    cache = source()
                except CacheError:
                    continue
            held = [(cache.row(f), a) for f, a in zip(files, want) if cache.row(f) is not None]
            assert all((cache[i] == a).all() for i, a in held)
    finally:
        if path.is_dir():
            path.rmdir()
        clear_cache()
