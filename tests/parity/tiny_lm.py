"""Language models of a few thousand random weights in each published layout: `python tests/parity/tiny_lm.py` makes
services/summarizer/tests/fixtures/tiny anew, and what transformers answers. They share the sketch suite's tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from asking import ROOT, answer, simplify, summarize

from recipes.causal_lm import write_causal_lm  # noqa: E402

TINY = ROOT / "services/summarizer/tests/fixtures/tiny"


def model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=0, pad_token_id=0, initializer_range=1.0,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def merged(whole: onnx.ModelProto) -> onnx.ModelProto:
    """As optimum merges: one branch for no cache and one for a cache, over the same weights."""
    graph, branches = whole.graph, []
    outside = {value.name for value in [*graph.input, *graph.initializer]} | {""}
    for which in ("no_past", "past"):
        branch = helper.make_graph(list(graph.node), which, [], list(graph.output))
        for node in branch.node:
            node.name = f"{which}/{node.name}"
            node.input[:] = [name if name in outside else f"{name}/{which}" for name in node.input]
            node.output[:] = [f"{name}/{which}" for name in node.output]
        for output in branch.output:
            output.name = f"{output.name}/{which}"
        branches.append(branch)
    branch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    node = helper.make_node("If", ["use_cache_branch"], [o.name for o in graph.output], else_branch=branches[0], then_branch=branches[1])
    made = helper.make_graph([node], "merged", [*graph.input, branch], list(graph.output), list(graph.initializer))
    return helper.make_model(made, opset_imports=list(whole.opset_import), ir_version=whole.ir_version)


def renamed(whole: onnx.ModelProto) -> onnx.ModelProto:
    """Other names for everything that goes in and out, as genai_config.json may say."""
    def other(name: str) -> str:
        for before, after in (("past_key_values.", "cache/in/"), ("present.", "cache/out/"), ("input_ids", "tokens"), ("logits", "scores")):
            name = name.replace(before, after) if name.startswith(before) else name
        return name

    for value in [*whole.graph.input, *whole.graph.output]:
        value.name = other(value.name)
    for node in whole.graph.node:
        node.input[:], node.output[:] = [other(n) for n in node.input], [other(n) for n in node.output]
    return whole


def without_past(whole: onnx.ModelProto) -> onnx.ModelProto:
    """No cache: an empty one is put in its place."""
    graph = whole.graph
    for value in [v for v in graph.input if v.name.startswith("past")]:
        heads, width = (value.type.tensor_type.shape.dim[i].dim_value for i in (1, 3))
        graph.initializer.append(helper.make_tensor(value.name, TensorProto.FLOAT, [1, heads, 0, width], []))
        graph.input.remove(value)
    for value in [v for v in graph.output if v.name.startswith("present")]:
        graph.output.remove(value)
    return whole


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/sketch/summarizer")
    tiny = model(len(tokenizer))
    shutil.rmtree(TINY, ignore_errors=True)
    TINY.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        write_causal_lm(tiny, tokenizer, Path(folder), "random weights")
        file = Path(folder) / "onnx/model.onnx"
        for name in ("config.json", "generation_config.json"):
            shutil.copyfile(Path(folder) / name, TINY / name)
        whole = onnx.load(str(file))
        onnx.save(whole, str(TINY / "external.onnx"), save_as_external_data=True, location="weights", size_threshold=64)
        onnx.save(merged(onnx.load(str(file))), str(TINY / "merged.onnx"))
        onnx.save(renamed(onnx.load(str(file))), str(TINY / "renamed.onnx"))
        onnx.save(without_past(onnx.load(str(file))), str(TINY / "without_past.onnx"))
        onnx.save(convert_float_to_float16(onnx.load(str(file))), str(TINY / "fp16.onnx"))
        quantize_dynamic(str(file), str(TINY / "int8.onnx"))
    cases = []
    for messages in (simplify("a large red circle"), summarize(["a red star", "a red ring on a blue background"])):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids, margins = answer(tiny, tokenizer(prompt, add_special_tokens=False).input_ids, {0}, prompt, 0.0, 0, 0, 12)
        cases.append({"content": messages[-1]["content"], "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(), "closest": min(margins)})
    (TINY / "answers.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
    print(cases, *(f"{p.name} {p.stat().st_size}" for p in sorted(TINY.iterdir())), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
