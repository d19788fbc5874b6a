"""The ways to compute a sparse layer, one file each."""
