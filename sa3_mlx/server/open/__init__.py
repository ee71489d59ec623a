"""Speak the languages of other clients: OpenAI, DAW plug-ins, MCP."""
