"""docs/workshop.py: each bug is planted and found, each exercise needs its function."""

import ast
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "docs"))
import workshop  # noqa: E402


def run_tool(*flags):
    """Run the tool as the command line does -> returncode, stdout, stderr."""
    return run_script("docs/workshop.py", *flags)


def pytest_fails(folder, arguments):
    """Whether pytest, with these arguments, runs tests in the folder of which some fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *shlex.split(arguments)], cwd=folder,
                          capture_output=True).returncode == 1


@pytest.mark.parametrize("bug", workshop.BUGS, ids=range(1, len(workshop.BUGS) + 1))
def test_each_bug_changes_one_place(bug):
    text = (ROOT / bug.file).read_text()
    assert text.count(bug.before) == 1
    compile(text.replace(bug.before, bug.after), bug.file, "exec")


def test_there_are_twenty_bugs():
    assert len(workshop.BUGS) == 20


@pytest.mark.parametrize("file, function, _", workshop.EXERCISES,
                         ids=[function for _, function, _ in workshop.EXERCISES])
def test_an_exercise_removes_one_body(file, function, _):
    source = (ROOT / file).read_text()
    before = ast.parse(source)
    after = ast.parse(workshop.without_body(source, function))
    [node] = [node for node in ast.walk(after)
              if isinstance(node, ast.FunctionDef) and node.name == function]
    assert ast.unparse(node.body[-1]) == "raise NotImplementedError" and len(node.body) == 2
    others = [[ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
               and node.name != function] for tree in (before, after)]
    assert len(others[0]) >= len(others[1]) > 0         # functions inside the body are gone, too
    assert set(others[1]) <= set(others[0])


def test_a_bug_is_planted_and_revealed(tmp_path):
    copy = tmp_path / "copy"
    planted = run_tool("bug", "18", "--copy", str(copy))
    assert planted.returncode == 0 and "pass_at_k(10, 1, 1)" in planted.stdout
    assert "range(n - c, n)" in (copy / "evaluate.py").read_text()
    # these would name the bug: in the copy they fail for its number
    assert not (copy / "docs/workshop.py").exists()
    assert not (copy / "tests/test_workshop.py").exists()
    assert "range(n - c + 1, n + 1)" in (ROOT / "evaluate.py").read_text()
    revealed = run_tool("reveal", str(copy)).stdout
    assert "-    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))" in revealed
    assert "+    return 1.0 - math.prod(1 - k / i for i in range(n - c, n))" in revealed
    assert "off by one" in revealed and "test_evaluate.py -k pass_at_k" in revealed


def test_an_exercise_is_made(tmp_path):
    copy = tmp_path / "copy"
    made = run_tool("exercise", "fim.py", "fim_ids", "--copy", str(copy))
    assert made.returncode == 0 and "pytest -q tests/test_fim.py -k format" in made.stdout
    assert (copy / "fim.py").read_text().count("raise NotImplementedError") == 1
    assert "raise NotImplementedError" not in (ROOT / "fim.py").read_text()
    assert len(run_tool("list").stdout.splitlines()) == len(workshop.EXERCISES)


def test_bad_input(tmp_path):
    (tmp_path / "file").write_text("mine")
    for flags, message in [(["bug", "--copy", str(tmp_path)], "exists; give a new folder"),
                           (["bug", "--copy", str(ROOT / "copy")], "is inside the project"),
                           (["bug", "0", "--copy", str(tmp_path / "new")], "there are 1 to 20"),
                           (["bug", "21", "--copy", str(tmp_path / "new")], "there are 1 to 20"),
                           (["reveal", str(tmp_path)], "no copy made by"),
                           (["exercise", "fim.py", "main", "--copy", str(tmp_path / "new")],
                            "not an exercise")]:
        result = run_tool(*flags)
        assert result.returncode == 2 and message in result.stderr, flags
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(workshop.BUGS) + 1))
def test_each_bug_is_found(number, tmp_path):
    copy = workshop.copy_project(tmp_path / "copy")
    bug = workshop.BUGS[number - 1]
    assert not pytest_fails(copy, bug.test)
    workshop.plant(number, copy)
    assert pytest_fails(copy, bug.test)


@pytest.mark.slow
@pytest.mark.parametrize("file, function, tests", workshop.EXERCISES,
                         ids=[function for _, function, _ in workshop.EXERCISES])
def test_each_exercise_needs_its_function(file, function, tests, tmp_path):
    copy = workshop.copy_project(tmp_path / "copy")
    path = copy / file
    path.write_text(workshop.without_body(path.read_text(), function))
    assert pytest_fails(copy, tests)
