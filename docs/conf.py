"""How Sphinx makes the site; from the root of the project, `sphinx-build -W -n -c docs . build/site`.

The root of the project is the folder of the sources, so that links between docs/, README.md and CONTRIBUTING.md are the
same on the site and beside the code.
"""

from qsparseprop import __version__

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
html_extra_path = ["_static/index.html"]  # at the root of the site: leads to docs/index.html
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
