"""Passages for a question, and answers whose sources are checked."""
