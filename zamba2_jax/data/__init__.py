"""What models learn from: documents, token files and synthetic tasks, packed into batches of rows."""
