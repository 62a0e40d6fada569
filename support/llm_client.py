"""A client for OpenAI-compatible servers: the LLM teacher and the LLM judge.

Answers are cached, so that a question is paid for once. The key in OPENAI_API_KEY is sent to the
named server only: redirects are not followed.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import requests

from support.files import BUSY, InputError, cache_folder, http_session, read_json, write_json


def check_server(url):
    """Raise InputError unless this is the URL of a server, without a secret: the URL is printed and
    written to manifests."""
    server = url.partition("#")[0]
    if "@" in server or "?" in server:
        raise InputError("the URL of a teacher or judge must not contain a key; set OPENAI_API_KEY")
    if not re.match("https?://", server, re.IGNORECASE):
        raise InputError(f"{url}: expected the URL of an OpenAI-compatible server, such as "
                         "http://host:8000/v1 or http://host:8000/v1#model")


def send(method, url, **options):
    """Send a request with the key in OPENAI_API_KEY -> the reply."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with http_session() as session:
        return session.request(method, url, headers=headers, allow_redirects=False, **options)


@functools.cache
def first_model(server):
    """The name of the first model that a server lists."""
    check_server(server)
    try:
        reply = send("GET", f"{server}/models", timeout=60)
        if reply.status_code == 200:
            return reply.json()["data"][0]["id"]
        problem = f"HTTP {reply.status_code}"
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        problem = type(error).__name__
    raise InputError(f"{server}: lists no model ({problem}); expected a running OpenAI-compatible "
                     "server, such as http://host:8000/v1")


def post(server, question):
    """Send one question -> (the answer or None, the problem or None). Raises InputError if the
    server refuses the question, so that a retry would not help."""
    try:
        reply = send("POST", f"{server}/chat/completions", json=question, timeout=600)
    except requests.RequestException as error:
        return None, type(error).__name__
    if reply.is_redirect:
        raise InputError(f"{server}: redirects to another address, which is not followed; give the "
                         "address of the server itself")
    if reply.status_code != 200:
        problem = f"HTTP {reply.status_code} {' '.join(reply.text.split())[:100]}"
        if reply.status_code >= 500 or reply.status_code in BUSY:
            return None, problem
        raise InputError(f"{server}: {problem}")
    try:
        answer = reply.json()["choices"][0]["message"]["content"]
        return answer.encode(errors="replace").decode(), None       # no unpaired surrogates
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", None                                             # a reply without an answer


def ask(url, messages, tries=5, **options):
    """The answer of a model to a conversation, from the cache if it was asked before.

    url: of a server, such as http://host:8000/v1, with #model unless its first model is meant (the
    server must then run even if all answers are cached). options: temperature, seed, ...; tries:
    how often to ask while the replies contain no answer. Raises InputError if there is no answer.
    """
    check_server(url)
    server, _, model = url.partition("#")
    question = {"messages": messages, **options, "model": model or first_model(server)}
    name = hashlib.sha256(json.dumps([server, question]).encode()).hexdigest()
    path = cache_folder() / "answers" / f"{name}.json"
    with contextlib.suppress(InputError, KeyError):         # not cached, or the file is incomplete
        return read_json(path)["answer"]
    for _ in range(tries):
        answer, problem = post(server, question)
        if answer or problem:
            break
    if not answer:
        problem = problem or "replies without an answer"
        raise InputError(f"{server}: no answer ({problem}); the same command continues from here")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"question": question, "answer": answer})
    return answer


def user(text):
    """The conversation that begins with a question."""
    return [{"role": "user", "content": text}]


def ask_all(url, conversations, **options):
    """The answers to many conversations. Eight are asked at a time, equal ones once."""
    distinct = {json.dumps(messages): messages for messages in conversations}
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda messages: ask(url, messages, **options), distinct.values())
        answer_to = dict(zip(distinct, answers))
    return [answer_to[json.dumps(messages)] for messages in conversations]
