"""Who makes the runs: a queue, workers of this machine, schedulers of others."""
