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
PROBLEMS_IN_FILE = 12       # not published; ours
PEOPLE = "Ada Ben Chen Dana Emil Fatima Grace Hugo Ines Jun Kofi Lena Mira Noah Olga Priya".split()
THINGS = "apples books coins eggs flowers marbles pencils shells stamps tickets".split()


def worked_problems(number):
    """Word problems with worked answers, in the form in which evaluate.py asks GSM8K's."""
    rng = random.Random(number)
    return "\n\n".join(worked_problem(rng) for _ in range(PROBLEMS_IN_FILE)) + "\n"


def worked_problem(rng):
    """One problem: a number of things changes in some steps; the answer has one equation each."""
    person, friend = rng.sample(PEOPLE, 2)
    things, count = rng.choice(THINGS), rng.randrange(3, 60)
    story, work = [f"{person} has {count} {things}."], []
    for _ in range(rng.randrange(1, 5)):
        n, step = rng.randrange(2, 30), rng.randrange(6)
        if step == 2:
            n = n % 4 + 2                                   # keeps products small
        divisors = [d for d in range(2, 10) if count % d == 0 and count > d]
        if step == 0:
            story.append(f"{friend} gives {person} {n} more.")
            equation, result = f"{count} + {n}", count + n
        elif step == 1 and n < count:
            story.append(f"{person} loses {n} of them.")
            equation, result = f"{count} - {n}", count - n
        elif step == 2 and count * n < 5000:
            story.append(f"Then {person} finds a box, and now has {n} times as many.")
            equation, result = f"{count} * {n}", count * n
        elif step == 3 and divisors:
            n = rng.choice(divisors)
            story.append(f"{person} shares them equally among {n} people and keeps one share.")
            equation, result = f"{count} / {n}", count // n
        elif step == 4 and count % 4 == 0:
            story.append(f"{person} sells a quarter of them.")
            equation, result = f"{count} * 3 / 4", count * 3 // 4
        else:                                               # also where a step does not work out
            bags, size = n % 5 + 2, rng.randrange(2, 12)
            story.append(f"{person} buys {bags} bags with {size} {things} each.")
            equation, result = f"{count} + {bags} * {size}", count + bags * size
        work.append(f"Now {person} has {equation} = {result} {things}.")
        count = result
    return (f"Question: {' '.join(story)} How many {things} does {person} have?\n"
            "Let's think step by step\n" + "\n".join(work) + f"\nThe answer is {count}.")


def grammar_programs():
    """FILES programs with their tests, from tasks of the grammar that are not held out."""
    return [f"{task['prompt']}{task['canonical_solution']}\n\n{task['test']}\n\n"
            f"check({task['entry_point']})\n" for task in training_tasks(0, FILES)]


TEACHER_PROGRAM = (             # the report does not publish its prompts; ours
    "Here is a piece of a program:\n\n{snippet}\n\nWrite a short, self-contained Python program "
    "that has to do with it. It reads nothing, uses the standard library alone, and prints some "
    "results. Answer with the program in a ```python block.")


def teacher_programs(url, files):
    """Programs by an LLM teacher, each inspired by 40 lines of one of the files.

    Yields FILES pairs (program, None), or (answer, reason) if it is dropped: it must run in the
    sandbox and print something (the report checks synthetic code with an executor).
    """
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
            block = re.search(r"^```\w*\n(.*?)^```", answer, re.DOTALL | re.MULTILINE)
            if not block:
                yield answer, "answer without a program"
                continue
            printed, outcome = sandbox.run(block[1])
            if outcome != "ok":
                yield block[1], "program fails"
            elif not printed.strip():
                yield block[1], "program prints nothing"
            else:
                yield block[1], None


TEACHER_SCORE = ("How well does this document explain its code to a reader who wants to learn "
                 "programming? Answer with one number from 0 (not at all, or no code) to 5.\n\n")


def teacher_scores(url, texts):
    """Quality scores from 0 to 5 by an LLM teacher that sees the first 4,000 characters: the last
    such number in its answer, or 0 without one."""
    questions = [user(TEACHER_SCORE + text[:4000]) for text in texts]
    scores = []
    for answer in ask_all(url, questions, temperature=0):
        answer = re.sub(r"(?s)<think>.*</think>|(/|out of) ?5\b", "", answer)
        numbers = re.findall(r"(?<![\d.])[0-5](?:\.\d+)?(?![\d.]*\d)", answer)
        scores.append(float(numbers[-1]) if numbers else 0.0)
    return scores
