"""The OpenAI-compatible HTTP server: translates requests for the engine and its outputs into JSON and events."""
