"""A model that is small enough for a demo on any machine, and what Hugging Face generates with it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

PROMPT = "The quick brown fox jumps over the lazy dog."
NEW_TOKENS = 24
LAYERS = 4


def _some_english() -> str:
    """The license, which lies beside every installed copy: bytes that often follow each other become tokens."""
    text = importlib.metadata.distribution("llm_allreduce_plugin").read_text("licenses/LICENSE")
    return text if text is not None else str(__doc__)


def make_model(folder: Path) -> None:
    """A small Llama, 256 wide, with weights from a fixed seed and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([_some_english()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)  # noqa: S106

    torch.manual_seed(22)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.3,  # wide, so that the most likely token leads by more than rounding
    )
    LlamaForCausalLM(config).to(torch.float32).eval().save_pretrained(folder)


def reference_tokens(folder: Path, text: str = PROMPT) -> list[int]:
    """What Hugging Face generates greedily from the same weights, as token ids without the prompt's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1
        )
    return [int(token) for token in output[0, prompt.shape[1] :]]
