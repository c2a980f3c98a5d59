"""How Sphinx makes the site; from the root of the project, `sphinx-build -W -n -c docs . build/site`.

The root of the project is the folder of the sources, so that links between docs/, README.md and CONTRIBUTING.md are the
same on the site and beside the code.
"""

import importlib

from sphinx.util import logging

from qsparseprop import __version__, ops

project = "qsparseprop"
author = "the qsparseprop authors"
copyright = author
version = release = __version__

root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "qsparseprop", "tests", "benchmarks", "docs/results/*.json"]
source_suffix = {".md": "markdown"}

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinxcontrib.mermaid",
]

# Markdown as GitHub reads it: pictures in fences, anchors of headings.
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # README.md has pictures before its first section

# Docstrings give types in words; those of the signatures would repeat them.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
# `name` in a docstring is a link where the site has such a name, else just code: arguments and inner rooms have none.
default_role = "autolink"
nitpick_ignore_regex = [("py:obj", ".*")]

html_theme = "furo"
html_title = f"qsparseprop {version}"
html_copy_source = False
html_static_path = ["_style"]
html_css_files = ["tables.css"]
html_extra_path = ["_static/index.html"]  # at the root of the site: leads to docs/index.html
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"

# Operators are objects that call a function, and autodoc describes functions.
for _name in ops.__all__:
    if isinstance(getattr(ops, _name), ops.Operator):
        setattr(ops, _name, getattr(ops, _name).function)


def leave_out_fields(app, kind, name, value, skip, options):
    """Named tuples describe their fields themselves."""
    return True if (getattr(value, "__doc__", None) or "").startswith("Alias for field number") else None


def warn_of_what_is_missing(app, env):
    """What a module exports is on its page, constants excepted."""
    domain = env.get_domain("py")
    for module in domain.modules:
        exported = importlib.import_module(module)
        for name in exported.__all__:
            if callable(getattr(exported, name)) and f"{module}.{name}" not in domain.objects:
                logging.getLogger(__name__).warning("%s.%s is not described", module, name)


def setup(app):
    """Connect the two."""
    app.connect("autodoc-skip-member", leave_out_fields)
    app.connect("env-check-consistency", warn_of_what_is_missing)
