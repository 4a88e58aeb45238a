"""The Sanic application: OpenAI's shapes, conversations, search and the page."""
