"""Data sets, their layout and their batches: what fastai does with them, what is refused, and what
is left on disk."""

import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from fastai.vision.all import (
    ClassificationInterpretation,
    CrossEntropyLossFlat,
    Learner,
    accuracy,
    load_learner,
    nn,
)
from hypothesis import given, strategies as st
from PIL import Image

from sota_course.data import PIPELINES, check_layout, class_name, data_block, get_data, get_dls
from sota_course.core import DataError
from sota_course.images.decode import image_files
from sota_course.images.drawn import draw_dataset

matplotlib.use("agg")


@pytest.fixture(scope="module")
def path():
    return get_data("drawn", n_train=60, n_val=30, progress=False)


def folder(root, **counts):
    "A data set below `root`: train_cat=3 makes three images in train/cat."
    for i, (name, n) in enumerate(counts.items()):
        where = Path(root) / name.replace("_", "/", 1)
        where.mkdir(parents=True)
        for j in range(n):
            Image.new("RGB", (12, 10), (40 * i, 9 * j, 90)).save(where / f"{j}.png")
    return Path(root)


# ---- fastai on top -------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_all_of_fastai_on_top(path, tmp_path, pipeline):
    """show_batch, results, interpretation, labelled and unlabelled test sets, prediction, export:
    as the book uses them."""
    dls = get_dls(16, 32, path, presize=40, pipeline=pipeline, num_workers=0, progress=False)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    files = image_files(path / "val")
    dls.show_batch()
    dls.valid.show_batch(max_n=2)
    dls.train_ds.show(dls.train_ds[0])
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(1)
        learn.show_results()
        learn.show_results(ds_idx=0, max_n=2)
        is_interpreted(learn)
        preds, _ = learn.get_preds()
        takes_test_sets(learn, files, preds)
        predicts_and_exports(learn, files, preds)


def is_interpreted(learn):
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_top_losses(4)
    interp.plot_confusion_matrix()
    interp.print_classification_report()
    assert interp.confusion_matrix().sum() == 30
    assert all(len(o) == 3 for o in interp.most_confused())


def takes_test_sets(learn, files, preds):
    "With labels and without, in the order of the files."
    dls, names = learn.dls, [class_name(o) for o in files]
    labelled, bare = dls.test_dl(files, with_labels=True), dls.test_dl(files)
    labelled.show_batch(max_n=4)
    bare.show_batch(max_n=4)
    assert [dls.vocab[o] for _, y in labelled for o in y] == names
    assert len(bare.one_batch()) == 1
    p, t = learn.get_preds(dl=labelled)
    assert [dls.vocab[o] for o in t] == names and torch.allclose(p, preds, atol=1e-5)
    assert torch.allclose(learn.get_preds(dl=bare)[0], preds, atol=1e-5)
    interp = ClassificationInterpretation.from_learner(learn, dl=labelled)
    assert interp.confusion_matrix().sum() == 30


def predicts_and_exports(learn, files, preds):
    "Each name belongs to its image, however often it goes there and back."
    dls, names = learn.dls, [class_name(o) for o in files]
    x = dls.valid.one_batch()
    assert [o[1] for o in dls.valid.decode_batch(x)] == names[:9]
    name, i, probs = learn.predict(files[0])
    assert name == dls.vocab[i] and torch.allclose(probs, preds[0], atol=1e-5)
    learn.export("model.pkl")
    again = load_learner(learn.path / "model.pkl")
    with again.no_bar():
        assert torch.allclose(again.predict(files[0])[2], probs, atol=1e-5)
        p, t = again.get_preds(dl=again.dls.test_dl(files, with_labels=True))
    assert [again.dls.vocab[o] for o in t] == names and torch.allclose(p, preds, atol=1e-5)


def test_label_functions_have_no_annotations():
    """fastai takes the first one, also that of the result, for the type of what comes in, and then
    finds no place for a path."""
    assert not class_name.__annotations__


# ---- names and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nosuch", "/no/such/folder", Path("no/such"), "", "x" * 400, "a\0b", "~"]
)
def test_what_is_not_there_is_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as e:
        get_data(name)
    assert len(str(e.value).splitlines()) == 1 and ("imagenette-160" in str(e.value) or name == "")


def test_a_near_match_is_a_hint():
    words = "no folder 'imagenete-160': did you mean 'imagenette-160'\\? Choose"
    with pytest.raises(DataError, match=words):
        get_data("imagenete-160")
    with pytest.raises(DataError, match="no folder 'qqqqq'\\. Choose"):
        get_data("qqqqq")


@pytest.mark.parametrize("name", [None, 5, 1.5, True, [], ["drawn"], {}, b"drawn"])
def test_what_names_nothing_is_refused(name):
    for f in (get_data, check_layout, data_block):
        with pytest.raises(TypeError, match="named by a string or a path, not by"):
            f(name)


NAN = float("nan")
DRAWINGS = dict(
    n_train=[-1, 1.5],
    n_val=["30"],
    seed=[None, True],
    noise=[1, "0", NAN, None],
    n_workers=[-1, 1.5],
    colour=["red"],
)


@pytest.mark.parametrize("name, value", [(k, o) for k, v in DRAWINGS.items() for o in v])
def test_bad_arguments_of_a_drawing_are_named(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        get_data("drawn", progress=False, **{name: value})


def test_each_drawing_has_a_folder_of_its_own():
    kinds = [dict(seed=o) for o in (10000001, 10000002)]
    kinds += [dict(noise=o) for o in (0.1234567, 0.1234568, 0.1)]
    made = [get_data("drawn", n_train=1, n_val=1, progress=False, **o) for o in kinds]
    assert len(set(made)) == 5 and made[-1].name.endswith("-1-1-42-0.1")
    assert get_data("drawn", n_train=1, n_val=1, seed=10000001, progress=False) == made[0]


# ---- sets that can't be learned from -------------------------------------------------------------

CASES = {
    "single class 'cat'.*two": dict(train_cat=8, val_cat=4),
    "8 training and 0 validation images": dict(train_cat=4, train_dog=4, val_cat=0, val_dog=0),
    "0 training and 4 validation images": dict(train_cat=0, train_dog=0, val_cat=2, val_dog=2),
    "of the class 'cat'.*two": dict(train_cat=8, train_dog=0, val_cat=4, val_dog=0),
    "no training images, of dog": dict(
        train_cat=4, train_owl=4, train_dog=0, val_cat=2, val_owl=2, val_dog=2
    ),
    "class 'church' in 2 folders, church and n03028079": dict(
        train_church=4, train_n03028079=4, train_dog=1, val_church=2, val_n03028079=2, val_dog=1
    ),
    "has 8 training images, fewer than a batch of 9": dict(
        train_cat=4, train_dog=4, val_cat=2, val_dog=2
    ),
}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("error", CASES)
def test_a_set_that_teaches_nothing_is_refused(tmp_path, error, pipeline):
    root = folder(tmp_path / "set", **CASES[error])
    with pytest.raises(DataError, match=error):
        get_dls(9, 8, root, pipeline=pipeline, num_workers=0, progress=False)


@pytest.mark.parametrize("valid_pct", [0.001, 0.999])
def test_a_share_that_leaves_one_side_empty_is_refused(tmp_path, valid_pct):
    root = folder(tmp_path / "set", train_cat=4, train_dog=4, val_cat=2, val_dog=2)
    with pytest.raises(DataError, match="both need some|two classes|no training images"):
        get_dls(1, 8, root, valid_pct=valid_pct, progress=False)


def test_an_incomplete_batch_can_be_kept(tmp_path):
    root = folder(tmp_path / "set", train_cat=4, train_dog=4, val_cat=2, val_dog=2)
    assert len(get_dls(9, 8, root, drop_last=False, progress=False).one_batch()[1]) == 8


# ---- arguments -----------------------------------------------------------------------------------


STATS = [5, "photos", [], [1], ([0.5] * 3, [0.0] * 3), ([NAN] * 3, [0.2] * 3), True]
# The argument, its values, and what is said of each.
NONSENSE = [
    *((o, [0, -3, 2.5, True, "8", NAN, [8]], f"{o} must be") for o in ("bs", "size", "presize")),
    ("min_scale", [0, 1.1, -0.5, NAN, "0.5", True, None], "min_scale is a share"),
    ("valid_pct", [0, 1, 1.5, -0.2, NAN, "0.2", True], "valid_pct is a share"),
    ("presize", [15], "presize=15 is less than size=16"),
    ("seed", [1.5, -1], "seed must be"),
    ("stats", STATS, "stats|mean|std|standard"),
    ("method", ["stretch", []], "method must be one of"),
    ("pipeline", [None], "pipeline must be one of"),
]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(
    "name, value, error", [(name, o, error) for name, values, error in NONSENSE for o in values]
)
def test_nonsense_is_named(path, pipeline, name, value, error):
    args = dict(bs=4, size=16, path=path, pipeline=pipeline, num_workers=0, progress=False)
    if name == "seed":  # of the share that is drawn
        args["valid_pct"] = 0.5
    with pytest.raises((ValueError, TypeError), match=error):
        get_dls(**args | {name: value})


NUMBERS = st.one_of(
    st.integers(-2, 40), st.floats(width=16), st.sampled_from([torch.tensor(4), float("inf")])
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(NUMBERS, max_size=3),
    st.tuples(*[st.lists(st.floats(-1, 2, width=16), min_size=3, max_size=3)] * 2),
    st.dictionaries(st.text(max_size=2), NUMBERS, max_size=2),
)


ARGUMENTS = "bs size presize method stats min_scale pipeline valid_pct seed path".split()


@given(st.sampled_from(ARGUMENTS), ANYTHING, st.sampled_from(sorted(PIPELINES)))
@pytest.mark.filterwarnings("ignore")
def test_property_any_argument_works_or_is_refused(path, name, value, pipeline):
    if name == "path" and value is None:
        return  # the whole drawn set, which takes long
    args = dict(bs=4, size=16, path=path, pipeline=pipeline, num_workers=0, progress=False)
    args[name] = value
    try:
        dls = get_dls(**args)
    except (ValueError, TypeError, DataError):
        return
    x, y = dls.one_batch()
    assert x.shape == (int(args["bs"]), 3, int(args["size"]), int(args["size"]))
    assert x.isfinite().all()
    assert len(dls.valid_ds) and len(set(dls.vocab)) == 10


def test_fewer_images_and_wrong_labels(tmp_path):
    "The loaders hold what was chosen, in both pipelines; validation is as it was."
    small = draw_dataset(tmp_path / "small", 60, 20, progress=False)
    whole = get_dls(8, 32, small, progress=False)
    for pipeline in ("cached", "fastai"):
        chosen = dict(per_class=4, noise=0.5, pipeline=pipeline, num_workers=0, progress=False)
        dls = get_dls(8, 32, small, **chosen)
        labels = [dls.vocab[int(y)] for _, y in dls.train_ds]
        right = [class_name(o) for o in dls.train.items]
        assert sorted(right) == sorted(list(dls.vocab) * 4)
        assert sum(a != b for a, b in zip(labels, right)) == round(0.5 * len(right))
        assert list(dls.valid.items) == list(whole.valid.items)
        assert [dls.vocab[int(y)] for _, y in dls.valid_ds] == list(
            map(class_name, whole.valid.items)
        )
        assert dls.args["per_class"] == 4 and dls.args["noise"] == 0.5
    assert "noise" not in whole.args
    with pytest.raises(DataError, match="fewer than per_class=1000"):
        get_dls(8, 32, small, per_class=1000, progress=False)
    with pytest.raises(ValueError, match="share of wrong labels"):
        get_dls(8, 32, small, noise=2, progress=False)
    with pytest.raises(DataError, match="fewer than a batch of 64"):
        get_dls(64, 32, small, per_class=1, progress=False)
    with pytest.raises(ValueError, match="arguments of BookAug"):
        get_dls(8, 32, small, pipeline="fastai", aug=dict(max_rotate=0), progress=False)
