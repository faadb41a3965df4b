"""The production machines under a virtual clock."""
