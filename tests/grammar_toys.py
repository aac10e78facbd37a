"""Vocabularies of a few letters, and what a language of a few words allows: what the tests of grammars share."""

import itertools
import re

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxinfer.decode.grammar import Grammar, Vocabulary
from tests import toy

END = 0


def vocabulary(names, merges=()):
    """A byte-level vocabulary of `names`, of which the first is the end token."""
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([names[0]])
    return Vocabulary(tokenizer.to_str(), len(names), (END,))


LETTERS = ["<end>", "a", "b", "c", "d"]
PIECES = ["<end>", "a", "b", "c", "ab", "bc", "d", "e"]


def letters():
    return vocabulary(LETTERS)


def pieces():
    """With two tokens of two letters, so that a text has several spellings."""
    return vocabulary(PIECES, [("a", "b"), ("b", "c")])


def words(pattern, longest, alphabet="abcd"):
    """All words of the language up to a length, by trying every one."""
    every = ("".join(w) for n in range(longest + 1) for w in itertools.product(alphabet, repeat=n))
    return [word for word in every if re.fullmatch(pattern, word)]


def allowed(language, prefix, names):
    """The ids that may follow `prefix`: those that lead to a word, and the end after a whole one."""
    out = {i for i, name in enumerate(names) if i != END and any(w.startswith(prefix + name) for w in language)}
    return out | {END} if prefix in language else out


def bits(row, size):
    """The ids whose bit is set in one slot's words."""
    return {i for i in range(size) if int(row[i >> 5]) >> (i & 31) & 1}


def mask_of(matcher, size):
    """The ids that `matcher` allows next."""
    row = np.zeros((1, -(-size // 32)), np.uint32)
    matcher.fill(row, [], [], [])
    return bits(row[0], size)


def regex(vocabulary, pattern):
    return vocabulary.matcher(Grammar.regex(pattern))


def prompts(batch, width, vocab, seed=0):
    """Ragged prompts of a repeated phrase, one of a single token."""
    tokens, _ = toy.prompts(seed, batch, 3, vocab)
    tokens = jnp.tile(tokens, (1, -(-width // 3)))[:, :width]
    lengths = np.random.default_rng(seed).integers(2, width + 1, batch)
    lengths[0] = 1
    return tokens, jnp.asarray(lengths, jnp.int32)
