"""Dense transformers (Llama, arXiv:2302.13971; Mistral, arXiv:2310.06825): architecture, files, weights and model."""
