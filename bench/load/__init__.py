"""Requests that come over time: when they come, from where that is known, and which of them is worked on next."""
