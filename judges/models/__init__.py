"""Models behind one interface: Anthropic, OpenAI, local."""
