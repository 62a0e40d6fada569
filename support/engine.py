"""Runs the model for all requests of the server at once (support/server.py)."""

import os
import queue
import threading
import time

import torch

BATCH_SIZE = 8              # requests that are answered together; further ones wait
RECENT = 4                  # prompts whose keys and values are kept


class Generation:
    """A text that is being generated.

    ids: the prompt; stream: turns ids into text, and may end it; sampling: temperature, top_k,
    top_p and seed; seconds: a time limit, after which it ends at the next line end. events: a queue
    of new texts, with None after the last. reason: why it has ended.
    """

    def __init__(self, ids, stream, stop_ids, sampling, max_tokens, seconds):
        self.ids, self.stream, self.stop_ids = ids, stream, stop_ids
        self.sampling, self.max_tokens, self.seconds = sampling, max_tokens, seconds
        self.events = queue.Queue()
        self.count = 0                      # tokens generated so far
        self.started = None
        self.reason = None
        self.cancelled = False

    def accept(self, token):
        """Take the next token -> whether the generation continues."""
        self.started = self.started or time.monotonic()
        if self.cancelled or token in self.stop_ids:
            return self.end("stop")
        if self.count >= self.max_tokens:   # 0: the prompt was only to be read
            return self.end("length")
        self.count += 1
        text = self.stream.add(token)
        self.events.put(text)
        if self.stream.stopped:
            return self.end("stop")
        if "\n" in text and time.monotonic() - self.started > self.seconds:
            return self.end("length")
        return True

    def end(self, reason):
        """End the generation -> False, for accept() to return."""
        if reason != "error":
            self.events.put(self.stream.finish())
        self.reason = reason
        self.events.put(None)
        return False


class PromptCache:
    """The keys and values of recent prompts. After each key an editor sends nearly the same prompt;
    only what follows the first change has to be read."""

    def __init__(self):
        self.recent = []                    # (prompt, its KVCache), the newest first

    def join(self, batch, prompt):
        """Let a prompt join a batch, without reading again the start that it shares with a recent
        one."""
        longest, shared = 0, None
        for ids, cache in self.recent:
            # Compares lists of ids as well as paths. The last id must be read for its logits.
            common = len(os.path.commonprefix([ids, prompt[:-1]]))
            if common > longest:
                longest = common
                shared = cache
        cache = batch.join_one(prompt, shared.first(longest) if shared else None)
        self.recent = [(prompt, cache), *self.recent][:RECENT]


class Engine(threading.Thread):
    """The one thread that runs the model. A request that arrives while others are being answered
    joins their batch.

    new_batch() -> an empty Batch; choose(logits, samplings) -> the next id of each sequence.
    """

    def __init__(self, new_batch, choose):
        super().__init__(daemon=True)
        self.new_batch, self.choose = new_batch, choose
        self.waiting = queue.Queue()        # Generations
        self.active = []                    # those in the batch
        self.prompts = PromptCache()

    @torch.inference_mode()
    def run(self):
        batch = self.new_batch()
        while True:
            try:
                self.admit(batch)
                next_ids = self.choose(batch.logits, [one.sampling for one in self.active])
                unfinished = [b for b, token in enumerate(next_ids.tolist())
                              if self.active[b].accept(token)]
                self.active = [self.active[b] for b in unfinished]
                batch.step(next_ids, unfinished)
            except Exception as error:      # such as out of memory; the next requests may work
                print(f"error: {type(error).__name__}: {error}", flush=True)
                for generation in self.active:
                    generation.end("error")
                batch, self.active = self.new_batch(), []

    def admit(self, batch):
        """Let waiting requests join the batch; if it is empty, wait for one."""
        while len(self.active) < BATCH_SIZE:
            if self.active and self.waiting.empty():
                return
            generation = self.waiting.get()             # waits only if none is active
            if not generation.cancelled:
                self.active.append(generation)          # first, so that run() ends it if join fails
                self.prompts.join(batch, generation.ids)
