"""Text: documents in, language models over bytes or tokens out, generation and long-context tests."""
