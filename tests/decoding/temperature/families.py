"""Chat templates as models have them, each with a tiny tokenizer of its kind."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

FAMILIES = {path.stem: json.loads(path.read_text()) for path in Path(__file__).with_name("templates").glob("*.json")}
NAMES = sorted(FAMILIES)


def _sentencepiece():
    """Spaces are ▁, one more stands before every text, and rare characters are bytes; as Llama 2 has it."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def _bytes():
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def tokenizer_of(family, **changes):
    """The tokenizer of a family; ``changes`` replace its fields."""
    family = family | changes
    special, bos, eos = family["special"], family["bos_token"], family["eos_token"]
    inner = _sentencepiece() if family.get("kind") == "sentencepiece" else _bytes()
    inner.add_special_tokens(special)
    if bos and bos != "<|im_start|>":
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=family.get("pad", eos), padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = family["chat_template"]
    return tokenizer
