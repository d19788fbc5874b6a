"""This checkpoint stores its experts in a format that the package transformers-moe-offload reads.

Transformers runs this file where a model is loaded with `trust_remote_code=True`; all it does is to look for the
package. The model itself is one of Transformers' own classes.
"""

import transformers

try:
    import transformers_moe_offload  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the experts of this checkpoint are quantized in a format of transformers-moe-offload, which is not installed; "
        "run `pip install transformers-moe-offload`, and `import transformers_moe_offload` before you load the model"
    ) from error


def _placeholder_for(auto_class):
    """What an Auto class finds in place of a model class: itself, without remote code."""

    class Placeholder:
        @staticmethod
        def register_for_auto_class(auto_class):
            pass

        @staticmethod
        def from_pretrained(*args, **kwargs):
            return auto_class.from_pretrained(*args, **kwargs | {"trust_remote_code": False})

        @staticmethod
        def _from_config(config, **kwargs):
            return auto_class.from_config(config, **kwargs | {"trust_remote_code": False})

    return Placeholder


AutoModel = _placeholder_for(transformers.AutoModel)
AutoModelForCausalLM = _placeholder_for(transformers.AutoModelForCausalLM)
AutoModelForImageTextToText = _placeholder_for(transformers.AutoModelForImageTextToText)
AutoModelForSeq2SeqLM = _placeholder_for(transformers.AutoModelForSeq2SeqLM)
AutoModelForSequenceClassification = _placeholder_for(transformers.AutoModelForSequenceClassification)
AutoModelForTokenClassification = _placeholder_for(transformers.AutoModelForTokenClassification)
