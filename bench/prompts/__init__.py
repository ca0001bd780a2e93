"""Prompts as people give them, and the token ids that they become; without torch."""
