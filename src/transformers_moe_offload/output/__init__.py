"""Write checkpoints to folders: one process at a time, resumable after a kill, and complete or absent."""
