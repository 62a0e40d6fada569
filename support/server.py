"""A server for editors and chats, on Python's http.server.

    POST /v1/completions            OpenAI's: prompt, or prompt and suffix
    POST /v1/chat/completions       OpenAI's: messages, tools
    POST /infill, /completion       llama.cpp's: input_prefix, input_suffix, ...; prompt
    GET  /v1/models, /health        for plug-ins that check before they send
    GET  /                          a page with an editor

Each connection has a thread, which reads requests and writes answers. The model itself runs in one
more thread for all of them (support/engine.py). Fields and formats are in support/api.py.
"""

import contextlib
import json
import queue
import select
import socket
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.api import FORMATS, field, new_generation
from support.files import InputError

MAX_BODY = 4 << 20          # bytes of a request
POLL_SECONDS = 0.2          # how often a waiting thread checks whether its client is still there


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
            self.close_connection = True    # the next request could not be found after its body
            return self.refuse(413, f"a body of at most {MAX_BODY:,} bytes is expected")
        try:
            body = json.loads(self.rfile.read(int(length)))
            json.dumps(body, ensure_ascii=False).encode()   # fails for half of a surrogate pair
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
            self.close_connection = True    # ends an answer whose length is not known in advance
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
        if "choices" in last:               # OpenAI's format; llama.cpp's has no such mark
            self.wfile.write(b"data: [DONE]\n\n")

    def events(self, generation):
        """The new texts of a generation; OSError if the client has closed the connection."""
        while True:
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError          # readable, but no byte: it is closed
            with contextlib.suppress(queue.Empty):
                text = generation.events.get(timeout=POLL_SECONDS)
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
    """JSON without spaces: llama.vim searches it for "content":" without a space."""
    return json.dumps(data, separators=(",", ":")).encode()


class Server(ThreadingHTTPServer):
    """backend: makes prompts from requests, see fim.Backend."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address, backend, engine, page):
        super().__init__(address, Handler)
        self.backend, self.engine, self.page = backend, engine, page
        engine.start()
