"""What every process does at its edge: channels, metrics, logs."""
