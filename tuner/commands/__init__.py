"""The commands as functions of settings: what runs, and what comes of it; no flags and no printing."""
