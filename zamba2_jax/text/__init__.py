"""Text in, text out: tokenizers, what a document is framed by, chat templates, streams and stops."""
