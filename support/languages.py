"""The report's 92 programming languages, recognized by the names of files."""

import re

# The report's 92, with the endings (or whole names) of their files
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
    """The language of a file by its name, else by its first line (#!); None: not of the 92."""
    name = path.rsplit("/", 1)[-1]
    ending = name.rpartition(".")[2]
    for key in (name, ending, ending.lower()):
        if key in LANGUAGE_OF:
            return LANGUAGE_OF[key]
    if match := re.match(rb"#!.*?/(?:env\s+)?([A-Za-z]+)[\d.]*\s", (data or b"")[:200]):
        return INTERPRETERS.get(match[1].decode())
    return None
