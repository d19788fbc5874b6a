"""Read untrusted text within bounds; every fault in it raises one error of ours."""

from transformers_moe_offload.untrusted.json_text import json_file, json_object, parse_json
from transformers_moe_offload.untrusted.messages import one_line, quoted, reading, system_words
from transformers_moe_offload.untrusted.yaml_text import parse_yaml

__all__ = ["json_file", "json_object", "one_line", "parse_json", "parse_yaml", "quoted", "reading", "system_words"]
