"""Predict which experts come next, and load them before they are asked for."""
