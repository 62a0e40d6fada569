"""A server for editors and chats, on Python's http.server.

    POST /v1/completions            OpenAI's: prompt, or prompt and suffix
    POST /v1/chat/completions       OpenAI's: messages, tools
    POST /infill, /completion       llama.cpp's: input_prefix, input_suffix, ...; prompt
    GET  /v1/models, /health        for plug-ins that ask first
    GET  /                          a page with an editor

Each connection has a thread, which reads requests and writes answers. The model itself runs in one
more thread for all of them (support/engine.py).
"""

import json
import math
import queue
import select
import socket
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.engine import Generation
from support.files import InputError

MAX_BODY = 4 << 20          # bytes of a request
POLL_SECONDS = 0.2          # how often a waiting thread looks whether its client is still there
DEFAULT_TOKENS = 256        # of an answer, where the request does not say


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. server: a Server."""

    protocol_version = "HTTP/1.1"
    timeout = 60                            # seconds for a client to send its request

    def log_message(self, *args):
        pass

    def do_GET(self):
        models = [{"id": self.server.backend.name, "object": "model", "owned_by": "minicoder"}]
        if self.path in ("/v1/models", "/models"):
            self.reply(200, {"object": "list", "data": models})
        elif self.path in ("/health", "/v1/health"):
            self.reply(200, {"status": "ok"})
        elif self.path == "/":
            self.send(200, self.server.page.encode(), "text/html; charset=utf-8")
        else:
            self.refuse(404, f"no such page: {self.path}")

    def do_POST(self):
        try:
            body = self.read_body()
            if body is None:
                return
            if self.path not in FORMATS:
                return self.refuse(404, f"no such endpoint: {self.path}")
            make_prompt, answer_format = FORMATS[self.path]
            generation = new_generation(self.server.backend, make_prompt, body)
            stream = field(body, "stream", bool, False)
        except InputError as error:
            return self.refuse(400, str(error))
        self.server.engine.waiting.put(generation)
        try:
            self.answer(generation, answer_format, stream)
        except OSError:                     # the client is gone
            generation.cancelled = True
            self.close_connection = True

    def read_body(self):
        """The JSON object of a request; None if it has been refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True    # the body stays unread
            return self.refuse(413, f"a body of at most {MAX_BODY:,} bytes is expected")
        try:
            body = json.loads(self.rfile.read(int(length)))
            json.dumps(body, ensure_ascii=False).encode()   # refuses half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}") from None
        if not isinstance(body, dict):
            raise InputError("expected a JSON object")
        return body

    def answer(self, generation, answer_format, stream):
        texts = []
        common = {"id": f"minicoder-{uuid.uuid4().hex}", "created": int(time.time()),
                  "model": self.server.backend.name}
        if stream:
            self.close_connection = True    # ends the answer, whose length is not known before
            self.start(200, "text/event-stream")
            self.end_headers()
        for text in self.events(generation):
            texts.append(text)
            if stream and text:
                self.write_event({**common, **answer_format(text, None, stream)})
        if generation.reason == "error":
            message = {"error": {"message": "the model failed, perhaps for lack of memory"}}
            return self.write_event(message) if stream else self.reply(500, message)
        tokens = {"prompt_tokens": len(generation.ids), "completion_tokens": generation.count,
                  "total_tokens": len(generation.ids) + generation.count}
        last = answer_format("" if stream else "".join(texts), generation.reason, stream)
        last = {**common, **last, "usage": tokens, "tokens_predicted": generation.count}
        if not stream:
            return self.reply(200, last)
        self.write_event(last)
        if "choices" in last:
            self.wfile.write(b"data: [DONE]\n\n")

    def events(self, generation):
        """The new texts of a generation; OSError when the client has closed the connection."""
        while True:
            try:
                text = generation.events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                readable, _, _ = select.select([self.connection], [], [], 0)
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionResetError from None
                continue
            if text is None:
                return
            yield text

    def write_event(self, data):
        self.wfile.write(b"data: " + compact(data) + b"\n\n")

    def start(self, status, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)

    def send(self, status, data, kind):
        self.start(status, kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def reply(self, status, data):
        self.send(status, compact(data), "application/json")

    def refuse(self, status, message):
        self.reply(status, {"error": {"message": message, "type": "invalid_request_error"}})


def compact(data):
    """JSON without spaces: llama.vim looks for "content":" in it."""
    return json.dumps(data, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------
# The fields of requests and answers


KINDS = {str: "text", int: "a whole number", (int, float): "a number", bool: "true or false",
         list: "a list"}


def field(body, name, kind, default):
    """A field of a request; null counts as missing."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{name}: expected {KINDS[kind]}")
    return value


def new_generation(backend, make_prompt, body):
    """The Generation that a request asks for."""
    number = (int, float)
    given = [name for name in ("max_tokens", "max_completion_tokens", "n_predict")
             if body.get(name) is not None]
    max_tokens = field(body, given[0], int, None) if given else DEFAULT_TOKENS
    if max_tokens < 0:                      # llama.cpp: no limit
        max_tokens = backend.context_length // 2
    max_tokens = min(max_tokens, backend.context_length // 2)
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InputError("stop: expected a string or a list of strings")
    sampling = {"temperature": field(body, "temperature", number, 0.0),
                "top_p": field(body, "top_p", number, 1.0),
                "top_k": field(body, "top_k", int, 0), "seed": field(body, "seed", int, 0)}
    if not 0 <= sampling["temperature"] <= 100:
        raise InputError("temperature: must be between 0 and 100")
    ids, stream, stop_ids = make_prompt(backend, body, backend.context_length - max_tokens,
                                        [stop for stop in stops if stop])
    seconds = field(body, "t_max_predict_ms", number, math.inf) / 1000
    return Generation(ids, stream, stop_ids, sampling, max_tokens, seconds)


def completion(backend, body, room, stops):
    prompt = field(body, "prompt", str, "")
    suffix = field(body, "suffix", str, "")
    if suffix:
        return backend.infill(prompt, suffix, room, stops)
    return backend.complete(prompt, room, stops)


def infill(backend, body, room, stops):
    files = [(str(extra.get("filename", "")), str(extra.get("text", "")))
             for extra in field(body, "input_extra", list, []) if isinstance(extra, dict)]
    prefix = field(body, "input_prefix", str, "") + field(body, "prompt", str, "")
    return backend.infill(prefix, field(body, "input_suffix", str, ""), room, stops, files)


def chat(backend, body, room, stops):
    return backend.chat(field(body, "messages", list, []), body.get("tools"), room, stops)


def openai_completion(text, reason, stream):
    return {"object": "text_completion",
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}


def openai_chat(text, reason, stream):
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion.chunk" if stream else "chat.completion",
            "choices": [{"index": 0, "delta" if stream else "message": message,
                         "finish_reason": reason}]}


def llama_cpp(text, reason, stream):
    return {"content": text, "stop": reason is not None}


# path -> (how its prompt is made, the format of its answer)
FORMATS = {"/v1/completions": (completion, openai_completion),
           "/v1/chat/completions": (chat, openai_chat), "/chat/completions": (chat, openai_chat),
           "/infill": (infill, llama_cpp), "/completion": (completion, llama_cpp),
           "/completions": (completion, llama_cpp)}


class Server(ThreadingHTTPServer):
    """backend: makes prompts of requests, see fim.Backend."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address, backend, engine, page):
        super().__init__(address, Handler)
        self.backend, self.engine, self.page = backend, engine, page
        engine.start()
