import pytest

from zamba2_jax.data.corpus import Document, code, held_out_code, prose, split_held_out, tokenize_embedded_corpus
from zamba2_jax.text.vocabulary import BOS, EOS


def paragraphs(documents):
    return [paragraph for document in documents for paragraph in document.text.split("\n\n")]


def test_prose_is_running_text_without_repetition():
    documents = prose()
    assert 200_000 < sum(document.size for document in documents) < 600_000
    every = paragraphs(documents)
    assert len(every) == len(set(every))
    assert all("::=" not in paragraph and ">>>" not in paragraph and "\n" not in paragraph for paragraph in every)
    words = " ".join(every).split()
    assert sum(word.strip('".,;:()*').isalpha() for word in words) > 0.8 * len(words)


def test_held_out_prose_is_in_no_training_text():
    train, held_out = split_held_out(prose(), 0.1)
    assert not set(paragraphs(train)) & set(paragraphs(held_out))
    source = "\n".join(document.text for document in code())
    assert not any(" ".join(paragraph.split()) in source for paragraph in paragraphs(held_out))


def test_held_out_code_is_in_no_training_file():
    training, held_out = ({document.name for document in documents} for documents in (code(), held_out_code()))
    assert 30_000 < sum(document.size for document in held_out_code()) <= 60_000
    assert not training & held_out


def test_code_is_bounded_and_without_tests():
    documents = code(max_size=100_000)
    assert 50_000 < sum(document.size for document in documents) <= 100_000
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert all(name.endswith(".py") and "test/" not in name and "pydoc_data" not in name for name in names)
    assert documents == code(max_size=100_000)


def test_split_takes_whole_documents_by_share():
    documents = [Document(f"d{i}", "x" * 100) for i in range(50)]
    train, held_out = split_held_out(documents, 0.2)
    assert len(held_out) == 10
    assert sorted(train + held_out) == sorted(documents)
    assert (train, held_out) == split_held_out(documents, 0.2)
    assert held_out != documents[:10]


def test_split_holds_out_something_even_where_the_share_is_small():
    train, held_out = split_held_out([Document("a", "xx"), Document("b", "x")], 0.01)
    assert [document.name for document in train + held_out] == ["a", "b"]


@pytest.mark.parametrize(
    ("documents", "share", "message"),
    [([Document("a", "x")], 0.5, "1 documents"), ([Document("a", "x")] * 2, 1.0, "held-out share=1.0")],
)
def test_split_refuses(documents, share, message):
    with pytest.raises(ValueError, match=message):
        split_held_out(documents, share)


def test_tokenized_corpus():
    corpus = tokenize_embedded_corpus(512)
    assert set(corpus.train) == set(corpus.held_out) == {"code", "prose"}
    for documents in (*corpus.train.values(), *corpus.held_out.values()):
        assert all(tokens[0] == BOS and tokens[-1] == EOS and tokens.max() < 512 for tokens in documents)
    for name, documents in corpus.held_out.items():
        text = "\n\n".join(corpus.tokenizer.decode(tokens[1:-1].tolist()) for tokens in documents)
        assert len(text.encode()) == corpus.held_out_sizes[name] + 2 * (len(documents) - 1)
