"""What every engine's host is made of: it runs under the engine's Python, and imports nothing of pipetune."""
