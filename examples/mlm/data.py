"""The text, its vocabulary, and masked batches.

The text is the King James Bible (1611, public domain) as Debian's package bible-kjv prints it, or any
plain-text file. Words and punctuation marks are tokens; the commonest ones make the vocabulary.
"""

import collections
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np

PAD, UNK, MASK, BEGIN = 0, 1, 2, 3
SPECIAL = ["[PAD]", "[UNK]", "[MASK]", "[BEGIN]"]
TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[.,;:?!()]")
NOT_MASKED = -100  # PyTorch's cross entropy ignores this label


def load_text(path=None):
    """The whole text in lower case: from `path`, else from the program `bible`.

    Raises FileNotFoundError saying what to install where neither is there.
    """
    if path:
        return pathlib.Path(path).read_text(encoding="utf-8").lower()
    if not shutil.which("bible"):
        raise FileNotFoundError("no text: install Debian's package bible-kjv, or give --text FILE")
    # -l0: one verse a line, preceded by its chapter's heading or its number.
    printed = subprocess.run(
        ["bible", "-l0", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    verses = re.findall(r"^\s+\d+\s+(.*)$", printed, flags=re.MULTILINE)
    return "\n".join(verses).lower()


class Corpus:
    """Token ids of the text, cut into training and held-out sequences of `seq` tokens.

    Every tenth stretch of 50 sequences is held out, so both parts cover the whole text.
    """

    def __init__(self, text, seq, vocabulary_size):
        words = TOKEN.findall(text)
        counts = collections.Counter(words)
        self.words = SPECIAL + [w for w, _ in counts.most_common(vocabulary_size - len(SPECIAL))]
        ids = {w: i for i, w in enumerate(self.words)}
        tokens = np.array([ids.get(w, UNK) for w in words], np.int64)
        self.unknown_share = float(np.mean(tokens == UNK))

        body = seq - 1  # [BEGIN] takes the first place
        rows = tokens[: len(tokens) // body * body].reshape(-1, body)
        rows = np.concatenate([np.full((len(rows), 1), BEGIN, np.int64), rows], axis=1)
        held_out = np.arange(len(rows)) // 50 % 10 == 9
        self.train, self.held_out = rows[~held_out], rows[held_out]

        frequency = np.bincount(self.train[:, 1:].ravel(), minlength=len(self.words)).astype(float)
        self.frequency = frequency / frequency.sum()
        # What a model that knows only word frequencies reaches: the cross entropy of the held-out tokens
        # under the training text's unigram distribution (add-one smoothed).
        smoothed = (self.frequency * frequency.sum() + 1) / (frequency.sum() + len(self.words))
        self.unigram_entropy = float(-np.mean(np.log(smoothed[self.held_out[:, 1:]])))

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids if i != PAD)


def mask_tokens(tokens, generator, vocabulary_size, ratio=0.15):
    """BERT's masking (Devlin et al., 2019, section 3.1): of `ratio` of the tokens 80 % become [MASK], 10 % a
    random word, 10 % stay. Returns (input ids, labels), both shaped like `tokens`."""
    chosen = (generator.random(tokens.shape) < ratio) & (tokens >= len(SPECIAL))
    labels = np.where(chosen, tokens, NOT_MASKED)
    kind = generator.random(tokens.shape)
    masked = np.where(chosen & (kind < 0.8), MASK, tokens)
    words = generator.integers(len(SPECIAL), vocabulary_size, tokens.shape)
    return np.where(chosen & (kind >= 0.9), words, masked), labels


def batches(sequences, batch, generator):
    """Endless batches [batch, seq] in a new random order each epoch."""
    while True:
        order = generator.permutation(len(sequences))
        for start in range(0, len(order) - batch + 1, batch):
            yield sequences[order[start : start + batch]]


def perplexity(loss):
    return math.exp(min(loss, 50.0))
