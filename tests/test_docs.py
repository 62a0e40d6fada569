"""README.md and docs/: links lead somewhere, commands and examples are valid."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LESSONS = ["tokenizer", "kernels", "model", "fim", "evaluate", "data", "pretrain", "sft", "dpo"]
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


class ParsedError(Exception):
    """The arguments of a command are valid; it must not go on."""


def blocks(page, language):
    return [match[3] for match in FENCE.finditer(page.read_text()) if match[2] == language]


def commands(page):
    """The commands of a page that run a lesson, each a list of words from the script on."""
    found = []
    inline = re.findall(r"`((?:python|torchrun) [^`]+)`", FENCE.sub("", page.read_text()))
    for block in blocks(page, "bash") + [code.replace("\n", " ") for code in inline]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            ends = [i for i, word in enumerate(words) if word == "&&"] + [len(words)]
            begin = 0
            for end in ends:
                command, begin = words[begin:end], end + 1
                scripts = [i for i, word in enumerate(command) if word.endswith(".py")]
                if scripts and command[scripts[0]][:-3] in LESSONS:
                    found.append(command[scripts[0]:])
    return found


def anchors(page):
    """The names that headings get in links: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page, monkeypatch):
    """Each script accepts the arguments of each command; it is stopped before it does anything."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, flags=None, namespace=None):
        parse(parser, flags, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for command in commands(page):
        name = command[0].removesuffix(".py")
        if name == "kernels":               # a launcher of tests/bench_kernels.py, for a GPU
            assert command[1:] in ([], ["bench"], ["tiles"])
            continue
        if command[:2] == ["fim.py", "show"]:
            assert (ROOT / command[2]).exists() or command[2] == "FILE"
            continue
        monkeypatch.setattr(sys, "argv", command)
        try:
            with pytest.raises(ParsedError):
                importlib.import_module(name).main()
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(command)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_compile(page):
    for block in blocks(page, "python"):
        compile(textwrap.dedent(block), page.name, "exec")


def test_readme():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 350
    assert len(commands(ROOT / "README.md")) > 25
    for name in LESSONS:
        listed = int(re.search(rf"^\| \[{name}.py\].*\| (\d+) \| [^|]*\|$", text, re.MULTILINE)[1])
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        assert abs(lines - listed) <= 20, f"{name}.py has {lines} lines, README says {listed}"


@pytest.mark.skipif("MINICODER_WEIGHTS" not in os.environ,
                    reason="MINICODER_WEIGHTS does not name a checkpoint folder")
def test_first_example():
    """The command at the top of the README prints what the README shows."""
    readme = ROOT / "README.md"
    command = shlex.split(blocks(readme, "bash")[0])
    command[command.index("--model") + 1] = os.environ["MINICODER_WEIGHTS"]
    output = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout
    assert blocks(readme, "text")[0].strip() in output
