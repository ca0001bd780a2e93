"""The history of studies: what nights measured, metric by metric, and where a level changed."""
