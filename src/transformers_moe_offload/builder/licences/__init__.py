"""Licences of sources, and of what is made of them."""

from transformers_moe_offload.builder.licences.verdict import Licence, Verdict, judged, licence_of, verdict_of

__all__ = ["Licence", "Verdict", "judged", "licence_of", "verdict_of"]
