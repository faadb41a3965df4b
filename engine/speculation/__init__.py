"""Guessing the next tokens from the text so far (docs/adr/0012)."""
