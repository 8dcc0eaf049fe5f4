import json

import pytest
from tokenizers import Tokenizer

from zamba2_jax.text.frame import encode_documents, frame_of
from zamba2_jax.text.vocabulary import BOS, EOS, PAD, save_tokenizer, train_tokenizer

TEXTS = ["the cat and the hat and the bat " * 3, "def f(x):\n    return x + 1\n" * 3]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def test_round_trip_of_any_text(tokenizer):
    for text in (*TEXTS, "déjà vu \u2019 \U0001f600\n\t  \x00", " leading and trailing "):
        (tokens,) = encode_documents(tokenizer, [text], frame_of(tokenizer))
        assert tokens[0] == BOS
        assert tokens[-1] == EOS
        assert not {PAD, BOS, EOS} & set(tokens[1:-1].tolist())
        assert tokenizer.decode(tokens.tolist()) == text
        assert tokenizer.encode(text) == tokens[:-1].tolist()


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 280
    assert [tokenizer.backend.id_to_token(i) for i in (PAD, BOS, EOS)] == ["<pad>", "<bos>", "<eos>"]
    assert len(tokenizer.encode(" the")) == 2


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS, 280).backend.to_str() == tokenizer.backend.to_str()


def test_saved_file_is_read_by_tokenizers(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == tokenizer.backend.to_str()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<bos>"
    assert len(list(tmp_path.iterdir())) == 2


def test_saved_file_is_read_by_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0])
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (PAD, BOS, EOS)


@pytest.mark.parametrize(("size", "message"), [(258, "at least 259"), (100_000, "expected vocab_size=100000")])
def test_vocab_size_that_cannot_be(size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TEXTS, size)
