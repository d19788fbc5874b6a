"""What is written, decided before anything is: which container, which tensors, and what each consists of."""

from transformers_moe_offload.builder.plan.plan import BuildPlan, plan_build

__all__ = ["BuildPlan", "plan_build"]
