"""A tokenizer over UTF-8 bytes: ids 2..39 are pieces of text, some of them parts of one character."""

from __future__ import annotations

from collections.abc import Sequence

BOS, EOS = 0, 1
PIECES: tuple[bytes, ...] = (
    *(bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"),
    b" ",
    b"\n",
    b"\n\n",
    b"STOP",
    b"ST",
    b"OP",
    b"OPab",
    b"\xe2\x82",  # the euro sign is these two
    b"\xac",
    b"\xacST",
    "ä".encode(),
    b"ab",
)


class ToyTokenizer:
    special_ids = frozenset((BOS, EOS))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if text == "<eos>":
            return [EOS]
        rest = text.encode()
        ids = [BOS] if add_special_tokens else []
        while rest:
            known = [piece for piece in PIECES if rest.startswith(piece)]
            piece = max(known, key=len, default=b"")
            if piece:
                ids.append(piece_id(piece))
            rest = rest[max(1, len(piece)) :]  # what has no piece is left out
        return ids

    def encode_piece(self, text: str, parse_special: bool = True) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def decode_piece(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.decode(ids, skip_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        shown = [token for token in ids if token >= 2 or not skip_special_tokens]
        return b"".join(PIECES[token - 2] if token >= 2 else b"<eos>" for token in shown).decode(errors="replace")


def piece_id(piece: bytes) -> int:
    return PIECES.index(piece) + 2
