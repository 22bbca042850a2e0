"""What this machine does: seconds of steps, data and sweeps."""
