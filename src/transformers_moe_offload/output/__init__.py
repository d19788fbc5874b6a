"""Folders with checkpoints that are being written: claimed, resumed after a kill, whole or not there."""
