"""Which files of a repository use which, and an order in which each comes after those it uses.

After DeepSeek-Coder (arXiv 2401.14196, section 2.2), for ten languages instead of five.
"""

import ast
import heapq
import os
import re
import warnings
from collections import defaultdict

# What names another file, by language; Python's imports come from its syntax tree
C_INCLUDE, JVM_IMPORT = r'#\s*include\s*"([^"]+)"', r"^\s*import\s+(?:static\s+)?([\w.]+)"
JS_IMPORT = r"""(?:from|import|require\()\s*["'](\.[^"']+)["']"""
IMPORTS = {"c": C_INCLUDE, "c++": C_INCLUDE, "cuda": C_INCLUDE, "java": JVM_IMPORT,
           "kotlin": JVM_IMPORT, "scala": JVM_IMPORT, "javascript": JS_IMPORT,
           "typescript": JS_IMPORT, "vue": JS_IMPORT,
           "go": r'^\s*(?:import\s+)?(?:\w+\s+)?"([\w.-]+(?:/[\w.-]+)+)"\s*$',
           "rust": r"^\s*(?:pub(?:\([^)]*\))?\s+)?(?:mod|use)\s+((?:\w+::)*\w+)"}


def imported(document):
    """What a document imports, as names with slashes; ./ and ../ are relative to its folder."""
    text, language = document["text"], document["language"]
    if language == "python":
        return python_imports(text)
    names = re.findall(IMPORTS[language], text, re.MULTILINE) if language in IMPORTS else []
    if language in ("java", "kotlin", "scala"):
        names = [name.replace(".", "/") for name in names]
    return [re.sub(r"^(crate|self|super)/", "", name.replace("::", "/")) for name in names]


def python_imports(text):
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name.replace(".", "/") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "./" if node.level == 1 else "../" * (node.level - 1)
            module = start + (node.module or "").replace(".", "/")
            names += [f"{module}/{alias.name}".replace("//", "/") for alias in node.names]
    return names


def dependencies(documents):
    """For each document of a repository, the indices of those that it needs.

    A name fits a file whose path, without its ending, ends with it; so does the name without its
    last part, which may be something in the file. In Go a name is that of a folder.
    """
    paths, by_last = [], defaultdict(list)
    for i, document in enumerate(documents):
        path = os.path.dirname(document["path"]) if document["language"] == "go" else (
            re.sub(r"(/__init__|/mod|/index)?\.[^./]+$", "", document["path"]))
        paths.append("/" + path)
        by_last[path.rsplit("/", 1)[-1]].append(i)

    def fitting(name, i):
        folder, relative = os.path.dirname(documents[i]["path"]), name.startswith(".")
        name = re.sub(r"\.(h|hh|hpp|hxx|cuh|[cm]?js|jsx|tsx?|vue)$", "", name)
        parts = os.path.normpath(os.path.join(folder, name) if relative else name).split("/")
        if documents[i]["language"] == "go":
            parts = ["", *parts[-1:]]                           # before it stand host and project
        for own in (parts, parts[:-1]):
            end = "/" + "/".join(own).lstrip("/")
            found = {j for j in by_last[own[-1] if own else ""] if j != i and (
                paths[j] == end or not relative and paths[j].endswith(end))}
            if found:
                return found
        return set()

    return [set().union(*(fitting(name, i) for name in imported(document)))
            for i, document in enumerate(documents)]


def dependency_order(documents):
    """The documents of a repository, each after those that it needs: again and again the one that
    lacks fewest, so that circles do not stall. Equal ones come in the order of their paths."""
    needed = dependencies(documents)
    users = defaultdict(set)
    for i, own in enumerate(needed):
        for j in own:
            users[j].add(i)
    queue, order = [(len(own), documents[i]["path"], i) for i, own in enumerate(needed)], []
    heapq.heapify(queue)
    placed = set()
    while queue:
        missing, path, i = heapq.heappop(queue)
        if i in placed or missing != len(needed[i] - placed):   # out of date: there is a newer one
            continue
        placed.add(i)
        order.append(documents[i])
        for user in users[i] - placed:
            heapq.heappush(queue, (len(needed[user] - placed), documents[user]["path"], user))
    return order
