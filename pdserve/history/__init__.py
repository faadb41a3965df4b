"""What happened, event by event: recorded by every process, checked and drawn afterwards."""
