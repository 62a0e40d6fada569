r"""The answer in the text that a model wrote: a program, a line, or a number.

    code_block("Sure:\n```python\ndef f(): ...\n```\nDone.")    ->  "def f(): ...\n"
    final_number("18 - 3 = 15. The answer is \boxed{15}.")       ->  15.0
    first_line("\n  x = 1\ny")                                   ->  "x = 1"
"""

import ast
import builtins
import itertools
import math
import re
from collections import namedtuple

from support.functions import nodes_of, parse

# A line that opens or closes a code block: margin (in a list or a quotation), marks, language etc.
FENCE = re.compile(r"((?:[ \t>]|[-*+][ \t]|\d+[.)][ \t])*)(`{3,}|~{3,})[ \t]*([^`\n]*)\n?")
PYTHON = re.compile(r"(?:i?python|py)[\d.]*|.*\.pyw?", re.IGNORECASE)       # solution.py, too
MAX_PARSES = 50             # in search of the ends of the code blocks of one answer
MAX_ENDS = 20               # fences that are tried as the end of one block
Block = namedtuple("Block", "language code closed")

# ------------------------------------------------------------------------------------------------
# Programs


def fenced_blocks(text):
    """The code blocks of a Markdown text, in order.

    As in CommonMark, a block ends at a fence of the same character, at least as long, with nothing
    after it. But if the text up to another fence is valid Python, it ends there: fences in between
    are in a docstring, and the answer may have opened the next block without closing this one.
    """
    text = text.replace("\r\n", "\n")
    text = re.sub(r"^([^`\n]*[^`\s])(`{3,}[ \t]*)$", r"\1\n\2", text, flags=re.M)   # return x```
    lines = re.findall(r".*\n|.+", text)
    fences = [FENCE.fullmatch(line) for line in lines]
    parses = 0
    blocks = []
    start = 0
    while start < len(lines):
        fence = fences[start]
        start += 1
        if not fence:
            continue
        margin, marks, info = fence.groups()
        language = re.search(r"[\w+#/-][\w.+#/-]*|$", info)[0]
        if language.lower() in ("markdown", "md"):          # around the whole answer: look inside
            continue
        ends = (i for i in range(start, len(lines)) if fences[i] and fences[i][2].startswith(marks))
        ends = [*itertools.islice(ends, MAX_ENDS), len(lines)]
        end = next(i for i in ends if i == len(lines) or not fences[i][3].strip())
        for candidate in ends:
            if parses == MAX_PARSES:
                break
            parses += 1
            if parse(without_margin(lines[start:candidate], margin)):
                end = candidate
                break
        closed = end < len(lines)
        blocks.append(Block(language, without_margin(lines[start:end], margin), closed))
        start = end
        if closed and not fences[end][3].strip():           # else the next block starts there
            start += 1
    return [block for block in blocks if block.code.strip()]


def without_margin(lines, margin):
    """The text of some lines, each without its margin, which may be shorter than that of others."""
    margin_start = re.compile(rf"[ \t>]{{0,{len(margin)}}}")
    return "".join(line[margin_start.match(line).end():] for line in lines)


def is_python(block):
    """Whether a block is labelled as Python or, without a label, is Python that does something: a
    value alone may be the output of a program."""
    if block.language:
        return bool(PYTHON.fullmatch(block.language))
    statements = [node for node in nodes_of(block.code) if isinstance(node, (ast.stmt, ast.Call))]
    return any(not isinstance(node, ast.Expr) for node in statements)


def names_of(code):
    """The names that a Python text binds, and those that it reads; none if it does not parse."""
    bound, read = set(), set()
    for node in nodes_of(code):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return bound, read


def code_block(text, entry_point=None):
    """The program in a chat answer: the last code block that defines the entry point.

    Without an entry point, the last that defines any function or class. Blocks that parse and are
    closed, and blocks of Python, are preferred to others. Earlier blocks that define names which
    the block lacks, such as imports, are put in front of it. The answer may begin inside a block;
    if it has no block, it is a program as a whole.
    """
    definition = r"^(?:async def|def|class) \w"
    if entry_point:
        name = re.escape(entry_point)
        definition = rf"^(?:(?:async def|def|class) {name}\b|{name} *(?::.*)?=[^=])"

    def rank(block):
        defines = bool(re.search(definition, block.code, re.MULTILINE))
        runs = defines and bool(parse(block.code))
        return runs and block.closed, runs, defines, is_python(block), block.closed

    if re.search(definition, text, re.MULTILINE) and parse(text):           # no Markdown at all
        return text
    # The prompt may have opened a block already, so there are two readings of the text. Take the
    # one with the better block; if they are equally good, the second if it begins with a program.
    readings = [fenced_blocks(text), fenced_blocks("```\n" + text)]
    if readings[1] and names_of(readings[1][0].code)[0]:
        readings.reverse()
    blocks = max(readings, key=lambda reading: max(map(rank, reading), default=()))
    if not blocks:
        return text
    best = max(range(len(blocks)), key=lambda i: (rank(blocks[i]), i))      # of equals the last
    program = blocks[best].code
    bound, read = names_of(program)
    # Going backwards, a block that is put in front may itself need names of earlier ones.
    for block in reversed(blocks[:best]):
        block_bound, block_read = names_of(block.code)
        if block_bound & (read - bound - set(dir(builtins))):
            program = block.code.rstrip("\n") + "\n\n\n" + program
            bound |= block_bound
            read |= block_read
    return program


def first_line(text):
    """The line that is scored where one line was asked for (the report's HumanEval-FIM script)."""
    lines = text.split("\n")
    return lines[1 if text.startswith(("\n", " \n")) else 0].strip()


# ------------------------------------------------------------------------------------------------
# Numbers

# A comma or a space between the digits of 9,500, as text or as TeX; in India also 1,00,000
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,:;! ]|[,~\u00a0\u2009\u202f]|(?<!\d{4}) )"
                       r"(?=(?:\d\d,)*\d{3}(?!\d))")
FRACTION = re.compile(r"(-?)\\[dt]?frac *\{?(-?\d+)\}? *\{?(\d+)\}?")               # of TeX
# -7, 12.5, .5, 3/4 and 1 3/4
NUMBER = (r"(?:(?<![\w)}])-)?(?:\d+ +(?=\d+/\d))?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
          r"(?:/(?:\d*\.)?\d+)?")
# Of "18 - 3 = 15" the result is the answer: there are no words before the "="
SUM = re.compile(rf"(?:{NUMBER}(?:[^A-Za-z=}}\n.]|\.\d)*=[^A-Za-z=}}\n\d.-]*)*({NUMBER})")


def to_number(text):
    """The value of a text that matches NUMBER."""
    whole, _, fraction = text.lstrip("-").rpartition(" ")
    numerator, _, denominator = fraction.partition("/")
    value = float(whole or 0) + float(numerator) / (float(denominator or 1) or math.nan)
    return -value if text.startswith("-") else value


def final_number(text):
    r"""The number after the last \boxed or "answer is", else the last one; None without any."""
    text = THOUSANDS.sub("", text.split("\nQuestion:")[0].replace("\u2212", "-"))
    text = FRACTION.sub(r" \1\2/\3", text)
    text = re.sub(r"\\?\$|\\(?:times|cdot|div)\b", "", text)     # "-$5" is -5
    for announcement in ("\\boxed", "answer is"):
        if announcement in text:
            result = SUM.search(text.rpartition(announcement)[2])
            if result:
                return to_number(result[1])
    numbers = re.findall(NUMBER, text)
    return to_number(numbers[-1]) if numbers else None
