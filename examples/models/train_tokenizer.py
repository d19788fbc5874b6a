"""Train the byte-level BPE tokenizer shared by every model here, and write each domain as one array of token ids.

Reads `texts.json` of `corpus.py`. Every byte is a token, so any text round-trips exactly.

    python train_tokenizer.py --work DIR   # writes DIR/tokenizer, DIR/tokens/DOMAIN-SPLIT.npy, manifest.json
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
CONTEXT = 512
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE tokens; ids 0, 1, 2 are bos, eos, pad, none of them added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,  # rulers of dashes and blanks would otherwise take hundreds of places
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def packed(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts one after the other, each as `bos text eos` -> (N,) uint16."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([bos, *ids, eos], dtype=np.uint16) for ids in encoded])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder of corpus.py")
    work = parser.parse_args().work
    texts = json.loads((work / "texts.json").read_text())
    tokenizer = trained_tokenizer([text for domain in texts.values() for text in domain["train"]])
    tokenizer.save_pretrained(work / "tokenizer")
    (work / "tokens").mkdir(exist_ok=True)
    manifest: dict[str, dict[str, dict[str, int | str]]] = {}
    for domain, splits in texts.items():
        for split, files in splits.items():
            ids = packed(tokenizer, files)
            np.save(work / "tokens" / f"{domain}-{split}.npy", ids)
            manifest.setdefault(domain, {})[split] = {
                "files": len(files),
                "bytes": sum(len(text.encode()) for text in files),
                "tokens": len(ids),
                "sha256": hashlib.sha256("\0".join(files).encode()).hexdigest(),
            }
            print(domain, split, manifest[domain][split])
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
