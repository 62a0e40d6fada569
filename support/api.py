"""The fields of requests and answers, as OpenAI's interface and llama.cpp's define them."""

import math

from support.engine import Generation
from support.files import InputError

DEFAULT_TOKENS = 256        # of a completion or middle, if the request sets no limit
CHAT_TOKENS = 2048          # of an answer in a chat, if the request sets no limit
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
    default = CHAT_TOKENS if make_prompt is chat else DEFAULT_TOKENS
    max_tokens = field(body, given[0], int, None) if given else default
    limit = backend.context_length // 2     # the other half is for the prompt
    if not 0 <= max_tokens <= limit:        # below 0 is llama.cpp's way to say: no limit
        max_tokens = limit
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InputError("stop: expected a string or a list of strings")
    sampling = {"temperature": field(body, "temperature", number, 0.0),
                "top_p": field(body, "top_p", number, 1.0),
                "top_k": max(0, field(body, "top_k", int, 0)), "seed": field(body, "seed", int, 0)}
    if not 0 <= sampling["temperature"] <= 100:
        raise InputError("temperature: must be between 0 and 100")
    if not sampling["top_p"] >= 0:          # NaN is not either
        raise InputError("top_p: must be at least 0")
    ids, stream, stop_ids = make_prompt(backend, body, backend.context_length - max_tokens,
                                        [stop for stop in stops if stop])
    seconds = min(field(body, "t_max_predict_ms", number, math.inf), 1e9) / 1000
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
