"Formulas as MathML, which browsers show by themselves, made by docutils."
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError


def formula(tex: str, node, as_block: bool) -> str:
    try: return tex2mathml(tex, as_block=as_block)
    except MathError as e: raise ExtensionError(f"{node.document['source']}: can't show the formula {tex!r}: {e}") from e


def inline(self, node):
    self.body.append(formula(node.astext(), node, False))
    raise self.skip


def block(self, node):
    self.body.append(f'<div class="math">{formula(node.astext(), node, True)}</div>\n')
    raise self.skip


def setup(app):
    from docutils.nodes import SkipNode
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
