"""Words of a text, and hashes of n words in a row."""

import functools
import hashlib
import re

import numpy as np


def words_in(text):
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


@functools.lru_cache(maxsize=1 << 18)
def word_hash(word):
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def ngram_hashes(words, n):
    """A 64-bit number for each run of n words, in order: a polynomial of the words' hashes."""
    hashes = np.fromiter(map(word_hash, words), np.uint64, len(words))
    count = max(0, len(words) - n + 1)
    ngrams = np.zeros(count, np.uint64)
    for i in range(n):
        ngrams = ngrams * np.uint64(0x9E3779B97F4A7C15) + hashes[i:i + count]      # modulo 2^64
    return ngrams
