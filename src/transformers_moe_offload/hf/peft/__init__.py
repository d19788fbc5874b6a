"""LoRA on routed experts through PEFT, whose files and calls stay what they are.

PEFT is optional, and is only imported below here and in `training`.
"""
