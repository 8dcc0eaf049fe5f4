"""Writing with a model: prefill, steps, sampling, and many requests at once."""
