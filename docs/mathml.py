"Formulas as MathML, which browsers show by themselves, made by docutils."

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError


def formula(translator, node, as_block: bool) -> str:
    tex = node.astext()
    try:
        return tex2mathml(tex, as_block=as_block)
    except MathError as e:
        raise ExtensionError(
            f"{translator.builder.current_docname}: can't show the formula {tex!r}: {e}"
        ) from e


def inline(translator, node):
    translator.body.append(formula(translator, node, False))
    raise SkipNode


def block(translator, node):
    translator.body.append(f'<div class="math">{formula(translator, node, True)}</div>\n')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
