"""Text of a trajectory that began with a whole text."""

from __future__ import annotations

from collections.abc import Sequence

from lragent.text.tokenizer import Tokenizer


def trajectory_text(tokenizer: Tokenizer, tokens: Sequence[int], start: str, count: int, whole: bool) -> str:
    """The text that it began with and the pieces after it, joined.

    A text that the tokenizer changes reads as transformers decodes it, and so does a start of which some tokens are
    gone. Special tokens that the tokenizer put around the start are left out.

    Args:
        tokens: all tokens.
        start: the text that it began with.
        count: number of tokens that are left of the start.
        whole: False if some of them are gone.
    """
    if whole and tokenizer.decode_piece(tokenizer.encode_piece(start), skip_special_tokens=False) == start:
        return start + tokenizer.decode_piece(tokens[count:], skip_special_tokens=False)
    plain = tokenizer.encode(start, add_special_tokens=False)
    held = list(tokens[:count])
    lead = next(at for at in range(count + 1) if held[at:] == plain[: count - at])
    kept = plain if whole else held[lead:]
    if not kept:
        return tokenizer.decode_piece(tokens[count:], skip_special_tokens=False)
    return tokenizer.decode([*kept, *tokens[count:]], skip_special_tokens=False)
