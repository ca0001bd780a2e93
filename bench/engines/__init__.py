"""Other engines than our own runtime, driven from outside: each in an environment of its own."""
