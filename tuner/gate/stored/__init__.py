"""Gates against stored sessions, where the baseline cannot run any more."""
