"""A cluster of processes on this machine: started, watched, restarted and stopped."""
