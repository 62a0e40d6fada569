"""The order in which the files of a repository are shown to the model: dependencies first.

After DeepSeek-Coder (arXiv 2401.14196, section 2.2), for ten languages instead of five.
"""

import ast
import os
import re
from collections import defaultdict

from support.functions import nodes_of

# How a file names another one, by language; Python's imports are read from its syntax tree
C_INCLUDE = r'#\s*include\s*"([^"]+)"'
JVM_IMPORT = r"^\s*import\s+(?:static\s+)?([\w.]+)"
JS_IMPORT = r"""(?:from|import|require\()\s*["'](\.[^"']+)["']"""
IMPORTS = {"c": C_INCLUDE, "c++": C_INCLUDE, "cuda": C_INCLUDE, "java": JVM_IMPORT,
           "kotlin": JVM_IMPORT, "scala": JVM_IMPORT, "javascript": JS_IMPORT,
           "typescript": JS_IMPORT, "vue": JS_IMPORT,
           "go": r'^\s*(?:import\s+)?(?:\w+\s+)?"([\w.-]+(?:/[\w.-]+)+)"\s*$',
           "rust": r"^\s*(?:pub(?:\([^)]*\))?\s+)?(?:mod|use)\s+((?:\w+::)*\w+)"}


def imported_names(document):
    """What a document imports, with slashes; names with ./ or ../ are relative to its folder."""
    text, language = document["text"], document["language"]
    if language == "python":
        return python_imports(text)
    names = re.findall(IMPORTS[language], text, re.MULTILINE) if language in IMPORTS else []
    if language in ("java", "kotlin", "scala"):
        names = [name.replace(".", "/") for name in names]
    return [re.sub(r"^(crate|self|super)/", "", name.replace("::", "/")) for name in names]


def python_imports(text):
    names = []
    for node in nodes_of(text):
        if isinstance(node, ast.Import):
            names += [alias.name.replace(".", "/") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "./" if node.level == 1 else "../" * (node.level - 1)
            module = start + (node.module or "").replace(".", "/")
            names += [f"{module}/{alias.name}".replace("//", "/") for alias in node.names]
    return names


def dependencies(documents):
    """For each document of a repository, the set of indices of those that it imports.

    A name refers to the files whose paths, without their endings, end with it, or else end with it
    without its last part, which may be something defined in the file. In Go a name is a folder.
    """
    paths = []
    by_last_part = defaultdict(list)
    for i, document in enumerate(documents):
        if document["language"] == "go":
            path = os.path.dirname(document["path"])
        else:
            path = re.sub(r"(/__init__|/mod|/index)?\.[^./]+$", "", document["path"])
        paths.append("/" + path)
        by_last_part[path.rsplit("/", 1)[-1]].append(i)

    def files_named(name, i):
        relative = name.startswith(".")
        name = re.sub(r"\.(h|hh|hpp|hxx|cuh|[cm]?js|jsx|tsx?|vue)$", "", name)
        if relative:
            name = os.path.join(os.path.dirname(documents[i]["path"]), name)
        parts = os.path.normpath(name).split("/")
        if documents[i]["language"] == "go":
            parts = ["", *parts[-1:]]                           # without host and project
        for end_parts in (parts, parts[:-1]):
            end = "/" + "/".join(end_parts).lstrip("/")
            last_part = end_parts[-1] if end_parts else ""
            files = {j for j in by_last_part[last_part] if j != i and (
                paths[j] == end or (not relative and paths[j].endswith(end)))}
            if files:
                return files
        return set()

    return [set().union(*(files_named(name, i) for name in imported_names(document)))
            for i, document in enumerate(documents)]


def dependency_order(documents):
    """The documents of a repository, each after those that it imports. The next one is always the
    one with the fewest missing dependencies, so that import cycles do not stall; ties are broken by
    path."""
    needed = dependencies(documents)
    users = defaultdict(list)
    for i, indices in enumerate(needed):
        for j in indices:
            users[j].append(i)
    missing = {i: len(indices) for i, indices in enumerate(needed)}     # of those not yet placed
    order = []
    while missing:
        first = min(missing, key=lambda i: (missing[i], documents[i]["path"]))
        del missing[first]
        order.append(documents[first])
        for user in users[first]:
            if user in missing:
                missing[user] -= 1
    return order
