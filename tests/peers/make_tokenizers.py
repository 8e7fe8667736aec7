"""Make a tokenizer's folder from its published vocabulary: make_tokenizers.py NAME FILE FOLDER.

FILE is the tiktoken file of `llama3` or `qwen2`, or the `tokenizer.model` of `gemma3`. The settings
are those of the models' repositories on the Hub.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, normalizers, processors
from transformers import GemmaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

LLAMA_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""All other special tokens, 256 in total, are reserved and numbered."""

GEMMA_SPECIAL = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3(path: str, folder: Path) -> None:
    reserved = iter(f"<|reserved_special_token_{number}|>" for number in range(256))
    special = [LLAMA_SPECIAL.get(number) or next(reserved) for number in range(256)]
    tokenizer: Tokenizer = TikTokenConverter(path, extra_special_tokens=special).converted()
    start = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A {start}:1 $B:1",
        special_tokens=[(start, tokenizer.token_to_id(start))],
    )
    write(folder, tokenizer, bos_token=start, eos_token="<|eot_id|>", model_max_length=131_072)


def qwen2(path: str, folder: Path) -> None:
    converter = TikTokenConverter(path, pattern=QWEN_PATTERN, extra_special_tokens=QWEN_SPECIAL)
    tokenizer: Tokenizer = converter.converted()
    tokenizer.model.ignore_merges = False
    tokenizer.normalizer = normalizers.NFC()
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write(folder, tokenizer, bos_token=None, **tokens, model_max_length=32_768)


def gemma3(path: str, folder: Path) -> None:
    read = GemmaTokenizer.from_pretrained(Path(path).parent, add_bos_token=True)
    tokenizer: Tokenizer = read.backend_tokenizer
    tokenizer.add_special_tokens(GEMMA_SPECIAL)
    tokens = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    write(folder, tokenizer, **tokens)


def write(folder: Path, tokenizer: Tokenizer, **config: object) -> None:
    """Write `tokenizer.json` and a configuration with which transformers reads it as it is."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    make = {"llama3": llama3, "qwen2": qwen2, "gemma3": gemma3}[sys.argv[1]]
    make(sys.argv[2], Path(sys.argv[3]))
