"""pytest tests/test_llm_client.py"""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import answered
from urllib3 import HTTPResponse

from support import llm_client
from support.files import InputError


def test_a_question_is_asked_again_but_paid_once(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    troubles = [(429, b"slow down"), (500, b""), (200, b"{"), (200, {"choices": []}),
                answered(None), answered([{"text": "4"}]), answered("four\ud83d")]
    teacher.answer, teacher.keys = lambda body: troubles.pop(0), ["Bearer secret"]
    question = [{"role": "user", "content": "2 + 2?"}]
    for _ in range(2):
        assert llm_client.ask(teacher.url, question, tries=9, temperature=0) == "four?"
    path, key, body = teacher.asked[-1]
    assert len(teacher.asked) == 7 and path == "/v1/chat/completions" and key == "Bearer secret"
    assert body == {"model": "teacher-7b", "messages": question, "temperature": 0}
    teacher.answer = lambda body: answered(body["model"] + str(body.get("seed")))
    assert llm_client.ask(teacher.url + "#other", question, seed=1) == "other1"
    assert llm_client.ask(teacher.url + "#other", question, seed=2) == "other2"
    assert llm_client.ask(teacher.url, question, seed=2) == "teacher-7b2"
    with monkeypatch.context() as patch:                        # the server has another model now
        patch.setattr(llm_client, "first_model", lambda server: "student")
        assert llm_client.ask(teacher.url, question, seed=2) == "student2"
    questions = [[{"role": "user", "content": str(n)}] for n in range(20)]
    before = len(teacher.asked)
    teacher.answer = lambda body: answered(body["messages"][0]["content"])
    assert llm_client.ask_all(teacher.url, questions * 2) == [str(n) for n in range(20)] * 2
    assert len(teacher.asked) == before + 20
    [kept] = [file for file in (tmp_path / "cache" / "answers").iterdir()
              if "four" in file.read_text()]
    assert "secret" not in kept.read_text()
    kept.write_text("")                                         # cut off by a kill
    teacher.answer = lambda body: answered("five")
    assert llm_client.ask(teacher.url, question, temperature=0) == "five"


def test_a_teacher_that_does_not_answer(teacher, monkeypatch):
    teacher.answer = lambda body: (401, b"no such\nkey")
    with pytest.raises(InputError, match=r"v1: HTTP 401 no such key$"):
        llm_client.ask(teacher.url, [])
    assert len(teacher.asked) == 1                              # asking again would not help
    teacher.answer, pauses = lambda body: (503, b""), []
    with monkeypatch.context() as patch, pytest.raises(
            InputError, match=r"no answer \(HTTP 503 \); the same command continues"):
        patch.setattr(llm_client, "RETRY_SECONDS", 1)
        patch.setattr("urllib3.util.retry.time.sleep", pauses.append)
        llm_client.ask(teacher.url, [])
    assert pauses == [2, 4, 8] and len(teacher.asked) == 6
    teacher.answer = lambda body: (200, {"choices": []})
    with pytest.raises(InputError, match=r"no answer \(replies without an answer\)"):
        llm_client.ask(teacher.url, [])
    with pytest.raises(InputError, match="lists no model .ConnectionError.; expected a running"):
        llm_client.ask("http://127.0.0.1:1/v1", [])
    for url in ("https://me:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(InputError, match="must not contain a key; set OPENAI_API_KEY"):
            llm_client.ask(url, [])
    for url in ("localhost:8000/v1", "ftp://host/v1", ""):
        with pytest.raises(InputError, match="expected the URL of an OpenAI-compatible server"):
            llm_client.check_server(url)
    teacher.keys = ["Bearer other"]
    llm_client.first_model.cache_clear()
    with pytest.raises(InputError, match="lists no model .HTTP 401."):
        llm_client.ask(teacher.url, [])


def test_the_key_follows_no_redirect(teacher, monkeypatch):
    """Not even to the same host: neither the key nor the texts go where nobody sent them."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", teacher.url + "/chat/completions")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(InputError, match="lists no model .HTTP 307."):
        llm_client.ask(url, [])
    with pytest.raises(InputError, match="redirects to another address, which is not followed"):
        llm_client.ask(url + "#model", [])
    server.shutdown()
    server.server_close()
    assert asked == ["/v1/models", "/v1/chat/completions"] and not teacher.asked




def test_the_pause_that_a_server_asks_for_has_a_limit():
    retry = llm_client.PatientRetry(1)
    assert retry.get_retry_after(HTTPResponse(headers={"Retry-After": "7"})) == 7
    assert retry.get_retry_after(HTTPResponse(headers={"Retry-After": "9999"})) == 60
    assert retry.get_retry_after(HTTPResponse()) is None
