"""Running a model: block pool, prefix cache, step plans; ``device/`` is all that needs torch."""
