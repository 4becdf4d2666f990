"Sphinx's settings, and formulas as MathML. `python scripts/build_docs.py` makes what Sphinx reads."

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

from links import BRANCH, address

at = address()
project = "sota_course"
author = "The sota_course contributors"
project_copyright = f"{author}, Apache-2.0"
language = "en"

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the committed outputs are what the site shows
nb_ipywidgets_js = {}  # sliders need a kernel; their static picture is an output of its own
nb_merge_streams = True
nb_output_stderr = "remove"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"  # no script and no font to fetch
add_function_parentheses = False
add_module_names = False
maximum_signature_line_length = 88
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = "sota_course"
html_baseurl = at.docs
html_static_path = ["static"]
html_css_files = ["course.css"]
html_logo = html_favicon = "static/logo.svg"
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_context = dict(default_mode="auto")
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
html_theme_options = dict(
    logo=dict(text="sota_course"),
    repository_url=at.github,
    repository_branch=BRANCH,
    path_to_docs="nbs",
    use_repository_button=True,
    use_issues_button=True,
    use_download_button=False,
    navbar_persistent=[],
    footer_content_items=["copyright.html"],
    show_navbar_depth=1,
    show_toc_level=2,
    navigation_with_keys=False,
    pygments_light_style="a11y-light",
    pygments_dark_style="github-dark",
)


# --- formulas as MathML, which browsers show by themselves, made by docutils ---


def formula(translator, node, as_block: bool) -> str:
    tex = node.astext()
    try:
        return tex2mathml(tex, as_block=as_block)
    except MathError as e:
        page = translator.builder.current_docname
        raise ExtensionError(f"{page}: can't show the formula {tex!r}: {e}") from e


def inline(translator, node):
    translator.body.append(formula(translator, node, False))
    raise SkipNode


def block(translator, node):
    translator.body.append(f'<div class="math">{formula(translator, node, True)}</div>\n')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
