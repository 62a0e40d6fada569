"""A client for OpenAI-compatible servers: the LLM teacher and the LLM judge.

Answers are cached, so a question is paid for once. The key in OPENAI_API_KEY is sent to the server
that was named, and nowhere else: redirects are not followed.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from support.files import InputError, cache_folder, read_json, write_json

RETRIES = 4                 # of a request that fails
RETRY_SECONDS = 1           # the unit of the pauses between them: 0, 2, 4 and 8
LONGEST_PAUSE = 60          # seconds, whatever the server asks for
BUSY = (408, 429, 500, 502, 503, 504)       # HTTP statuses after which asking again may help


class PatientRetry(Retry):
    """Pauses as long as the server asks in Retry-After, up to LONGEST_PAUSE."""

    def get_retry_after(self, response):
        told = super().get_retry_after(response)
        return told and min(told, LONGEST_PAUSE)


def retrying_session():
    """A requests.Session that repeats a request when the server is busy or cannot be reached."""
    retry = PatientRetry(RETRIES, status_forcelist=BUSY, allowed_methods=None,
                         backoff_factor=RETRY_SECONDS, raise_on_status=False)
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=retry))
    session.mount("https://", HTTPAdapter(max_retries=retry))
    return session


def key_header():
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_server(url):
    """Raise InputError unless this is the URL of a server without a secret in it: the URL is
    printed and written to manifests."""
    server = url.partition("#")[0]
    if "@" in server or "?" in server:
        raise InputError("the URL of a teacher or judge must not contain a key; set OPENAI_API_KEY")
    if not re.match("https?://", server, re.IGNORECASE):
        raise InputError(f"{url}: expected the URL of an OpenAI-compatible server, as "
                         "http://host:8000/v1 or http://host:8000/v1#model")


@functools.cache
def first_model(server):
    """The name of the first model that an OpenAI-compatible server lists."""
    check_server(server)
    try:
        reply = requests.get(f"{server}/models", timeout=60, headers=key_header(),
                             allow_redirects=False)
        if reply.status_code == 200:
            return reply.json()["data"][0]["id"]
        problem = f"HTTP {reply.status_code}"
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        problem = type(error).__name__
    raise InputError(f"{server}: lists no model ({problem}); expected a running OpenAI-compatible "
                     "server, as http://host:8000/v1")


def post(server, question):
    """Send one question -> (the answer or None, what went wrong). InputError: the server refuses
    it, so asking again would not help."""
    try:
        with retrying_session() as session:
            reply = session.post(f"{server}/chat/completions", json=question, timeout=600,
                                 headers=key_header(), allow_redirects=False)
    except requests.RequestException as error:
        return None, type(error).__name__
    if reply.is_redirect:
        raise InputError(f"{server}: redirects to another address, which is not followed; give the "
                         "server's own address")
    if reply.status_code != 200:
        problem = f"HTTP {reply.status_code} {' '.join(reply.text.split())[:100]}"
        if reply.status_code >= 500 or reply.status_code in BUSY:
            return None, problem
        raise InputError(f"{server}: {problem}")
    try:
        answer = reply.json()["choices"][0]["message"]["content"]
        return answer.encode(errors="replace").decode(), None       # no half surrogate pairs
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", None                                             # a reply without an answer


def ask(url, messages, tries=5, **options):
    """What a model answers to a conversation; from the cache if it was asked before.

    url: of an OpenAI-compatible server, as http://host:8000/v1, with #model if not its first (to
    know which that is, the server must run even if all answers are cached). options: temperature,
    seed, ... tries: how often to ask if the replies contain no answer. InputError: no answer.
    """
    check_server(url)
    server, _, model = url.partition("#")
    question = {"messages": messages, **options, "model": model or first_model(server)}
    name = hashlib.sha256(json.dumps([server, question]).encode()).hexdigest()
    path = cache_folder() / "answers" / f"{name}.json"
    with contextlib.suppress(InputError, KeyError):         # not cached, or the file was cut off
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
    """The answers to many conversations, eight asked at a time, equal ones once."""
    distinct = {json.dumps(messages): messages for messages in conversations}
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda messages: ask(url, messages, **options), distinct.values())
        answer_to = dict(zip(distinct, answers))
    return [answer_to[json.dumps(messages)] for messages in conversations]
