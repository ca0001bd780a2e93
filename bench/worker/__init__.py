"""Inside a worker process: commands from the driver, and all that loads torch to answer them."""
