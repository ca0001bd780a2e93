"""Our runtime beside its peers: other ways to run the same model on the same two CPU workers, in interleaved rounds."""
