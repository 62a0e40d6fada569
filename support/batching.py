"""Continuous batching: sequences that are generated together, and join and leave at any step.

The cache with their keys and values is model.KVCache.
"""

import itertools

import torch

READ_TOKENS = 16384         # of prompts are read at once; more would need much memory


class Batch:
    """Sequences that are generated together. They may join and leave between any two steps
    (continuous batching), so that short ones do not wait for the longest.

    logits (B, V): for the next token of each sequence.
    """

    def __init__(self, model):
        self.model, self.cache, self.logits = model, None, None

    def read(self, input_ids, cache):
        """Feed ids (B, T) to the model -> logits for the token after them (B, V)."""
        document_starts = None
        if cache.ragged:
            position = cache.length + torch.arange(input_ids.shape[1], device=input_ids.device)
            # padding tokens are documents of their own: no token of a prompt attends to them
            document_starts = torch.minimum(position, cache.starts)                 # (B, T)
        return self.model(input_ids, document_starts, cache=cache, last=True)[:, -1]

    def join(self, prompts):
        """Read prompts (lists of ids); their sequences follow those that are in the batch. Equal
        prompts next to each other are read once."""
        groups = [list(group) for _, group in itertools.groupby(prompts)]
        at_once = max(1, READ_TOKENS // max(map(len, prompts)))
        for first in range(0, len(groups), at_once):
            self.join_groups(groups[first:first + at_once])

    def join_groups(self, groups):
        """Read groups of equal prompts, each prompt once."""
        input_ids, starts = pad_left([group[0] for group in groups], self.model.device)
        cache = self.model.new_cache(starts)
        logits = self.read(input_ids, cache)                                        # (groups, V)
        copies = [i for i, group in enumerate(groups) for _ in group]
        if len(copies) > len(groups):
            cache.select(copies)
            logits = logits[copies]
        self.add(cache, logits)

    def join_one(self, prompt, cache=None):
        """Read one prompt -> a copy of its cache, for later prompts. cache: that of its first ids,
        which are not read again; it is changed. At least one id must be left, since reading it
        gives the logits."""
        if cache is None:
            start = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            cache = self.model.new_cache(start)
        rest = torch.tensor([prompt[cache.length:]], device=self.model.device)      # (1, T)
        logits = self.read(rest, cache)
        copy = cache.first(cache.length)        # the batch appends to the cache itself
        self.add(cache, logits)
        return copy

    def add(self, cache, logits):
        if self.cache is None:
            self.cache, self.logits = cache, logits
        else:
            self.cache.join(cache)
            self.logits = torch.cat([self.logits, logits])

    def step(self, next_ids, indices):
        """Continue only the sequences at these indices. next_ids (B,): the next id of every
        sequence of the batch, also of those that leave now."""
        if not indices:
            self.cache = None
            return
        if len(indices) < len(next_ids):
            self.cache.select(indices)
            next_ids = next_ids[indices]
        self.logits = self.read(next_ids[:, None], self.cache)                      # (B, V)


def pad_left(prompts, device):
    """Prompts -> input_ids (B, T), and the position at which each prompt starts (B, 1)."""
    T = max(map(len, prompts))
    # any id will do for padding, since no token attends to it
    padded = [[prompt[0]] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(padded, device=device)                         # (B, T)
    return input_ids, torch.tensor([[T - len(prompt)] for prompt in prompts], device=device)
