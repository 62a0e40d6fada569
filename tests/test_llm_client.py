"""pytest tests/test_llm_client.py"""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import answered
from urllib3 import HTTPResponse

from support import files, llm_client
from support.files import InputError


def test_a_question_is_repeated_but_paid_for_once(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    replies = [(429, b"slow down"), (500, b""), (200, b"{"), (200, {"choices": []}),
               answered(None), answered([{"text": "4"}]), answered("four\ud83d")]
    teacher.answer, teacher.keys = lambda body: replies.pop(0), ["Bearer secret"]
    question = [{"role": "user", "content": "2 + 2?"}]
    for _ in range(2):
        assert llm_client.ask(teacher.url, question, tries=9, temperature=0) == "four?"
    path, key, body = teacher.asked[-1]
    assert len(teacher.asked) == 7 and path == "/v1/chat/completions" and key == "Bearer secret"
    assert body == {"model": "teacher-7b", "messages": question, "temperature": 0}
    [cached] = (tmp_path / "cache" / "answers").iterdir()
    assert "secret" not in cached.read_text()
    cached.write_text("")                                       # as after a kill
    teacher.answer = lambda body: answered("five")
    assert llm_client.ask(teacher.url, question, temperature=0) == "five"


def test_answers_are_cached_by_model_and_options(teacher, monkeypatch):
    question = [{"role": "user", "content": "2 + 2?"}]
    teacher.answer = lambda body: answered(body["model"] + str(body.get("seed")))
    assert llm_client.ask(teacher.url + "#other", question, seed=1) == "other1"
    assert llm_client.ask(teacher.url + "#other", question, seed=2) == "other2"
    assert llm_client.ask(teacher.url, question, seed=2) == "teacher-7b2"
    monkeypatch.setattr(llm_client, "first_model", lambda server: "student")
    assert llm_client.ask(teacher.url, question, seed=2) == "student2"
    questions = [[{"role": "user", "content": str(n)}] for n in range(20)]
    teacher.answer = lambda body: answered(body["messages"][0]["content"])
    before = len(teacher.asked)
    assert llm_client.ask_all(teacher.url, questions * 2) == [str(n) for n in range(20)] * 2
    assert len(teacher.asked) == before + 20


def test_a_teacher_that_does_not_answer(teacher, monkeypatch):
    teacher.answer = lambda body: (401, b"no such\nkey")
    with pytest.raises(InputError, match=r"v1: HTTP 401 no such key$"):
        llm_client.ask(teacher.url, [])
    assert len(teacher.asked) == 1                              # a retry would not help
    teacher.answer, pauses = lambda body: (503, b""), []
    with monkeypatch.context() as patch, pytest.raises(
            InputError, match=r"no answer \(HTTP 503 \); the same command continues"):
        patch.setattr(files, "RETRY_SECONDS", 1)
        patch.setattr("urllib3.util.retry.time.sleep", pauses.append)
        llm_client.ask(teacher.url, [])
    assert pauses == [2, 4, 8] and len(teacher.asked) == 6
    teacher.answer = lambda body: (200, {"choices": []})
    with pytest.raises(InputError, match=r"no answer \(replies without an answer\)"):
        llm_client.ask(teacher.url, [])
    teacher.keys = ["Bearer other"]
    llm_client.first_model.cache_clear()
    with pytest.raises(InputError, match="lists no model .HTTP 401."):
        llm_client.ask(teacher.url, [])


@pytest.mark.parametrize("url,message", [
    ("http://127.0.0.1:1/v1", "lists no model .ConnectionError.; expected a running"),
    ("https://me:secret@host/v1", "must not contain a key; set OPENAI_API_KEY"),
    ("http://host/v1?key=secret", "must not contain a key; set OPENAI_API_KEY"),
    ("localhost:8000/v1", "expected the URL of an OpenAI-compatible server"),
    ("ftp://host/v1", "expected the URL of an OpenAI-compatible server")])
def test_urls_that_are_refused(url, message):
    with pytest.raises(InputError, match=message):
        llm_client.ask(url, [])


def test_redirects_are_not_followed(teacher, monkeypatch):
    """Neither the key nor the texts are sent to another address, even on the same host."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(307)
            self.send_header("Location", teacher.url + "/chat/completions")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(InputError, match="lists no model .HTTP 307."):
        llm_client.ask(url, [])
    with pytest.raises(InputError, match="redirects to another address, which is not followed"):
        llm_client.ask(url + "#model", [])
    server.shutdown()
    server.server_close()
    assert not teacher.asked


@pytest.mark.parametrize("headers,seconds", [
    ({"Retry-After": "7"}, 7), ({"Retry-After": "9999"}, 60), ({}, None)])
def test_the_pause_that_a_server_requests_is_limited(headers, seconds):
    assert files.PatientRetry(1).get_retry_after(HTTPResponse(headers=headers)) == seconds
