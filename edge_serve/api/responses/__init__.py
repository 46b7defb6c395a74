"""OpenAI's Responses API on the server's one way to answer."""
