"""Serving pruned models with vLLM, which loads this room as a plugin; nothing else imports it."""
