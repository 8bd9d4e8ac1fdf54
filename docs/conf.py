import re
from importlib.metadata import version as installed

project = "ncmethods"
author = "the ncmethods contributors"
copyright = "2026, the ncmethods contributors"
release = version = installed("ncmethods")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ncmethods {release}"
html_show_sphinx = False

# Markdown: links to headings, tables with captions; formulas are plain text, so that a page reads
# the same on a terminal, in a repository and offline.
myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "imported-members": True}
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# -n asks for every reference; those to other projects have no inventory offline.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|numpy|np|pathlib|collections|typing|matplotlib|wandb|dist|os)\b.*"),
    (r"py:.*", r"(Tensor|dtype|device|Generator|Module|Path|PathLike|Figure|Callable|Mapping)"),
    (r"py:.*", r"(Sequence|Iterable|Iterator|NDArray|Any|Optimizer|ProcessGroup|optional)"),
    (r"py:class", r"ncmethods\.ood\._scorer\.S"),  # a type variable
    (r"py:class", r"(HeadLike|Images|Indices|Rows?|dict\[str|ncmethods\._core\.Found)"),
]


def _plain_letters(app, what, name, obj, options, lines):
    """``num_classes: K.`` is a sentence, not item K of a list."""
    lines[:] = [re.sub(r": ([A-Z])\.$", r": \1", line) for line in lines]


def _without_aliases(app, what, name, obj, skip, options):
    """The fields of a NamedTuple stand in its signature."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", _without_aliases)
    app.connect("autodoc-process-docstring", _plain_letters, priority=100)  # before napoleon
