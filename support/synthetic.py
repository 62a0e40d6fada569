"""Synthetic documents: mathematics, programs from the task grammar, programs by an LLM teacher."""

import contextlib
import random
import re
from pathlib import Path

from support.files import InputError
from support.llm_client import ask_all, user
from support.sandbox import Sandbox, SandboxError
from support.tasks import training_tasks

FILES = 512                 # of a synthetic source; not published; ours
PROBLEMS_IN_FILE = 12       # likewise
PEOPLE = "Ada Ben Chen Dana Emil Fatima Grace Hugo Ines Jun Kofi Lena Mira Noah Olga Priya".split()
THINGS = "apples books coins eggs flowers marbles pencils shells stamps tickets".split()


def worked_problems(number):
    """Word problems with worked answers, in the form in which evaluate.py asks GSM8K's."""
    draw = random.Random(number)
    return "\n\n".join(worked_problem(draw) for _ in range(PROBLEMS_IN_FILE)) + "\n"


def worked_problem(draw):
    """One problem: what somebody has goes through some steps, each an equation that holds."""
    who, friend = draw.sample(PEOPLE, 2)
    what, have = draw.choice(THINGS), draw.randrange(3, 60)
    story, work = [f"{who} has {have} {what}."], []
    for _ in range(draw.randrange(1, 5)):
        n, step = draw.randrange(2, 30), draw.randrange(6)
        if step == 0:
            story.append(f"{friend} gives {who} {n} more.")
            equation, new = f"{have} + {n}", have + n
        elif step == 1 and n < have:
            story.append(f"{who} loses {n} of them.")
            equation, new = f"{have} - {n}", have - n
        elif step == 2 and have * (n := n % 4 + 2) < 5000:
            story.append(f"Then {who} finds a box, and now has {n} times as many.")
            equation, new = f"{have} * {n}", have * n
        elif step == 3 and (divisors := [d for d in range(2, 10) if have % d == 0 and have > d]):
            n = draw.choice(divisors)
            story.append(f"{who} shares them equally among {n} people and keeps one share.")
            equation, new = f"{have} / {n}", have // n
        elif step == 4 and have % 4 == 0:
            story.append(f"{who} sells a quarter of them.")
            equation, new = f"{have} * 3 / 4", have * 3 // 4
        else:
            bags, size = n % 5 + 2, draw.randrange(2, 12)
            story.append(f"{who} buys {bags} bags with {size} {what} each.")
            equation, new = f"{have} + {bags} * {size}", have + bags * size
        work.append(f"Now {who} has {equation} = {new} {what}.")
        have = new
    return (f"Question: {' '.join(story)} How many {what} does {who} have?\n"
            "Let's think step by step\n" + "\n".join(work) + f"\nThe answer is {have}.")


def grammar_programs():
    """FILES programs from the task grammar, each with its tests. None is of a held-out split."""
    return [f"{task['prompt']}{task['canonical_solution']}\n\n{task['test']}\n\n"
            f"check({task['entry_point']})\n" for task in training_tasks(0, FILES)]


TEACHER_PROGRAM = (             # the report does not publish its prompts; ours
    "Here is a piece of a program:\n\n{snippet}\n\nWrite a short, self-contained Python program "
    "that has to do with it. It reads nothing, uses the standard library alone, and prints some "
    "results. Answer with the program in a ```python block, and then exactly what it prints in a "
    "```text block.")


def teacher_programs(url, files):
    """Yield FILES programs by a teacher, each inspired by a piece of one of the files, and why one
    is dropped, else None: it must print in the sandbox what the teacher said (in the report, an
    executor checks the synthetic code)."""
    conversations = []
    for number in range(FILES):
        rng = random.Random(f"snippet {number}")
        lines = Path(rng.choice(files)).read_text(errors="replace").split("\n")
        start = rng.randrange(max(1, len(lines) - 40))
        snippet = "\n".join(lines[start:start + 40])[:3000]
        conversations.append(user(TEACHER_PROGRAM.format(snippet=snippet)))
    try:
        sandbox = Sandbox()
    except SandboxError as error:
        raise InputError(f"--teacher runs programs: {str(error).partition(';')[0]}") from None
    with contextlib.closing(sandbox):
        for answer in ask_all(url, conversations, temperature=0.7):
            blocks = re.findall(r"^```\w*\n(.*?)^```", answer, re.DOTALL | re.MULTILINE)
            if len(blocks) != 2:
                yield answer, "program without a result"
            elif sandbox.run(blocks[0]) != (blocks[1], "ok"):
                yield blocks[0], "program prints something else"
            else:
                yield blocks[0], None


TEACHER_SCORE = ("How well does this document explain its code to a reader who wants to learn "
                 "programming? Answer with one number from 0 (not at all, or no code) to 5.\n\n")


def teacher_scores(url, texts):
    """Quality scores from 0 to 5 by a teacher who sees the first 4,000 characters: the last such
    number in its answer; 0 if there is none."""
    scores = []
    for answer in ask_all(url, [user(TEACHER_SCORE + text[:4000]) for text in texts],
                          temperature=0):
        answer = re.sub(r"(?s)<think>.*</think>|(/|out of) ?5\b", "", answer)
        numbers = re.findall(r"(?<![\d.])[0-5](?:\.\d+)?(?![\d.]*\d)", answer)
        scores.append(float(numbers[-1]) if numbers else 0.0)
    return scores
