"""The operator's command line and the launchers."""
