"""The library with whatever versions are installed: it trains, mixes, predicts from several views,
and its sliders move.

`make test-oldest`, `make test-colab` and `make test-newest` run this file alone, in environments of
their own; so it needs nothing but pytest and the package."""

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import sota_course

# A file with a line `name==version` for each version that was asked for
PINS = os.environ.get("SOTA_COURSE_PINS")
SHOWN = "torch torchvision fastai fastcore ipywidgets matplotlib numpy pandas pillow".split()
UNASKED = "no versions were asked for: make test-oldest and make test-colab ask for some"


def release(text):
    "The numbers of a version: 2.11 and 2.11.0+cpu are the same release."
    numbers = [int(o) for o in text.partition("+")[0].split(".")]
    while numbers[-1:] == [0]:
        numbers.pop()
    return numbers


@pytest.mark.skipif(not PINS, reason=UNASKED)
def test_what_was_asked_for_is_installed(capsys):
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", Path(PINS).read_text(), re.M))
    with capsys.disabled():
        print("\nPython", sys.version.split()[0], *(f"{o} {version(o)}" for o in SHOWN))
    assert {k: release(version(k)) for k in pins} == {k: release(v) for k, v in pins.items()}


def test_every_module_imports():
    package = Path(sota_course.__file__).parent
    files = [o for o in package.rglob("*.py") if not o.name.startswith("_")]
    paths = [o.relative_to(package).with_suffix("") for o in files]
    for o in paths:
        import_module(".".join(("sota_course", *o.parts)))
    assert Path("training/runs") in paths


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    "A learner that was trained with mixup on a small drawn set."
    from sota_course.all import CutMix, MixUp, baseline_learner, get_data, get_dls

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOTA_COURSE_HOME", str(tmp_path_factory.mktemp("home")))
        path = get_data("drawn", n_train=200, n_val=50, progress=False)
        learn = baseline_learner(get_dls(20, 32, path, progress=False), arch="xresnet10")
        with learn.no_bar(), learn.no_logging():
            for o in (MixUp(), CutMix()):
                learn.fit_one_cycle(1, 8e-3, cbs=o)
        yield learn


def test_training_with_mixed_images(learn):
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert not learn.training and 0 < learn.recorder.values[-1][0] < 10


def test_views(learn):
    from sota_course.all import tta_predict

    probs, targets = tta_predict(learn, progress=False)
    assert probs.shape == (50, 10) and targets.shape == (50,)
    assert (probs.sum(1) - 1).abs().max() < 1e-5


def test_a_saved_model_predicts_the_same(learn, tmp_path):
    from sota_course.all import load_model, save_model

    probs, _ = learn.get_preds()
    saved = load_model(save_model(learn, tmp_path / "model"))
    assert (saved.probabilities(learn.dls.valid_ds.items[:4]) - probs[:4]).abs().max() < 1e-3


def test_a_run_is_kept_and_read_again(learn, tmp_path):
    from sota_course.all import Result, Run

    def make():
        return learn

    run = Run("try", make, epochs=1, seeds=[0], folder=tmp_path, progress=False).train()
    assert Result.load(tmp_path / "try-seed0.json").accuracy == run.results[0].accuracy


def test_a_slider_moves_its_picture(monkeypatch):
    import ipywidgets
    import matplotlib.pyplot as plt
    from sota_course.course import figures

    shown, sliders = [], []

    class Handle:
        def update(self, picture):
            shown.append(picture.data)

    def display(thing, display_id=None):
        if not display_id:
            return sliders.extend(thing.children)
        shown.append(thing.data)
        return Handle()

    monkeypatch.setattr(figures, "display", display)

    def draw(a):
        return plt.figure(figsize=(1 + a, 1))

    figures.explore(draw, "{a} inches more", a=(0.0, 2.0, 0.5))
    assert isinstance(sliders[0], ipywidgets.FloatSlider)
    sliders[0].value = 2.0
    assert [o.count("<img") for o in shown] == [1, 1]
    assert shown[0] != shown[1] and "2.0 inches" in shown[1]


def test_the_command(tmp_path):
    command = [Path(sys.executable).parent / "sota-train", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "usage" in run.stdout.lower(), run.stderr


@pytest.mark.parametrize(
    "own, policy", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")]
)
def test_how_threads_wait(own, policy):
    "Asleep, unless someone chose otherwise; and it's said before torch is loaded."
    said = "os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules"
    code = f"import os, sys, sota_course; print({said})"
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | own
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [policy, "False"]
