"""LoRA on routed experts through PEFT; its files and calls stay the same.

PEFT is optional, and is only imported in this folder and in `training`.
"""
