"""Conversations by an LLM teacher: questions about snippets of code, answers, and their scores."""

import itertools
import random
import re
from collections import defaultdict

from support.chats import new_conversation
from support.llm_client import ask_all, user

TEACHER_QUESTIONS = 200     # not published; ours
TEACHER_LANGUAGES = ("python", "javascript", "go", "java", "c++")   # of snippets; ours
SNIPPET_TOKENS = 1024       # of a snippet for the LLM teacher (report, section 4.1)
QUESTION_TOKENS = 200       # of a question, at most; ours
TEACHER_ANSWERS = 3         # to each question, of which the best is kept; not published; ours
# The report does not publish its prompts; ours
TEACHER_QUESTION = ("Here is a piece of a {language} program:\n\n{snippet}\n\nInspired by it, "
                    "write one exercise for a programming course that asks for a self-contained "
                    "{language} function. State the exercise in one to three sentences, "
                    "without code and without a solution. It begins with \"Write a {language} "
                    "function that\".")
TEACHER_SCORE = ("Question:\n{}\n\nAnswer:\n{}\n\nMark the answer from 0 to 10 in each of these: "
                 "consistency, relevance, difficulty, code exists, correctness, form, clarity, "
                 "comments, easy to learn. Answer with nine numbers separated by blanks.")


def teacher_questions(url, documents, tokenizer, seed):
    """Different questions by an LLM teacher about snippets of training documents, about equally
    many for each of TEACHER_LANGUAGES. (In the report agents for each language have a memory of
    their earlier questions, section 4.1; shown those, a teacher of 0.5B repeats them.)"""
    rng = random.Random(f"{seed} snippets")
    by_language = defaultdict(list)
    for document in documents:
        if document["language"] in TEACHER_LANGUAGES:
            by_language[document["language"]].append(document)
    if not by_language:
        return []
    prompts = []
    for language in itertools.islice(itertools.cycle(sorted(by_language)), TEACHER_QUESTIONS):
        ids = tokenizer.encode(rng.choice(by_language[language])["text"])
        start = rng.randint(0, max(0, len(ids) - SNIPPET_TOKENS))       # not only at imports
        snippet = tokenizer.decode(ids[start:start + SNIPPET_TOKENS])
        prompts.append(user(TEACHER_QUESTION.format(language=language, snippet=snippet)))
    questions = ask_all(url, prompts, temperature=0.7, max_tokens=QUESTION_TOKENS)
    return list(dict.fromkeys(question for question in questions if "```" not in question))


def teacher_conversations(url, documents, tokenizer, seed, checklist):
    """Yield conversations: questions by an LLM teacher, its answers to each, and its scores of the
    answers on the items of a checklist."""
    questions = teacher_questions(url, documents, tokenizer, seed)
    for number in range(TEACHER_ANSWERS):
        answers = ask_all(url, [user(question) for question in questions], temperature=0.7,
                          seed=number)
        replies = ask_all(url, [user(TEACHER_SCORE.format(question, answer))
                                for question, answer in zip(questions, answers)], temperature=0.0)
        for question, answer, reply in zip(questions, answers, replies):
            conversation = new_conversation(question, answer, "teacher")
            scores = scores_in(reply, len(checklist))
            if scores:                              # otherwise sft.set_score() gives them
                conversation["scores"] = dict(zip(checklist, scores))
            yield conversation


def scores_in(reply, count):
    """The scores from 0 to 1 in an LLM teacher's reply; None unless there are `count` of them."""
    scores = [min(10, int(digits[:9])) / 10 for digits in re.findall(r"\d+", reply)]
    return scores if len(scores) == count else None
