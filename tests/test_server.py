"""The server: requests as editor plug-ins send them, bad requests, clients that leave."""

import http.client
import json
import socket
import threading
import time

import pytest
import torch
from conftest import CODE, SMALL, fill_weights

from fim import MIDDLE, PREFIX, SUFFIX, Backend, infill
from model import CausalLM, Config
from support.api import FORMATS, new_generation
from support.batching import Batch
from support.engine import Engine, PromptCache
from support.server import MAX_BODY, Server
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = Tokenizer.train([CODE * 3], 400)
    config = {**SMALL, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    return fill_weights(CausalLM(Config(**config))).eval(), tokenizer


@pytest.fixture
def server(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    backend = Backend(model, tokenizer, "qwen2.5-coder-test")
    server = Server(("127.0.0.1", 0), backend, Engine(lambda: Batch(model), backend.choose),
                    "<title>minicoder</title>")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def send(server, path, body=None, headers=()):
    """-> (status, the answer as text)."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, dict(headers))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def events(text):
    """The data of server-sent events, [DONE] as text."""
    assert all(line.startswith("data: ") for line in text.split("\n\n") if line)
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


GAP = ("def mean(numbers):\n    total = ", "\n    return total\n")
# What plug-ins send, as of November 2026 (fields that the server does not know are ignored)
LLAMA_VIM = {
    "id_slot": 0, "input_prefix": "def mean(numbers):\n", "input_suffix": "\n    return total\n",
    "input_extra": [{"text": CODE, "time": [1234, 567890], "filename": "a.py"}],
    "prompt": "    total = ", "n_predict": 16, "stop": [], "n_indent": 4, "top_k": 40, "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"], "stream": False, "cache_prompt": True,
    "t_max_prompt_ms": 500, "t_max_predict_ms": 5000, "response_fields": ["content"]}
LLAMA_VIM_WARM_UP = {**LLAMA_VIM, "input_prefix": "", "input_suffix": "", "prompt": "",
                     "n_predict": 0, "temperature": 0.0, "samplers": [], "t_max_predict_ms": 1}
LLAMA_VSCODE = {**LLAMA_VIM, "n_cmpl": 3, "top_p": 0.99, "model": ""}
CONTINUE = {
    "model": "qwen2.5-coder:1.5b", "max_tokens": 16, "temperature": 0.01, "stream": True,
    "stop": ["<|endoftext|>", "/src/", "#- coding: utf-8", "```"],
    "prompt": f"{PREFIX}{GAP[0]}{SUFFIX}{GAP[1]}{MIDDLE}"}
TABBY_OPENAI = {"model": "m", "prompt": GAP[0], "suffix": GAP[1], "max_tokens": 16,
                "temperature": 0.1, "stream": True, "presence_penalty": 0.0}
TABBY_LLAMA = {"seed": 123, "prompt": CONTINUE["prompt"], "n_predict": 16, "temperature": 0.0,
               "stream": True, "penalty_last_n": 0, "presence_penalty": 0.0}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8,
        "stream_options": {"include_usage": True}}


def test_llama_vim_and_vscode(server, model_and_tokenizer):
    expected = infill(*model_and_tokenizer, *GAP, 16, files=[("a.py", CODE)], path="main")
    for body in (LLAMA_VIM, LLAMA_VSCODE):
        status, text = send(server, "/infill", body, {"Authorization": "Bearer "}.items())
        assert status == 200 and "\n" not in text
        assert text.count('"content":"') == 1                   # llama.vim looks for it like that
        assert json.loads(text)["content"] == expected and json.loads(text)["stop"] is True
    status, text = send(server, "/infill", LLAMA_VIM_WARM_UP)
    assert status == 200 and json.loads(text)["content"] == ""
    parts = events(send(server, "/infill", {**LLAMA_VIM, "stream": True})[1])
    assert "".join(part["content"] for part in parts) == expected
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]


def test_continue_and_tabby(server, model_and_tokenizer):
    """FIM prompts as text, or prompt and suffix: both are the same infill."""
    expected = infill(*model_and_tokenizer, *GAP, 16)
    for path, body in (("/v1/completions", {**CONTINUE, "temperature": 0}),
                       ("/v1/completions", {**TABBY_OPENAI, "temperature": 0})):
        *parts, last, done = events(send(server, path, body)[1])
        assert "".join(part["choices"][0]["text"] for part in parts) == expected
        assert last["choices"][0]["finish_reason"] in ("stop", "length") and done == "[DONE]"
        assert all(part["choices"][0]["finish_reason"] is None for part in parts)
    for path in ("/completion", "/completions"):
        parts = events(send(server, path, TABBY_LLAMA)[1])
        assert "".join(part["content"] for part in parts) == expected
        assert parts[-1]["stop"] is True and not any(part["stop"] for part in parts[:-1])


def test_chat(server):
    status, text = send(server, "/v1/chat/completions", CHAT)
    answer = json.loads(text)
    assert status == 200 and answer["choices"][0]["message"]["role"] == "assistant"
    whole = answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 8
    *parts, last, done = events(send(server, "/v1/chat/completions", {**CHAT, "stream": True})[1])
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == whole
    assert last["choices"][0]["finish_reason"] and done == "[DONE]"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert send(server, "/v1/chat/completions", {**CHAT, "tools": tools})[0] == 200


def test_limits_of_requests_without_one(model_and_tokenizer):
    backend = Backend(*model_and_tokenizer, "test")
    chat, completion = FORMATS["/v1/chat/completions"][0], FORMATS["/v1/completions"][0]
    short = {"prompt": "a", "messages": CHAT["messages"]}
    assert new_generation(backend, completion, short).max_tokens == 256
    assert new_generation(backend, chat, short).max_tokens == 256   # half of a context of 512
    backend.context_length = 32_768
    assert new_generation(backend, completion, short).max_tokens == 256
    assert new_generation(backend, chat, short).max_tokens == 2048
    assert new_generation(backend, chat, {**short, "max_tokens": 5}).max_tokens == 5


def test_models_health_and_page(server):
    assert json.loads(send(server, "/v1/models")[1])["data"][0]["id"] == "qwen2.5-coder-test"
    assert json.loads(send(server, "/health")[1]) == {"status": "ok"}
    assert send(server, "/") == (200, "<title>minicoder</title>")
    assert send(server, "/nothing")[0] == 404


@pytest.mark.parametrize("path, body, status, message", [
    ("/infill", b"{", 400, "not JSON"), ("/infill", b"[1]", 400, "JSON object"),
    ("/infill", b"\xff", 400, "not JSON"), ("/infill", b"[" * 100_000, 400, "not JSON"),
    ("/infill", b'{"input_prefix": "\\ud800"}', 400, "not JSON"),
    ("/infill", {"input_prefix": 5}, 400, "input_prefix: expected text"),
    ("/v1/completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("/v1/completions", b'{"prompt": "a", "top_p": NaN, "temperature": 1}', 400, "top_p"),
    ("/v1/completions", {"prompt": "a", "top_p": -2}, 400, "top_p"),
    ("/v1/completions", {"prompt": ["a"]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "stop": [1]}, 400, "stop"),
    ("/v1/chat/completions", {}, 400, "at least one message"),
    ("/v1/chat/completions", {"messages": [{"role": "cat"}]}, 400, "unknown role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "room"),
    ("/v2", {}, 404, "no such endpoint")])
def test_bad_requests(server, path, body, status, message):
    answer = send(server, path, body)
    assert answer[0] == status and message in json.loads(answer[1])["error"]["message"]
    assert send(server, "/infill", {"input_prefix": "a", "n_predict": 1})[0] == 200


def test_large_bodies_are_refused_unread(server):
    with socket.create_connection(server.server_address) as client:
        client.sendall(b"POST /infill HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1))
        assert client.recv(99).startswith(b"HTTP/1.1 413 ")


def test_a_common_prefix_is_not_read_again(model_and_tokenizer):
    model, _ = model_and_tokenizer
    with torch.inference_mode():
        batch, cache, lengths = Batch(model), PromptCache(), []
        read = batch.read
        batch.read = lambda ids, cache: (lengths.append(ids.shape[1]), read(ids, cache))[1]
        prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 4, 5, 6], [7, 8], [1, 2, 3, 9]]
        for prompt in prompts:
            cache.join(batch, prompt)
        assert lengths == [5, 1, 1, 2, 1]
        for logits, prompt in zip(batch.logits, prompts):
            expected = model(torch.tensor([prompt]))[0, -1]
            assert torch.allclose(logits, expected, atol=1e-4)


def test_clients_that_leave_make_room(server, model_and_tokenizer, monkeypatch):
    """30 clients, half of which leave early: the others get what they would get alone."""
    answers, generations = {}, []
    put = server.engine.waiting.put
    monkeypatch.setattr(server.engine.waiting, "put", lambda generation: (
        generations.append(generation), put(generation)))
    expected = {n: infill(*model_and_tokenizer, f"x = {n}\ny = ", "\n", 24) for n in range(15)}

    def stay(n):
        body = {"input_prefix": f"x = {n}\ny = ", "input_suffix": "\n", "n_predict": 24}
        answers[n] = json.loads(send(server, "/infill", body)[1])["content"]

    def leave(n):           # those that stream after the first bytes, the others at once
        body = json.dumps({"prompt": "def f", "max_tokens": 250, "stream": n % 2 == 0}).encode()
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s"
                           % (len(body), body))
            if n % 2 == 0:
                client.recv(10)

    threads = [threading.Thread(target=(leave, stay)[i % 2], args=(i // 2,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected
    deadline = time.monotonic() + 30
    while server.engine.active and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not server.engine.active and server.engine.waiting.empty()
    left = [generation for generation in generations if generation.max_tokens == 250]
    assert len(left) == 15 and sum(generation.cancelled for generation in left) > 10
    assert sum(generation.count for generation in left) < 15 * 200


def test_an_error_of_the_model_is_reported_and_survived(server, monkeypatch):
    choose = server.engine.choose

    def fail(*args):
        monkeypatch.setattr(server.engine, "choose", choose)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.engine, "choose", fail)
    status, text = send(server, "/infill", {"input_prefix": "a"})
    assert status == 500 and "memory" in json.loads(text)["error"]["message"]
    assert send(server, "/infill", {"input_prefix": "a", "n_predict": 2})[0] == 200
