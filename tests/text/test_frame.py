import numpy as np
import pytest
from tokenizers import processors

from tests.text.kinds import CONFIG, byte_level, chatml, gpt2, llama_model, write
from zamba2_jax.text.frame import Frame, encode_documents, frame_of
from zamba2_jax.text.tokenizer import Tokenizer, load_tokenizer
from zamba2_jax.text.vocabulary import train_tokenizer


def test_a_document_is_framed_as_the_tokenizers_files_say(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece, which is not installed")
    # Its own BOS and EOS; GPT-2's one separator on both sides; no bos where the tokenizer has none.
    assert frame_of(train_tokenizer(["the cat and the hat " * 9], 270)) == Frame((1,), (2,))
    assert frame_of(load_tokenizer(gpt2(tmp_path / "gpt2"))) == Frame((0,), (0,))
    assert frame_of(load_tokenizer(chatml(tmp_path / "chatml"))) == Frame((), (2,))
    assert frame_of(load_tokenizer(llama_model(tmp_path / "llama"))) == Frame((1,), (2,))


def test_what_the_tokenizer_puts_around_a_text_goes_before_its_names():
    backend = byte_level(["<pad>", "<s>", "</s>", "[gMASK]", "<sop>"])
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="$A $B", special_tokens=[("[gMASK]", 3), ("<sop>", 4)]
    )
    assert frame_of(Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})) == Frame((3, 4), (2,))


def test_a_source_chooses(tmp_path):
    tokenizer = load_tokenizer(chatml(tmp_path))
    assert frame_of(tokenizer, bos="<|im_start|>", eos="<|endoftext|>") == Frame((1,), (0,))
    assert frame_of(tokenizer, eos="") == Frame((), ())
    (document,) = encode_documents(tokenizer, ["a<|im_end|>"], frame_of(tokenizer, "<|im_start|>"), special_tokens=True)
    np.testing.assert_array_equal(document, [1, *tokenizer.encode("a"), 2, 2])
    assert document.dtype == np.int32


def test_without_a_word_of_the_end_the_configs_are_asked_and_then_the_user(tmp_path):
    directory = write(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    byte_level(["<a>", "<b>"]).save(str(directory / "tokenizer.json"))
    assert CONFIG["eos_token_id"] == 2
    assert frame_of(load_tokenizer(directory)) == Frame((), (2,))
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match="the tokenizer names no eos_token: expected one in"):
        frame_of(load_tokenizer(directory))
    assert frame_of(load_tokenizer(directory), eos="<b>") == Frame((), (1,))
