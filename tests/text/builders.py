"""Small tokenizers of the kinds that language models have, as transformers holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "Question: who founded the town where Ada works? Plan: look up the town. Action: lookup[Town]\n"
    "Observation: the town was founded by a company. <|im_start|>user said that <tool_call> is a word.\n"
)
SPACE = "\u2581"
SPECIAL = ("<|im_start|>", "<|im_end|>")
NOT_SPECIAL = ("<tool_call>", "<think>")


def byte_level(prefix_space: bool = False, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """As GPT-2 and later: bytes are letters, merged after a split into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _held(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: a sign for a space is put before every text, unknown characters are bytes."""
    tokenizer = Tokenizer(_merged())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _held(tokenizer)


def prefix_space(scheme: str = "first") -> PreTrainedTokenizerFast:
    """As Mistral: the pre-tokeniser puts the sign for a space before a text."""
    tokenizer = Tokenizer(_merged())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _held(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As T5, with bytes: pieces with scores, special tokens among them."""
    pieces = [(piece, -10.0) for piece in _pieces()]
    pieces += [(f"{SPACE}the", -3.0), ("own", -4.0), ("<|im_end|>", -1.0), ("<think>", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE, prepend_scheme="always")])
    return _held(tokenizer)


def words() -> PreTrainedTokenizerFast:
    """Words in lower case without the spaces between them: text can't be joined from its pieces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return _held(tokenizer, unk_token="<unk>")


EXACT: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level with a prefix space": lambda: byte_level(prefix_space=True),
    "byte fallback": byte_fallback,
    "prefix space": prefix_space,
    "prefix space always": lambda: prefix_space("always"),
    "unigram": unigram,
}


def with_bos(held: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts a BOS before a text."""
    held.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", held.bos_token_id)]
    )
    return held


def _pieces() -> list[str]:
    letters = sorted(set(CORPUS) - {" ", "\n"})
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *letters]


def _merged() -> models.BPE:
    merges = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, "P"), ("<", "t"), ("|", ">")]
    vocab = {piece: index for index, piece in enumerate([*_pieces(), *(a + b for a, b in merges)])}
    return models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _held(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    held = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=list(SPECIAL), **tokens
    )
    held.add_tokens(list(NOT_SPECIAL))
    return held
