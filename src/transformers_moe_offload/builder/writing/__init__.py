"""A checkpoint in its folder: weight files, figures, model card, and what an interrupted build is resumed by."""
