"""Logits processors: what changes the scores before a token is chosen."""
