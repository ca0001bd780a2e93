"""One study among several processes, in a database."""
