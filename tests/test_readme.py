"README.md is the front page, nbs/index.ipynb, with links that work anywhere; results/ has its own."

import re

import nbformat
import pytest
from PIL import Image

import notebooks
import readme
import results
from links import ROOT, address


def test_readme_is_made_from_the_front_page():
    committed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert committed == readme.readme(), "run `python scripts/readme.py`"


def test_tables_of_the_front_page_are_up_to_date():
    "Chapters and results come and go; the committed tables show those that are there."
    path = ROOT / "nbs/index.ipynb"
    now, _ = notebooks.execute(path)

    def tables(nb):
        outputs = [o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])]
        return [o["text/markdown"] for o in outputs if "text/markdown" in o]

    then = tables(nbformat.read(path, as_version=4))
    save = "python scripts/notebooks.py run --save nbs/index.ipynb"
    assert then == tables(now), f"run `{save}` and `python scripts/readme.py`"
    assert len(then) == 3, "chapters, the recipe's line, results"


def test_the_front_page_has_a_row_for_each_technique():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Results\n")[2]
    rows = re.findall(r"^\| \[.*$", text.partition("\n## ")[0], re.M)
    assert len(rows) == 5
    for row in rows:
        assert len(re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", row)) == 2, row
        (command,) = re.findall(r"`python (bench/\w+\.py) .*`", row)
        assert (ROOT / command).exists()


def test_tables_of_the_results_are_up_to_date():
    committed = (ROOT / "results/README.md").read_text(encoding="utf-8")
    assert committed == results.readme(ROOT / "results"), "run `python scripts/results.py`"


def test_a_new_result_appears_in_the_tables(tmp_path):
    (tmp_path / "map").mkdir()
    (tmp_path / "README.md").write_text("# Kept\n\n## All runs\n\nold", encoding="utf-8")
    first = next((ROOT / "results/map").glob("*-plain-seed0.json"))
    (tmp_path / "map" / first.name).write_bytes(first.read_bytes())
    made = results.readme(tmp_path)
    name = first.name.removesuffix("-seed0.json")
    assert made.startswith("# Kept\n\n## All runs\n\nMeans") and "old" not in made
    (row,) = re.findall(rf"^\| {name} \|.*\| 1 \| .*$", made, re.M)
    assert "±" not in row


def test_links_of_the_readme_are_full_and_lead_to_files_that_exist():
    targets = re.findall(r"\]\(([^)]*)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert not [o for o in targets if not o.startswith("https://")]
    below = address().blob("")
    ours = [o.removeprefix(below) for o in targets if o.startswith(below)]
    assert not [o for o in ours if not (ROOT / o).exists()]


def test_the_first_use_runs(tmp_path, monkeypatch):
    "As it stands there, but for fewer images, smaller ones, and a single epoch."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert len(code.splitlines()) <= 8
    quick = {
        '"drawn"': '"drawn", n_train=64, n_val=32',
        "dls(64, 64,": "dls(32, 32,",
        "cycle(5,": "cycle(1,",
    }
    for old, new in quick.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("photo.jpg")
    names = {}
    exec(code, names)
    assert names["probs"].shape == (32, 10) and len(names["targets"]) == 32


@pytest.fixture
def notebook(tmp_path):
    def make(*cells):
        nb = nbformat.v4.new_notebook()
        for kind, source, *outputs in cells:
            if kind == "code":
                nb.cells.append(nbformat.v4.new_code_cell(source, outputs=outputs))
            else:
                nb.cells.append(nbformat.v4.new_markdown_cell(source))
        nbformat.write(nb, tmp_path / "x.ipynb")
        return readme.markdown(tmp_path / "x.ipynb", str.upper, readme.words)

    return make


def output(**data):
    return nbformat.v4.new_output("execute_result", {f"text/{k}": v for k, v in data.items()})


@pytest.mark.parametrize("directive", ["hide", "include: false", "default_exp x"])
def test_hidden_cells_stay_hidden(notebook, directive):
    hidden = ("code", f"#| {directive}\nsecret = 1", output(plain="1"))
    assert notebook(hidden, ("markdown", "seen")) == "SEEN\n"


def fenced(*blocks):
    "Blocks of code in fences: a block's first line is its language."
    return "\n\n".join(f"```{o}\n```" for o in blocks)


def test_code_or_outputs_can_be_hidden(notebook):
    made = notebook(
        ("code", "#| echo: false\nsecret = 1", output(plain="1")),
        ("code", "#| output: false\nshown = 2", output(plain="2")),
        ("code", "#| export\nkept = 3"),
        ("code", "a = 1\nb = 2 #| hide_line"),
    )
    assert made == fenced("\n1", "python\nshown = 2", "python\nkept = 3", "python\na = 1") + "\n"


def test_outputs_are_kept_as_markdown_tables_words_or_text(notebook):
    image = '<img alt="a curve" src="data:image/png;base64,AA==">'
    made = notebook(
        ("code", "x", output(markdown="| a |", plain="<object>")),
        ("code", "y", output(html=image, plain="<HTML>")),
        ("code", "z", output(html="<b>1</b>", plain="1")),
    )
    x, y, z = (f"```python\n{o}\n```\n\n" for o in "xyz")
    assert made == f"{x}| A |\n\n{y}*A CURVE*\n\n{z}```\n1\n```\n"


def test_what_training_prints_becomes_a_table(notebook):
    head = "<style>x</style><table><thead><tr><th>epoch</th><th>loss</th></tr></thead>"
    fit = head + "<tr><td>0</td><td>2 &lt; 3</td></tr></table>"
    words = "<IPython.core.display.HTML object>"
    made = notebook(
        ("code", "#| echo: false\nx", output(html=fit, plain=words)),
        ("code", "#| echo: false\ny", output(html="<progress></progress>", plain=words)),
    )
    assert made == "| EPOCH | LOSS |\n| --- | --- |\n| 0 | 2 < 3 |\n"


def test_a_fence_is_longer_than_any_inside():
    assert readme.fence("a\n```\nb") == "````\na\n```\nb\n````"
