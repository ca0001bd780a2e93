"""The schedule as a discrete-event simulation, and the metrics that follow from it."""
