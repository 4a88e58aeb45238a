"""Where passages for a question come from."""
