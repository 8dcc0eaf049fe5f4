"""Text in, text out: tokenizers, what a document is framed by, chat templates, streams and stops."""

from zamba2_jax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
