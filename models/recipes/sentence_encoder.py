"""An encoder of sentences: `python -m recipes.sentence_encoder FOLDER --name sentence-transformers/all-mpnet-base-v2`.

Writes model.onnx, which gives the last hidden state of each token (what BERTScore compares, and what sentence-transformers pools), the configuration, the
tokenizer, how sentence-transformers pools where the model says so, and manifest.json; runs the file beside the library's model. --name is a model's name or a
folder; `--layer` takes the states after another layer, as BERTScore does (roberta-large: 17).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from train import export

from .layout import write_manifest

POOLING = ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]


class Encoder(torch.nn.Module):
    def __init__(self, model: PreTrainedModel, layer: int | None):
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *token_types: torch.Tensor) -> torch.Tensor:
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=self.layer is not None, **dict(zip(["token_type_ids"], token_types)),
        )
        return out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]


def _padded(tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    made = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in made}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.sentence_encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--name", required=True, help="the model's name, or its folder")
    parser.add_argument("--layer", type=int, help="the states after this layer; the last by default")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.name)
    model = AutoModel.from_pretrained(given.name, dtype=torch.float32, attn_implementation="eager").eval()
    encoder, file = Encoder(model, given.layer), given.folder / "model.onnx"
    inputs = _padded(tokenizer, ["a red circle", "two dogs playing in the snow, and a third"])
    dynamic = {name: {0: "batch", 1: "tokens"} for name in (*inputs, "last_hidden_state")}
    export.export(encoder, file, inputs, ["last_hidden_state"], dynamic)
    for texts in (["one"], ["a picture", "a much longer description of a picture, with a comma", "2"]):
        export.check(encoder, file, _padded(tokenizer, texts))
    model.config.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)
    for name in POOLING:
        if found := cached_file(given.name, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False):
            (given.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(found, given.folder / name)
    write_manifest(given.folder, "a folder" if Path(given.name).exists() else given.name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
