"""Checking images: every kind of bad file by its name, any bytes at all, folders that mean harm,
and the speed."""

import contextlib
import io
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageFile

from sota_course.images import check as checking
from sota_course.errors import BadImages, DataError
from sota_course.images.check import FATAL, HARMLESS, check_images, quarantine

root = Path(__file__).resolve().parent.parent


def photo(size=(64, 48), seed=0):
    w, h = size
    a = np.random.default_rng(seed).integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8)
    return Image.fromarray(a).resize(size, Image.Resampling.BICUBIC)


def data(im, fmt, **kwargs):
    buf = io.BytesIO()
    im.save(buf, fmt, **kwargs)
    return buf.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(w, h, pixels, bits=8, colour=2):
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def turned(n):
    exif = Image.Exif()
    exif[0x112] = n
    return exif


JPEG, PNG = data(photo(), "JPEG"), data(photo(), "PNG")
GREY16 = Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64))
NOTES = data(photo(), "JPEG", dpi=(72, 72), exif=turned(6)).replace(b"MM\0*", b"MM\xff*")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


def problems(path, **kwargs):
    return [(o.problem, o.detail) for o in check_images(path, progress=False, **kwargs).records]


def names(path, **kwargs):
    return {o for o, _ in problems(path, **kwargs)}


# ---- each problem, by name ----

SOUND = {
    "a.jpg": JPEG,
    "a.jpeg": data(photo(), "JPEG", progressive=True),
    "a.png": PNG,
    "a.webp": data(photo(), "WEBP"),
    "a.bmp": data(photo(), "BMP"),
    "a.tiff": data(photo(), "TIFF"),
    "upright.jpg": data(photo(), "JPEG", exif=turned(1)),
}
PROBLEMS = {
    "empty.jpg": (b"", {"empty"}),
    "text.jpg": (b"hello, no image", {"unreadable"}),
    "page.png": (b"<!DOCTYPE html><html>", {"unreadable"}),
    "zeros.jpg": (bytes(5000), {"unreadable"}),
    "zip.jpg": (b"PK\x03\x04" + bytes(99), {"unreadable"}),
    "script.jpg": (POSTSCRIPT, {"unreadable"}),
    "cut.jpg": (JPEG[:-60], {"truncated"}),
    "cut in the header.jpg": (JPEG[:100], {"truncated"}),
    "start.jpg": (JPEG[:4], {"truncated"}),
    "cut.png": (PNG[: len(PNG) // 2], {"truncated"}),
    "start.png": (PNG[:20], {"truncated"}),
    "between chunks.png": (PNG[:33], {"truncated"}),
    "cut.webp": (data(photo(), "WEBP")[:-100], {"truncated"}),
    "cut.gif": (data(photo(), "GIF")[:-900], {"truncated"}),
    "cut.bmp": (data(photo(), "BMP")[:-3000], {"truncated"}),
    "cut.tiff": (data(photo(), "TIFF")[:-3000], None),
    "crc.png": (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], {"unreadable"}),
    "chunk.png": (PNG[:45] + b"\xc3" + PNG[46:], {"unreadable"}),
    "number.jpg": (b"P6\n64x48\n255\n" + bytes(9216), {"unreadable"}),
    "notes.jpg": (NOTES, {"damaged EXIF"}),
    "grey.jpg": (data(photo().convert("L"), "JPEG"), {"grey"}),
    "bilevel.png": (data(photo().convert("1"), "PNG"), {"grey"}),
    "cmyk.jpg": (data(photo().convert("CMYK"), "JPEG"), {"CMYK"}),
    "palette.gif": (data(photo(), "GIF"), {"palette"}),
    "palette.png": (data(photo().convert("P"), "PNG"), {"palette"}),
    "rgba.png": (data(photo().convert("RGBA"), "PNG"), {"alpha"}),
    "la.png": (data(photo().convert("LA"), "PNG"), {"alpha", "grey"}),
    "clear palette.png": (data(photo().convert("P"), "PNG", transparency=3), {"palette", "alpha"}),
    "clear colour.png": (data(photo(), "PNG", transparency=(0, 0, 0)), {"alpha"}),
    "grey16.png": (data(GREY16, "PNG"), {"grey", "16-bit"}),
    "grey16.tiff": (data(GREY16, "TIFF"), {"grey", "16-bit"}),
    "rgb16.png": (png(9, 5, bytes((1 + 9 * 6) * 5), bits=16), {"16-bit"}),
    "rgba16.png": (png(9, 5, bytes((1 + 9 * 8) * 5), 16, 6), {"16-bit", "alpha"}),
    "lab.tiff": (data(Image.new("LAB", (9, 9)), "TIFF"), {"colour space"}),
    "rotated.jpg": (data(photo(), "JPEG", exif=turned(6)), {"rotated"}),
    "mirrored.png": (data(photo(), "PNG", exif=turned(2)), {"rotated"}),
    "rotated grey.jpg": (data(photo().convert("L"), "JPEG", exif=turned(8)), {"rotated", "grey"}),
    "really a png.jpg": (PNG, {"misnamed"}),
    "huge.png": (png(10_000, 9_000, b""), {"too large"}),
    "bomb.png": (png(50_000, 50_000, b""), {"too large"}),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound(name, tmp_path):
    (tmp_path / name).write_bytes(SOUND[name])
    report = check_images(tmp_path, progress=False)
    assert (report.records, report.n_files) == ([], 1) and report.raise_if_fatal() is report


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(name, tmp_path):
    content, expected = PROBLEMS[name]
    (tmp_path / name).write_bytes(content)
    report = check_images(tmp_path, progress=False)
    found = {o.problem for o in report.records}
    if expected:
        assert found == expected
    else:
        assert found <= {"truncated", "unreadable"} and found
    assert {(o.file, o.fatal) for o in report.records} == {(name, bool(found & set(FATAL)))}
    for text in (str(report), report._repr_markdown_()):
        assert name in text and all(o in text for o in found)


def test_no_program_is_started(tmp_path, monkeypatch):
    "Pillow hands PostScript to Ghostscript, whatever the file's name."
    from PIL import EpsImagePlugin

    (tmp_path / "a.jpg").write_bytes(data(photo(), "EPS"))
    started = []

    def ghostscript(*args, **kwargs):
        started.append(args)
        return photo().im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    assert problems(tmp_path)[0][0] == "unreadable"
    assert "PostScript" in problems(tmp_path)[0][1]
    assert not started


def test_giants_are_not_decoded(tmp_path, monkeypatch):
    "An image is judged by its header; with a limit of its own size it is decoded."
    (tmp_path / "a.png").write_bytes(PNG)
    loads = []

    def noting(im):
        loads.append(im)
        return []

    monkeypatch.setattr(checking, "decode_problems", noting)
    assert names(tmp_path, max_pixels=64 * 48 - 1) == {"too large"} and not loads
    assert names(tmp_path, max_pixels=64 * 48) == set() and len(loads) == 1


def test_what_it_is_instead(tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"\n <!doctype HTML><html>")
    (tmp_path / "lfs.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00")
    assert {o.file: o.detail for o in check_images(tmp_path, progress=False).records} == {
        "page.jpg": "23 bytes, an HTML page, as a failed download leaves",
        "lfs.jpg": "56 bytes, a Git LFS pointer, whose file wasn't fetched",
    }


def test_a_program_that_tolerates_missing_ends(tmp_path, monkeypatch):
    "With `LOAD_TRUNCATED_IMAGES`, as some libraries set it, Pillow would decode the rest as grey."
    (tmp_path / "cut.jpg").write_bytes(JPEG[:-200])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert names(tmp_path) == {"truncated"} and ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(
    "kwargs", [{}, dict(progressive=True), dict(subsampling=0), dict(restart_marker_rows=1)]
)
def test_reduced_decoding_sees_every_cut(kwargs, tmp_path):
    "Wherever a JPEG is cut, decoding an eighth of its size notices if full decoding does."
    whole = data(photo((150, 90)), "JPEG", **kwargs)
    for n in range(200, len(whole), 37):
        try:
            Image.open(io.BytesIO(whole[:n])).load()
            continue
        except Exception:
            (tmp_path / f"{n:06}.jpg").write_bytes(whole[:n])
    cut = sorted(o.name for o in tmp_path.iterdir())
    assert len(cut) > 20 and [o.file for o in check_images(tmp_path, progress=False).fatal] == cut


# ---- what the operating system says ----


@contextlib.contextmanager
def nobody():
    "As a user to whom permissions matter; root isn't one."
    if os.geteuid():
        yield
    else:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions work otherwise here")
def test_no_permission(tmp_path):
    for o in (tmp_path, *tmp_path.parents):  # pytest's own folders, one more under xdist
        if Path(tempfile.gettempdir()) in o.parents:
            o.chmod(0o755)
    for o in ("secret.jpg", "open.jpg"):
        (tmp_path / o).write_bytes(JPEG)
    (tmp_path / "secret.jpg").chmod(0)
    (tmp_path / "locked").mkdir(mode=0)
    # What Pillow loads when first needed may be out of nobody's reach.
    check_images(tmp_path, progress=False)
    with nobody():
        report = check_images(tmp_path, progress=False)
    (tmp_path / "locked").chmod(0o755)
    assert [(o.file, o.problem, o.fatal) for o in report.records] == [
        (o, "no permission", True) for o in ("locked", "secret.jpg")
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_links(tmp_path):
    "A pipe would keep a reader waiting, a link may lead nowhere or to itself."
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    result = []

    def look():
        result.append(check_images(tmp_path, progress=False))

    t = threading.Thread(target=look, daemon=True)
    t.start()
    t.join(20)
    assert result
    assert [(o.file, o.problem) for o in result[0].records] == [
        (o, "unreadable") for o in ("dangling.jpg", "pipe.jpg", "self.jpg")
    ]


def test_folder_loops(tmp_path):
    "Twelve folders that link to each other have 12! paths; each is looked at once."
    for i in range(12):
        (tmp_path / f"{i:02}").mkdir()
    for i in range(12):
        (tmp_path / f"{i:02}" / "a.jpg").write_bytes(JPEG)
        for j in range(12):
            (tmp_path / f"{i:02}" / f"to{j:02}").symlink_to(tmp_path / f"{j:02}")
    (tmp_path / "up").symlink_to(tmp_path)
    report = check_images(tmp_path, progress=False)
    assert report.n_files == 12
    assert "up" in {o.file for o in report.fatal}
    assert {o.problem for o in report.records} == {"folder loop", "linked twice"}


def test_a_class_that_is_a_link(tmp_path):
    "One folder in both splits: it has images in both, and it is worth knowing."
    for o in ("train/a", "val"):
        (tmp_path / o).mkdir(parents=True)
    (tmp_path / "train/a/1.jpg").write_bytes(JPEG)
    (tmp_path / "val" / "a").symlink_to(tmp_path / "train" / "a")
    either = [[("linked twice", f"is {os.path.join(o, 'a')}")] for o in ("train", "val")]
    assert problems(tmp_path) in either


def test_deep_folders(tmp_path):
    "Deeper than Python's recursion goes."
    deep = [tmp_path / "/".join("d" * (i + 1)) for i in range(1010)]
    for o in deep:
        o.mkdir()
    (deep[-1] / "a.jpg").write_bytes(JPEG)
    try:
        assert check_images(tmp_path, progress=False).n_files == 1
    finally:  # pytest's own cleaning up is recursive
        (deep[-1] / "a.jpg").unlink()
        for o in reversed(deep):
            o.rmdir()


# ---- a data set's folder ----


def test_classes(tmp_path):
    for o in ("train/both", "val/both", "train/only", "val/lonely", "train/none", "val/none"):
        (tmp_path / o).mkdir(parents=True)
    for o in ("train/both", "val/both", "train/only", "val/lonely"):
        (tmp_path / o / "1.JPEG").write_bytes(JPEG)
    (tmp_path / "val/both/notes.txt").write_text("a note")
    (tmp_path / "labels.csv").write_text("not among the images")
    (tmp_path / ".whole").touch()
    (tmp_path / "train/both/.DS_Store").touch()
    report = check_images(str(tmp_path), progress=False)
    assert [(o.file, o.problem, o.fatal) for o in report.records] == [
        ("val/lonely", "no train images", True),
        ("train/none", "empty class", False),
        ("train/only", "no val images", False),
        ("val/both/notes.txt", "not an image", False),
        ("val/none", "empty class", False),
    ]


def test_a_missing_split(tmp_path):
    (tmp_path / "val/a").mkdir(parents=True)
    (tmp_path / "val/a/1.jpg").write_bytes(JPEG)
    assert names(tmp_path) == {"no train images"}


def test_nothing_there(tmp_path):
    (found,) = check_images(tmp_path, progress=False).records
    assert (found.file, found.problem, found.fatal) == (".", "no images", True)
    with pytest.raises(DataError, match="takes a folder, or a list of files"):
        check_images(tmp_path / "gone")


def test_files(tmp_path):
    (tmp_path / "a").mkdir()
    for o in ("a/1.jpg", "2.jpg"):
        (tmp_path / o).write_bytes(JPEG[:50])
    files = [tmp_path / "a/1.jpg", str(tmp_path / "2.jpg"), tmp_path / "gone.jpg"]
    report = check_images(files, progress=False)
    assert [o.file for o in report.fatal] == ["2.jpg", "a/1.jpg", "gone.jpg"]
    assert report.root == tmp_path
    assert check_images(tmp_path / "2.jpg", progress=False).fatal[0].file == "2.jpg"
    assert check_images([], progress=False).n_files == 0


# ---- the report ----


def test_report_is_short(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.jpg").touch()
    report = check_images(tmp_path, progress=False)
    assert str(report).splitlines() == [
        "30 files looked at: 30 fatal and 0 harmless findings.",
        "FATAL empty: 30, has no bytes",
        "    00.jpg (0 bytes)",
        "    01.jpg (0 bytes)",
        "    02.jpg (0 bytes)",
        "    … and 27 more",
    ]
    assert "… and 27 more" in report._repr_markdown_()
    with pytest.raises(BadImages) as e:
        report.raise_if_fatal()
    assert "09.jpg: empty" in str(e.value)
    assert "… and 20 more" in str(e.value)
    assert "quarantine(" in str(e.value)
    assert str(tmp_path) in str(e.value)


NASTY = ["a\nb.jpg", "a|b`<b>.jpg", os.fsdecode(b"\xff\xfe.jpg"), "=1+1.jpg", '"quoted",.jpg']


def test_names_that_nobody_expects(tmp_path, capsys):
    for o in NASTY:
        (tmp_path / o).write_bytes(b"")
    report = check_images(tmp_path, progress=False)
    assert {o.file for o in report.fatal} == set(NASTY)
    print(report)
    assert len(str(report).splitlines()) == 6
    for o in NASTY:
        table = check_images([tmp_path / o], progress=False)._repr_markdown_()
        row = table.encode().splitlines()[-1]  # no lone surrogates
        assert row.count(b"|") == 6 and b"<b>" not in row and b"`" not in row
    report.to_csv(tmp_path / "report.csv")
    import csv

    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["file", "problem", "detail", "fatal"]
    assert len(rows) == 6
    assert rows[1][1:] == ["empty", "0 bytes", "True"]
    assert {o[0] for o in rows[1:]} >= set(NASTY) - {NASTY[2]}


# ---- quarantine ----


def tree(path):
    return sorted(o.relative_to(path).as_posix() for o in path.rglob("*") if o.is_file())


@pytest.fixture
def bad(tmp_path):
    folder = tmp_path / "data"
    good = ["train/a/good.jpg", "val/a/good.jpg", "val/lonely/good.jpg"]
    for o in [*good, "train/a/bad.jpg", "val/lonely/bad.jpg"]:
        (folder / o).parent.mkdir(parents=True, exist_ok=True)
        (folder / o).write_bytes(JPEG if "good" in o else JPEG[:99])
    return folder


def test_quarantine(bad, tmp_path):
    """A class that is fatal goes as a whole; what was taken out leaves a sound data set, and can go
    back."""
    aside = tmp_path / "aside"
    assert quarantine(check_images(bad, progress=False), aside) == [
        aside / "train/a/bad.jpg",
        aside / "val/lonely",
    ]
    assert tree(aside) == ["train/a/bad.jpg", "val/lonely/bad.jpg", "val/lonely/good.jpg"]
    assert tree(bad) == ["train/a/good.jpg", "val/a/good.jpg"]
    assert check_images(bad, progress=False).raise_if_fatal().records == []
    assert quarantine(check_images(bad, progress=False), aside) == []


def test_quarantine_overwrites_nothing(bad, tmp_path):
    (tmp_path / "aside/train/a").mkdir(parents=True)
    (tmp_path / "aside/train/a/bad.jpg").write_text("another one")
    before = tree(bad)
    with pytest.raises(DataError, match="already has train/a/bad.jpg: nothing was moved"):
        quarantine(check_images(bad, progress=False), tmp_path / "aside")
    assert tree(bad) == before and (tmp_path / "aside/train/a/bad.jpg").read_text() == "another one"


@pytest.mark.parametrize("inside", ["", "bad", "train/bad"])
def test_quarantine_lies_outside(inside, bad):
    with pytest.raises(DataError, match="take a folder outside"):
        quarantine(check_images(bad, progress=False), bad / inside)


def test_quarantine_says_how_far_it_came(bad, tmp_path, monkeypatch):
    report = check_images(bad, progress=False)
    real = checking.shutil.move

    def move(a, b):
        if str(a).endswith("lonely"):
            raise OSError(28, "No space left on device")
        return real(a, b)

    monkeypatch.setattr(checking.shutil, "move", move)
    with pytest.raises(DataError, match="No space left on device; 1 of 2 files were moved"):
        quarantine(report, tmp_path / "aside")
    assert (bad / "val/lonely/bad.jpg").exists() and (tmp_path / "aside/train/a/bad.jpg").exists()


# ---- any bytes at all ----

SEEDS = list({**SOUND, **{k: v for k, (v, _) in PROBLEMS.items()}}.values())
SEEDS += [data(photo(), o) for o in ("PPM", "ICO", "JPEG2000", "TIFF", "GIF")]
SEEDS += [data(photo(), "TIFF", compression="tiff_lzw")]
HEADS = [
    b"",
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"BM",
    b"P6 9 9 255\n",
    b"\0\0\1\0\1\0",
    b"\0\0\0\x0cjP  \r\n\x87\n",
    b"\0\0\0\x20ftypavif",
    b"%!PS",
]
RANDOM = st.builds(lambda head, body: head + body, st.sampled_from(HEADS), st.binary(max_size=400))


@st.composite
def mutated(draw):
    "A real file with a piece cut off, some bytes changed, and a piece moved in."
    b = bytearray(draw(st.sampled_from([o for o in SEEDS if o])))
    for _ in range(draw(st.integers(0, 6))):
        b[draw(st.integers(0, len(b) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        b = b[: draw(st.integers(1, len(b)))]
    at = draw(st.integers(0, len(b)))
    return bytes(b[:at] + draw(st.binary(max_size=12)) + b[at:])


@contextlib.contextmanager
def silent_stderr(path):
    "Nothing may be written to file descriptor 2: C libraries complain there."
    sys.stderr.flush()
    old, new = os.dup(2), os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(new, 2)
    try:
        yield
    finally:
        os.dup2(old, 2)
        os.close(old)
        os.close(new)
    assert path.read_bytes() == b""


@settings(
    max_examples=15 * settings.default.max_examples,  # bytes are cheap, and most of them look alike
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(mutated(), RANDOM), st.sampled_from(["x.jpg", "x.png", "x.gif", "x.tif", "x.JPEG"])
)
def test_any_bytes(tmp_path, content, name):
    folder = tmp_path / "pics"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        with warnings.catch_warnings(record=True) as seen, silent_stderr(tmp_path / "stderr"):
            warnings.simplefilter("always")
            report = check_images(folder, n_workers=1, progress=False)
        assert seen == []
        assert isinstance(str(report), str)
        assert {o.problem for o in report.records} <= {*FATAL, *HARMLESS}
        if not report.fatal:  # what isn't fatal can be decoded by whoever trains
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(folder / name) as im:
                    im.convert("RGB")
    finally:
        (folder / name).unlink()


# ---- how it runs ----


def test_interrupt_is_quick(tmp_path, monkeypatch):
    "Ctrl-C doesn't wait for all the images that nobody looks at any more."
    for i in range(200):
        (tmp_path / f"{i}.jpg").write_bytes(JPEG)
    started = []

    def slow(path, max_pixels):
        started.append(path)
        time.sleep(0.2)
        return []

    def bar(results, **kwargs):
        yield next(iter(results))
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "file_problems", slow)
    monkeypatch.setattr("fastprogress.fastprogress.progress_bar", bar)
    with pytest.raises(KeyboardInterrupt):
        check_images(tmp_path, n_workers=2)
    assert len(started) < 100


def test_progress_bar(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    check_images(tmp_path)
    assert "[1/1" in capsys.readouterr().out
    check_images(tmp_path, progress=False)
    assert capsys.readouterr().out == ""


def test_import_is_light():
    code = """
import sys, sota_course.images.check
sys.exit(bool({"torch", "fastai", "fastprogress", "matplotlib"} & set(sys.modules)))
"""
    env = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_speed(tmp_path):
    """At most the processor time of decoding alone over 0.9, in as many threads; on a busy machine
    the clock says little."""
    for i in range(60):
        (tmp_path / f"{i}.jpg").write_bytes(data(photo((640, 480), i), "JPEG"))
    files = sorted(tmp_path.iterdir())

    def decode(path):
        with Image.open(path) as im:
            im.load()

    def seconds(f):
        start = time.process_time()  # of all threads
        f()
        return time.process_time() - start

    with ThreadPoolExecutor(2) as pool:

        def decoded():
            return list(pool.map(decode, files))

        def checked():
            return check_images(files, n_workers=2, progress=False)

        rounds = [seconds(decoded) / seconds(checked) for _ in range(7)]
    assert statistics.median(rounds) > 0.9, rounds


# ---- arguments of the wrong kind -----------------------------------------------------------------


@pytest.mark.parametrize(
    "what", [None, 5, float("nan"), True, b"photos", [5], [None], ["a.jpg", b"b.jpg"]]
)
def test_what_is_no_path_is_refused(what):
    with pytest.raises(TypeError, match="check_images takes"):
        check_images(what, progress=False)


@pytest.mark.parametrize("name", ["max_pixels", "n_workers"])
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), "2", True, [1]])
def test_numbers_are_checked_before_images(tmp_path, name, value):
    "Or each image would be reported as unreadable, or as too large."
    with pytest.raises(ValueError, match=f"{name} must be (a whole number, at least 1|1 or more)"):
        check_images(tmp_path, progress=False, **{name: value})


def test_quarantine_takes_a_report_and_a_folder(tmp_path):
    (tmp_path / "bad.jpg").touch()
    report = check_images(tmp_path, progress=False)
    for args in ((None, tmp_path), (str(tmp_path), tmp_path), (report, None), (report, 5)):
        with pytest.raises(TypeError, match="quarantine takes|names none"):
            quarantine(*args)
    assert (tmp_path / "bad.jpg").exists()
