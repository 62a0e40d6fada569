"""What data.py can tell from a text: its language, its words, where its prose is, and what kind of
text it is (a classifier).
"""

import ast
import functools
import hashlib
import json
import re
import warnings

import numpy as np
import torch

from support.functions import nodes_of

# The report's 92 languages, with the endings (or whole names) of their files
LANGUAGES = """
ada adb ads; agda agda; alloy als; antlr g4; applescript applescript scpt; assembly asm s S nasm;
augeas aug; awk awk; batchfile bat cmd; bluespec bsv; c c h; c# cs csx; c++ cc cpp cxx hpp hh hxx;
clojure clj cljs cljc; cmake cmake CMakeLists.txt; coffeescript coffee; common-lisp lisp lsp cl;
css css; cuda cu cuh; dart dart; dockerfile dockerfile Dockerfile; elixir ex exs; elm elm;
emacs-lisp el; erlang erl hrl; f# fs fsi fsx; fortran f f90 f95 f03 f08 for; glsl glsl vert frag;
go go; groovy groovy gradle; haskell hs; html html htm xhtml; idris idr; isabelle thy; java java;
java-server-pages jsp; javascript js jsx mjs cjs; json json; julia jl; jupyter-notebook ipynb;
kotlin kt kts; lean lean; literate-agda lagda; literate-coffeescript litcoffee;
literate-haskell lhs; lua lua; makefile mk mak Makefile makefile GNUmakefile; maple mpl;
markdown md markdown; mathematica nb wl; matlab m; objectc++ mm; ocaml ml mli; pascal pas pp;
perl pl pm; php php; powershell ps1 psm1; prolog pro; protocol-buffer proto; python py pyi pyw;
r r R; racket rkt; restructuredtext rst; rmarkdown rmd Rmd; ruby rb rake Rakefile Gemfile; rust rs;
sas sas; scala scala sc; scheme scm ss; shell sh bash zsh ksh; smalltalk st; solidity sol;
sparql rq sparql; sql sql; stan stan; standard-ml sml sig; stata do ado; swift swift;
systemverilog sv svh; tcl tcl; tcsh tcsh csh; tex tex sty cls; thrift thrift; typescript ts tsx;
verilog v vh; vhdl vhd vhdl; visual-basic vb bas vbs; vue vue; xslt xsl xslt; yacc y yy;
yaml yaml yml; zig zig
"""
LANGUAGE_OF = {ending: name for line in LANGUAGES.split(";")
               for name, *endings in [line.split()] for ending in endings}
INTERPRETERS = {"python": "python", "bash": "shell", "sh": "shell", "zsh": "shell", "node":
                "javascript", "perl": "perl", "ruby": "ruby", "lua": "lua", "awk": "awk", "tclsh":
                "tcl", "Rscript": "r", "php": "php", "tcsh": "tcsh", "csh": "tcsh"}


def language_of(path, data=None):
    """The language of a file by its name, else by its first line (#!), else None."""
    name = path.rsplit("/", 1)[-1]
    ending = name.rpartition(".")[2]
    for key in (name, ending, ending.lower()):
        if key in LANGUAGE_OF:
            return LANGUAGE_OF[key]
    interpreter = re.match(rb"#!.*?/(?:env\s+)?([A-Za-z]+)[\d.]*\s", (data or b"")[:200])
    return INTERPRETERS.get(interpreter[1].decode()) if interpreter else None


# ------------------------------------------------------------------------------------------------
# Words


def words_in(text):
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


@functools.lru_cache(maxsize=1 << 18)
def word_hash(word):
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def ngram_hashes(words, n):
    """A 64-bit hash of every n consecutive words, in order: a polynomial of the words' hashes."""
    hashes = np.fromiter(map(word_hash, words), np.uint64, len(words))
    count = max(0, len(words) - n + 1)
    ngrams = np.zeros(count, np.uint64)
    for i in range(n):
        ngrams = ngrams * np.uint64(0x9E3779B97F4A7C15) + hashes[i:i + count]      # modulo 2^64
    return ngrams


# ------------------------------------------------------------------------------------------------
# Python, notebooks, and the prose in documentation


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


def syntax_error(text):
    """Why a Python file does not parse, or None."""
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return str(error)


def docstrings(text):
    """The docstrings of a Python file that are longer than 60 characters."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = nodes_of(text)
    if not nodes:                                           # it does not parse
        return ""
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
    return "\n\n".join(text for text in texts if text and len(text) > 60) + "\n"


def prose_and_code(text):
    """Split a text into prose and code. Code is fenced, indented after ::, or a >>> example."""
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


# ------------------------------------------------------------------------------------------------
# A classifier like fastText's (arXiv 1607.01759)


class Classifier(torch.nn.Module):
    """The mean of the embeddings of a text's words and word pairs, then one linear layer."""

    def __init__(self, names, buckets=1 << 18, size=16):
        super().__init__()
        self.names, self.buckets = list(names), buckets
        self.embedding = torch.nn.EmbeddingBag(buckets, size, mode="mean")
        self.linear = torch.nn.Linear(size, len(self.names))
        with torch.no_grad():
            values = np.random.default_rng(0).uniform(-1 / size, 1 / size, (buckets, size))
            self.embedding.weight.copy_(torch.from_numpy(values))
            self.linear.weight.zero_()
            self.linear.bias.zero_()

    def features(self, text):
        """The words and word pairs of the first 10,000 characters, hashed to bucket numbers."""
        words = words_in(text[:10_000])
        hashes = np.concatenate([ngram_hashes(words, 1), ngram_hashes(words, 2)])
        return (hashes % np.uint64(self.buckets)).astype(np.int64)

    def forward(self, features):
        """Features of B texts -> logits (B, names)."""
        lengths = list(map(len, features))
        offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)                        # (B,)
        return self.linear(self.embedding(torch.from_numpy(np.concatenate(features)), offsets))

    def fit(self, texts, labels, epochs=6, lr=0.02, batch=32):
        """Learn from texts and the name of each -> self. The same texts give the same weights."""
        features = [self.features(text) for text in texts]
        targets = torch.tensor([self.names.index(label) for label in labels])
        optimizer = torch.optim.Adam(self.parameters(), lr)
        for epoch in range(epochs):
            order = np.random.default_rng([1, epoch]).permutation(len(texts))
            for start in range(0, len(order), batch):
                chosen = order[start:start + batch]
                loss = torch.nn.functional.cross_entropy(self([features[i] for i in chosen]),
                                                         targets[torch.from_numpy(chosen)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self

    @torch.no_grad()
    def predict(self, texts):
        """Probabilities (texts, names)."""
        parts = [self([self.features(text) for text in texts[start:start + 256]]).softmax(-1)
                 for start in range(0, len(texts), 256)]
        return torch.cat(parts).numpy()


def auc(scores, positive):
    """The probability that a positive scores higher than a negative; ties count half."""
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]       # 1 for the lowest; ties share one
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n))
