from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from lragent.errors import UserError
from lragent.runtime import TokenizerFile


def test_a_tokenizer_file_round_trips_text_and_knows_its_special_ids(tmp_path: Path) -> None:
    fast = FastTokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens(["<eos>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TokenizerFile(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a b a", add_special_tokens=False) == [1, 2, 1]
    assert tokenizer.decode([1, 2, 0], skip_special_tokens=True) == "ab"
    assert tokenizer.special_ids == {0}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.json"):
        TokenizerFile(tmp_path / "nothing.json")
