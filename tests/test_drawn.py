"The drawn data set from outside: other processes, kills, Ctrl-C, full and read-only disks."

import csv
import errno
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sota_course.images import drawn
from sota_course.images.drawn import CARD, CLASSES, draw_dataset, draw_image


def digest(path):
    "One hash over every file of a data set."
    sha = hashlib.sha256()
    for o in sorted(o for o in Path(path).rglob("*") if o.is_file()):
        sha.update(str(o.relative_to(path)).encode() + o.read_bytes())
    return sha.hexdigest()


def python(code, *args, **env):
    """A Python process that runs `code`, in a session of its own so that a signal can reach its
    children too."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **env},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def alive(session):
    "Processes of a session that still run (zombies don't)."
    ps = subprocess.run(
        ["ps", "-eo", "pid=,sid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    fields = [o.split() for o in ps.splitlines()]
    return [o for o in fields if int(o[1]) == session and not o[2].startswith("Z")]


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def images_in(folder):
    return list(folder.rglob("*.JPEG"))


# A shell that runs the tests in the background has them ignore Ctrl-C, and their children too.
DRAW = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from sota_course.images.drawn import draw_dataset; "
    "draw_dataset(sys.argv[1], {args}, progress=False)"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return draw_dataset(
        tmp_path_factory.mktemp("drawn") / "set", 20, 10, n_workers=0, progress=False
    )


@pytest.mark.parametrize("hash_seed,n_workers", [("0", 0), ("1", 2), ("2", 3)])
def test_same_bytes_in_any_process(small, tmp_path, hash_seed, n_workers):
    p = python(
        DRAW.format(args=f"20, 10, n_workers={n_workers}"),
        tmp_path / "other",
        PYTHONHASHSEED=hash_seed,
    )
    assert p.communicate()[1] == ""
    assert digest(tmp_path / "other") == digest(small)


def test_other_seed_other_images(small, tmp_path):
    other = draw_dataset(tmp_path / "other", 20, 10, seed=1, n_workers=0, progress=False)
    assert digest(other) != digest(small)


def test_callers_random_state_is_left_alone():
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    draw_image("church", 3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_layout_of_the_folder(small):
    rows = list(csv.DictReader(open(small / "labels.csv")))
    assert len(rows) == 30 and len(images_in(small)) == 30
    for split, n in (("train", 2), ("val", 1)):
        found = {o.name: len(list(o.iterdir())) for o in (small / split).iterdir()}
        assert found == dict.fromkeys(CLASSES, n)
    assert all(o["label"] == o["clean_label"] == Path(o["path"]).parent.name for o in rows)
    assert all((o["is_val"] == "True") == o["path"].startswith("val/") for o in rows)


def test_images_vary_in_size_and_quality(small):
    imgs = [Image.open(o) for o in images_in(small)]
    assert {o.mode for o in imgs} == {"RGB"} and {o.format for o in imgs} == {"JPEG"}
    assert len({o.size for o in imgs}) > 25 and len({tuple(o.quantization[0]) for o in imgs}) > 10
    assert all(96 <= min(o.size) <= 224 and max(o.size) <= 2 * min(o.size) + 1 for o in imgs)
    assert {o.width > o.height for o in imgs} == {True, False}


@pytest.mark.parametrize("noise,n", [(0.1, 2), (0.33, 7), (0.4, 8)])
def test_noise_moves_labels_but_not_images(small, tmp_path, noise, n):
    path = draw_dataset(tmp_path / "noisy", 20, 10, noise=noise, n_workers=0, progress=False)
    rows = list(csv.DictReader(open(path / "labels.csv")))
    wrong = [o for o in rows if o["label"] != o["clean_label"]]
    assert len(wrong) == n and not any(o["is_val"] == "True" for o in wrong)
    for o in rows:
        assert Path(o["path"]).parent.name == o["label"]
        clean = o["path"].replace(o["label"], o["clean_label"])
        assert (path / o["path"]).read_bytes() == (small / clean).read_bytes()


@pytest.mark.parametrize("n_train,n_val", [(0, 3), (7, 0), (13, 5)])
def test_any_number(tmp_path, n_train, n_val):
    path = draw_dataset(tmp_path / "few", n_train, n_val, progress=False)
    assert len(images_in(path / "train")) == n_train and len(images_in(path / "val")) == n_val
    assert len(list((path / "val").iterdir())) == 10
    counts = [len(list(o.iterdir())) for o in (path / "train").iterdir()]
    assert max(counts) - min(counts) <= 1


def test_a_larger_set_starts_with_the_smaller_one(small, tmp_path):
    path = draw_dataset(tmp_path / "larger", 25, 10, n_workers=0, progress=False)
    for o in images_in(small):
        assert (path / o.relative_to(small)).read_bytes() == o.read_bytes()


def test_nothing_is_drawn_twice(small, monkeypatch):
    monkeypatch.setattr(drawn, "draw_image", None)
    assert draw_dataset(small, 20, 10, progress=False) == small


@pytest.mark.parametrize("other", [dict(n_train=21), dict(n_val=11), dict(seed=1), dict(noise=0.1)])
def test_another_set_at_the_same_path_is_an_error_that_names_both(small, other):
    before = digest(small)
    name, value = list(other.items())[0]
    with pytest.raises(FileExistsError, match="choose another folder, or delete") as e:
        draw_dataset(small, **{"n_train": 20, "n_val": 10, **other}, progress=False)
    assert str(e.value).count(f"'{name}'") == 2 and f"'{name}': {value}" in str(e.value)
    assert digest(small) == before


def test_another_version_of_the_drawing_code_is_another_set(small, monkeypatch):
    monkeypatch.setattr(drawn, "DRAWING_VERSION", drawn.DRAWING_VERSION + 1)
    with pytest.raises(FileExistsError, match="'drawing'"):
        draw_dataset(small, 20, 10, progress=False)


def test_images_that_somebody_deleted_are_missed(tmp_path):
    path = draw_dataset(tmp_path / "set", 12, 3, progress=False)
    images_in(path)[0].unlink()
    with pytest.raises(FileExistsError, match="lacks 1 of its images"):
        draw_dataset(path, 12, 3)


def test_a_damaged_card_is_named(tmp_path):
    path = draw_dataset(tmp_path / "set", 3, 0, progress=False)
    (path / CARD).write_text("{")
    with pytest.raises(FileExistsError, match=f"{CARD}.*damaged"):
        draw_dataset(path, 3, 0)


def test_a_file_or_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        draw_dataset(tmp_path / "file", 3, 0)
    with pytest.raises(OSError, match="can't be written"):
        draw_dataset(tmp_path / "file" / "below", 3, 0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        draw_dataset(tmp_path / "folder", 3, 0)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/notes").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    assert len(images_in(draw_dataset(tmp_path / "set", 3, 0, progress=False))) == 3


@pytest.mark.parametrize(
    "bad,error,match",
    [
        (dict(noise=1.0), ValueError, "noise is 1.0"),
        (dict(noise=-0.1), ValueError, "noise is -0.1"),
        (dict(noise=float("nan")), ValueError, "noise is nan"),
        (dict(n_train=-1), ValueError, "n_train is -1"),
        (dict(n_val=-1), ValueError, "n_val is -1"),
        (dict(seed=-1), ValueError, "seed is -1"),
        (dict(n_train=2.5), TypeError, "n_train is 2.5"),
        (dict(n_workers=-1), ValueError, "n_workers is -1"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(tmp_path, bad, error, match):
    with pytest.raises(error, match=re.escape(match)):
        draw_dataset(tmp_path / "set", **bad, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, n_workers):
    # No file may grow beyond 3 kB: to the writer that is as good as a full disk, and the workers
    # inherit it.
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        + DRAW.format(args=f"200, 0, n_workers={n_workers}")
    )
    p = python(code, tmp_path / "set")
    assert "needs about 2 MB" in p.communicate()[1].splitlines()[-1]
    assert not alive(p.pid) and not [o for o in tmp_path.iterdir() if o.suffix != ".lock"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_systems_error_keeps_its_number(tmp_path, monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(drawn, "save_image", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as e:
        draw_dataset(tmp_path / "set", 3, 0, progress=False)
    assert e.value.errno == number and not [o for o in tmp_path.iterdir() if o.suffix != ".lock"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs a POSIX user")
def test_a_folder_that_may_not_be_written(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for o in (tmp_path, *tmp_path.parents):  # pytest's own folders, one more under xdist
        if Path(tempfile.gettempdir()) in o.parents:
            o.chmod(o.stat().st_mode | 0o055)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root may write anywhere: be nobody for a moment
    try:
        with pytest.raises(PermissionError, match="may write to"):
            draw_dataset(locked / "set", 3, 0, progress=False)
    finally:
        if root:
            os.seteuid(0)
    assert not list(locked.iterdir())


def test_two_at_once_draw_once(tmp_path):
    both = [python(DRAW.format(args="100, 0, n_workers=2"), tmp_path / "set") for _ in range(2)]
    assert [o.communicate()[1] for o in both] == ["", ""]
    assert len(images_in(tmp_path / "set")) == 100
    assert {o.name for o in tmp_path.iterdir()} - {".set.lock"} == {"set"}


def test_the_second_one_waits_for_the_first(tmp_path):
    first = python(DRAW.format(args="150, 0, n_workers=2"), tmp_path / "set")
    until(lambda: images_in(tmp_path))
    code = (
        "import sys; from sota_course.images import drawn; drawn._build = None; "
        "drawn.draw_dataset(sys.argv[1], 150, 0, progress=False)"
    )
    second = python(code, tmp_path / "set")
    assert first.communicate()[1] == second.communicate()[1] == ""


@pytest.mark.parametrize("n_workers", [0, 2])
def test_killed_means_absent_and_the_next_run_cleans_up(tmp_path, n_workers):
    p = python(DRAW.format(args=f"2000, 0, n_workers={n_workers}"), tmp_path / "set")
    until(lambda: len(images_in(tmp_path)) > 20)
    p.kill()  # the parent alone: its workers must notice
    p.communicate()
    until(lambda: not alive(p.pid))
    assert not (tmp_path / "set").exists()
    assert list(tmp_path.glob(".set.*.partial"))
    draw_dataset(tmp_path / "set", 12, 3, progress=False)
    assert not list(tmp_path.glob(".set.*.partial")) and len(images_in(tmp_path)) == 15


def test_the_rest_of_another_set_goes_at_the_next_start(tmp_path):
    dead, busy, foreign = (tmp_path / f".{o}.123.partial" for o in ("dead", "busy", "foreign"))
    for o in (dead, busy, foreign):
        (o / "train").mkdir(parents=True)
    for o in ("dead", "busy"):
        (tmp_path / f".{o}.lock").touch()
    code = f"""
import sys
from filelock import FileLock
with FileLock({str(tmp_path / ".busy.lock")!r}):
    print("locked", flush=True)
    sys.stdin.read()
"""
    p = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert p.stdout.readline() == "locked\n"
        draw_dataset(tmp_path / "set", 1, 0, progress=False)
        assert not dead.exists() and busy.exists()
        assert foreign.exists(), "without a lock it is another program's"
    finally:
        p.communicate("")
    draw_dataset(tmp_path / "set", 1, 0, progress=False)  # which is there
    assert not busy.exists() and foreign.exists()


NAN = float("nan")
BAD = [("n_train", True), ("n_train", 1.5), ("n_val", -1), ("seed", None)]
BAD += [("noise", "0"), ("noise", True), ("noise", NAN)]
BAD += [("n_workers", 1.5), ("n_workers", -1), ("n_workers", "2"), ("path", 5), ("path", None)]


@pytest.mark.parametrize("name, value", BAD)
def test_bad_arguments_are_named(tmp_path, name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} is "):
        draw_dataset(**dict(path=tmp_path / "set", progress=False) | {name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "label,size",
    [
        ([], 32),
        (None, 32),
        (5, 32),
        *(("church", o) for o in (0, 1.5, NAN, True, "x", (8,), (8, 8.5), (7, 8))),
    ],
)
def test_what_can_not_be_drawn_is_refused(label, size):
    with pytest.raises(ValueError, match="no class|size is"):
        draw_image(label, seed=1, size=size)


def test_the_name_comes_last(tmp_path, monkeypatch):
    def look(folder, path):
        assert (folder / CARD).exists()
        assert (folder / "labels.csv").exists()
        assert len(images_in(folder)) == 3
        assert not path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn.os, "replace", look)
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path / "set", 3, 0, progress=False)
    assert [o.name for o in tmp_path.iterdir()] == [".set.lock"]


def test_ctrl_c_leaves_no_process_and_no_folder(tmp_path):
    p = python(DRAW.format(args="2000, 0, n_workers=2"), tmp_path / "set")
    until(lambda: len(images_in(tmp_path)) > 20)
    os.killpg(p.pid, signal.SIGINT)  # as a terminal does: to all of them
    err = p.communicate(timeout=120)[1]
    assert err.rstrip().endswith("KeyboardInterrupt") and err.count("Traceback") == 1
    assert not alive(p.pid) and not [o for o in tmp_path.iterdir() if o.suffix != ".lock"]


def test_a_worker_that_crashes_is_an_error(tmp_path):
    p = python(DRAW.format(args="30000, 0, n_workers=2"), tmp_path / "set")
    until(lambda: len(images_in(tmp_path)) > 20)
    worker = next(int(o[0]) for o in alive(p.pid) if int(o[0]) != p.pid)
    os.kill(worker, signal.SIGKILL)
    err = p.communicate(timeout=120)[1]  # the other worker would need longer
    assert "RuntimeError: a drawing process ended early" in err and "-9" in err
    assert not alive(p.pid) and not [o for o in tmp_path.iterdir() if o.suffix != ".lock"]


def run_script(script, cwd):
    "Run a script of the plainest kind, with two workers, from the folder `cwd`."
    script.write_text(
        "from sota_course.images.drawn import draw_dataset\n"
        f"print(draw_dataset({str(cwd / 'set')!r}, 20, 10, n_workers=2, progress=False))\n"
    )
    return subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=cwd)


def test_a_script_without_a_main_guard_works(tmp_path):
    out = run_script(tmp_path / "script.py", tmp_path)
    assert out.stderr == "" and out.stdout.splitlines() == [str(tmp_path / "set")]


def test_files_in_the_working_folder_do_not_disturb_the_workers(tmp_path):
    (tmp_path / "csv.py").write_text("raise Exception('not the csv module')")
    (tmp_path / "scripts").mkdir()
    assert run_script(tmp_path / "scripts" / "script.py", tmp_path).stderr == ""


def test_progress_is_shown_or_not(tmp_path, capsys):
    draw_dataset(tmp_path / "quiet", 12, 0, progress=False)
    assert capsys.readouterr() == ("", "")
    draw_dataset(tmp_path / "loud", 12, 0)
    assert "[12/12" in capsys.readouterr().out


def test_the_module_is_light():
    heavy = "'torch', 'fastai', 'fastprogress', 'matplotlib'"
    p = python(
        f"import sys, sota_course.images.drawn; print([o for o in ({heavy}) if o in sys.modules])"
    )
    assert p.communicate() == ("[]\n", "")


# Each class at seed 0: the mean of each quarter of a grey 64 x 64 version. If this changes, so do
# readers' images: raise `DRAWING_VERSION`, so that a set drawn before is not taken for one drawn
# now, and write the new numbers here.
QUARTERS = {
    1: {
        "tench": [133, 173, 126, 153],
        "English springer": [152, 172, 180, 209],
        "cassette player": [130, 164, 129, 146],
        "chain saw": [126, 192, 110, 178],
        "church": [160, 183, 154, 188],
        "French horn": [162, 199, 161, 182],
        "garbage truck": [143, 193, 123, 182],
        "gas pump": [165, 199, 171, 193],
        "golf ball": [180, 218, 177, 218],
        "parachute": [136, 167, 148, 179],
    }
}


@pytest.mark.parametrize("name", CLASSES.values())
def test_drawing_changed_means_a_new_version(name):
    img = draw_image(name, 0, size=64).convert("L").reduce(32)
    known = QUARTERS[drawn.DRAWING_VERSION][name]
    np.testing.assert_allclose(np.asarray(img).ravel(), known, atol=1)
