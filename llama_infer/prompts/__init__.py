"""Formatters: a text, a conversation or token ids in, token ids out."""
