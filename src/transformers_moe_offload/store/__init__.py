"""Where every expert is: its bytes in the files, its record, and the tier in RAM."""
