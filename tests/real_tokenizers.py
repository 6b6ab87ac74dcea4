"""Tokenizers of every common kind, trained in-process on a few sentences; real classes, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from analyses.tasks import docstring, greater_than, ioi
from analyses.tasks import laundry_list as laundry
from analyses.tasks.two_hop import questions

ANSWERS = ("Paris", "Rome", "Madrid", "London", "Berlin", "Vienna", "Spanish", "French", "euro", "Asia", "Europe")
_WORDS = " ".join(
    (*ANSWERS, *ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS, *laundry.ITEMS, *laundry.NAMES, *docstring.WORDS, *greater_than.EVENTS)
)  # fmt: skip
TEXTS = [
    *[_WORDS] * 30,
    *[f"{word} and {word}" for word in _WORDS.split()] * 10,
    *[question.prompt for question in questions()],
    'The capital city of France is Paris. He said: " Rome " ( Madrid ) .',
    "from the year to the year 0 1 2 3 4 5 6 7 8 9 def run(self, a): :param",
] * 2
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def _fast(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )  # fmt: skip


def byte_level(prefix: bool = False) -> Any:
    """As GPT-2."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )  # fmt: skip
    return _fast(backend)


def metaspace(scheme: str) -> Any:
    """SentencePiece BPE through a Metaspace pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=1500, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    return _fast(backend)


def llama2() -> Any:
    """SentencePiece BPE as Llama 2 comes: a normalizer that prepends and replaces, no pre-tokenizer."""
    trained = metaspace("always").backend_tokenizer
    backend = trained
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(backend)


def wordpiece() -> Any:
    """As BERT, cased."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    )
    return _fast(backend)


def unigram() -> Any:
    """As T5 or Gemma, with bytes for what it lacks."""
    first = Tokenizer(models.Unigram())
    first.pre_tokenizer = pre_tokenizers.Metaspace()
    first.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=900, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    scores = dict.fromkeys(first.get_vocab(), -5.0)
    pieces = sorted(first.get_vocab(), key=first.get_vocab().__getitem__)
    whole = [f"▁{word}" for word in dict.fromkeys(_WORDS.split()) if f"▁{word}" not in scores]
    table = [
        *[(p, 0.0 if p in SPECIAL else -5.0) for p in pieces],
        *[(w, -4.0) for w in whole],
        *[(b, -20.0) for b in BYTES],
    ]
    backend = Tokenizer(models.Unigram(table, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    return _fast(backend)


_MAKERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "byte_level_prefix": lambda: byte_level(prefix=True),
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_never": lambda: metaspace("never"),
    "llama2": llama2,
    "wordpiece": wordpiece,
    "unigram": unigram,
}
KINDS = tuple(_MAKERS)


@cache
def tokenizer_of(kind: str) -> Any:
    """The tokenizer of a kind, trained once."""
    return _MAKERS[kind]()
