"""The values of planned tensors: blocks of experts, and everything else merged from several models."""
