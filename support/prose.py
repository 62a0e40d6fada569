"""Prose and code in documentation, docstrings and notebooks."""

import ast
import json
import re
import warnings


def notebook_script(text):
    """A Jupyter notebook as a script: code cells, and Markdown as comments."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            source = re.sub(r"^", "# ", source, flags=re.MULTILINE)
        if source and cell["cell_type"] in ("markdown", "code"):
            parts.append(source)
    return "\n\n".join(parts) + "\n"


def docstrings(text):
    """The docstrings of a Python file that are long enough to say something."""
    types = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, types)]
    return "\n\n".join(text for text in texts if text and len(text) > 60) + "\n"


def prose_and_code(text):
    """Split a text into prose and code: what is fenced, literal after ::, or a >>> example."""
    prose, code = [], []
    fenced = example = False
    literal = None                              # the indentation of the line that ends with ::
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        blank = not line.strip()
        indentation = len(line) - len(line.lstrip())
        example = not blank and (example or line.lstrip().startswith(">>>"))
        if literal is not None and not blank and indentation <= literal:
            literal = None
        is_code = fenced or (not blank and (example or literal is not None))
        (code if is_code else prose).append(line)
        if not fenced and literal is None and line.rstrip().endswith("::"):
            literal = indentation
    return re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip() + "\n", "\n".join(code)
