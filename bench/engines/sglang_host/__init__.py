"""What runs under the Python that has SGLang: it imports nothing of pipetune, and nothing of it is installed there."""
