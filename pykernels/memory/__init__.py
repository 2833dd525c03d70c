"""What models keep for backward: the formulas, and tools that keep less."""
