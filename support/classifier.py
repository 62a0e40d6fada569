"""A classifier of texts, as fastText is one (arXiv 1607.01759)."""

import numpy as np
import torch

from support.ngrams import ngram_hashes, words_in


class Classifier(torch.nn.Module):
    """The mean of the embeddings of a text's words and pairs of words, then one linear layer."""

    def __init__(self, names, buckets=1 << 18, size=16):
        super().__init__()
        self.names, self.buckets = list(names), buckets
        self.embedding = torch.nn.EmbeddingBag(buckets, size, mode="mean")
        self.linear = torch.nn.Linear(size, len(self.names))
        with torch.no_grad():
            values = np.random.default_rng(0).uniform(-1 / size, 1 / size, (buckets, size))
            self.embedding.weight.copy_(torch.from_numpy(values))
            self.linear.weight.zero_()
            self.linear.bias.zero_()

    def features(self, text):
        """The hashed words and pairs of words of the first 10,000 characters, as bucket numbers."""
        words = words_in(text[:10_000])
        hashes = np.concatenate([ngram_hashes(words, 1), ngram_hashes(words, 2)])
        return (hashes % np.uint64(self.buckets)).astype(np.int64)

    def forward(self, features):
        """Features of B texts -> logits (B, names)."""
        lengths = list(map(len, features))
        offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)                        # (B,)
        return self.linear(self.embedding(torch.from_numpy(np.concatenate(features)), offsets))

    def fit(self, texts, named, epochs=6, lr=0.02, batch=32):
        """Learn from texts and their names -> self. The same texts give the same classifier."""
        features = [self.features(text) for text in texts]
        targets = torch.tensor([self.names.index(name) for name in named])
        optimizer = torch.optim.Adam(self.parameters(), lr)
        for epoch in range(epochs):
            order = np.random.default_rng([1, epoch]).permutation(len(texts))
            for start in range(0, len(order), batch):
                chosen = order[start:start + batch]
                loss = torch.nn.functional.cross_entropy(self([features[i] for i in chosen]),
                                                         targets[torch.from_numpy(chosen)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self

    @torch.no_grad()
    def predict(self, texts):
        """Probabilities (texts, names)."""
        parts = [self([self.features(text) for text in texts[start:start + 256]]).softmax(-1)
                 for start in range(0, len(texts), 256)]
        return torch.cat(parts).numpy()


def auc(scores, positive):
    """The chance that a positive has a higher score than a negative, ties counting half."""
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]       # 1 for the lowest, ties shared
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n))
