"""Files of requests in OpenAI's batch format: read them, order them, answer every line once; no HTTP and no engine."""
