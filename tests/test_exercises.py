"What a learner's function is told when it fails: its own line, and whether it returns something."

import json
import re
import statistics

import pytest
import torch
import torch.nn.functional as F

from sota_course.course.exercises import WrongAnswer, call_answer, check, exercises, questions
from sota_course.label_smoothing import smooth_targets

from links import ROOT, source


def by_torch(x):
    y = x + 1
    return F.cross_entropy(y, y[:1, 0])  # the learner's line


def by_python(x):
    return statistics.mean([])  # the learner's line


def by_the_course(x):
    return smooth_targets([7], 3)  # the learner's line


def helper(x):
    return x.nope  # the learner's line


def by_a_helper(x):
    return helper(x)


@pytest.mark.parametrize(
    "f, error",
    [
        (by_torch, "RuntimeError|ValueError|IndexError"),
        (by_python, "StatisticsError"),
        (by_the_course, "ValueError: class 7"),
        (by_a_helper, "AttributeError"),
    ],
)
def test_the_learners_own_line_is_shown(f, error):
    with pytest.raises(WrongAnswer, match=f"your code raised ({error})") as e:
        call_answer(f, torch.zeros(2, 3))
    assert "the learner's line" in e.value.hint
    name = "helper" if f is by_a_helper else f.__name__
    assert f"in {name}:" in e.value.hint


def test_a_function_of_a_library_has_a_line_of_its_own():
    with pytest.raises(WrongAnswer) as e:
        call_answer(F.cross_entropy, torch.zeros(2, 3), torch.zeros(5).long())
    assert "it happened in cross_entropy" in e.value.hint
    with pytest.raises(WrongAnswer) as e:
        call_answer(len, 3)
    assert e.value.hint == "" and "TypeError" in e.value.mistake


@pytest.mark.parametrize("name", ["mixup.2", "mixup.4", "label_smoothing.2", "label_smoothing.3"])
def test_a_function_that_returns_nothing(name):
    verdict = check(name, lambda *args: None)
    assert not verdict
    assert verdict.mistake == "your function returns nothing"
    assert "return" in verdict.hint


@pytest.mark.parametrize("name", [None, 5, [], "", ".", "..", "tta.1", "a b", "nosuch"])
def test_what_is_no_chapter_is_refused(name):
    with pytest.raises(ValueError, match="there is no chapter"):
        exercises(name)


@pytest.mark.parametrize("qa", [None, 5, "ab", ["a"], {1, 2}])
def test_questions_are_a_dict(qa):
    with pytest.raises(TypeError, match="a dict with their answers"):
        questions(qa)


def in_code(pattern, *paths):
    "What `pattern` finds in the code cells of notebooks below nbs, sorted."
    cells = [o for p in paths for o in json.loads(p.read_text(encoding="utf-8"))["cells"]]
    code = "\n".join(source(o) for o in cells if o["cell_type"] == "code")
    return sorted(re.findall(pattern, code, re.M))


def test_each_exercise_is_asked_once_and_has_a_checker_and_an_answer():
    answers = ROOT / "nbs/course/answers.ipynb"
    checkers = in_code(r'^@exercise\("(\S+)"\)', answers)
    assert in_code(r'^check\("(\S+)", ', *(ROOT / "nbs").glob("[0-9]*.ipynb")) == checkers
    assert sorted(set(in_code(r'^assert check\(\s*"(\S+)"', answers))) == checkers
