"""Looking into models: what flows inside, and what comes of changing it."""
