"""BLIP, small: `python -m train.captioner train`, then `export`; `evaluate` measures what was exported."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from world import words
from world.scene import PATTERNS, SHAPES, SIDE

from . import crops, export
from .common import SKETCH, TEST_SEED, TRAIN_SEED, Checkpoint, Ema, Log, command_line, drawn, one_thread, rate_factor, write_json

SCENES, STEPS, BATCH, RATE = 60_000, 12_000, 64, 1e-3
HIDDEN, RECOLOURED = 0.3, 0.3
"""Share of the words that the decoder does not see in training, so that it looks at the picture and not at what usually follows; and of the
pictures that train the encoder alone, in colours without names, so that it knows a shape in any colour."""
LENGTH = 40
SHORTEST = 4
"""Tokens of the shortest caption: `min_length` 5 as transformers counts it."""
PAD, UNKNOWN, CLS, SEP, MASK, START = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"
FOLDER = SKETCH / "captioner"


def tokenizer_of(texts: list[str]) -> Tokenizer:
    """BERT's kind of word pieces: the world's words whole but for one, all else by letters.

    BLIP is asked for four tokens at least, and "a red background" has three words: `background` is two pieces.
    """
    seen = {w for t in texts for w in t.split()} - {"background"}
    letters = [chr(c) for c in range(33, 127)]
    pieces = [PAD, UNKNOWN, CLS, SEP, MASK, START] + sorted({*letters, *seen, "back"}) + ["##" + c for c in letters] + ["##ground"]
    tokenizer = Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([PAD, UNKNOWN, CLS, SEP, MASK, START])
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    ids = {t: tokenizer.token_to_id(t) for t in (CLS, SEP)}
    tokenizer.post_processor = processors.BertProcessing((SEP, ids[SEP]), (CLS, ids[CLS]))
    return tokenizer


def make(tokenizer: Tokenizer) -> BlipForConditionalGeneration:
    # The default initializer_range of 1e-10 is for weights that are loaded.
    vision = BlipVisionConfig(
        hidden_size=144, intermediate_size=432, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=8, initializer_range=0.02,
    )
    text = BlipTextConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=128, encoder_hidden_size=144, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, bos_token_id=tokenizer.token_to_id(START),
        eos_token_id=tokenizer.token_to_id(SEP), sep_token_id=tokenizer.token_to_id(SEP), pad_token_id=tokenizer.token_to_id(PAD), is_decoder=True, use_cache=True,
    )
    return BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def encode(tokenizer: Tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that start with [DEC] and end with [SEP], padded to the longest, and where they are real."""
    rows = [[tokenizer.token_to_id(START), *tokenizer.encode(c, add_special_tokens=False).ids, tokenizer.token_to_id(SEP)][:LENGTH] for c in captions]
    longest = max(map(len, rows))
    pad = tokenizer.token_to_id(PAD)
    ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return ids, mask


def train() -> None:
    one_thread(1)
    data = drawn(TRAIN_SEED, SCENES)
    rng = np.random.default_rng(0)
    # Every word of the world, the withheld combinations' single words among them.
    tokenizer = tokenizer_of([words.caption(data.view(i), form) for i in range(3000) for form in range(words.FORMS)] + ["a red shape"])
    model = make(tokenizer)
    heads = nn.Linear(model.config.vision_config.hidden_size, sum(crops.KINDS))
    parameters = [*model.parameters(), *heads.parameters()]
    print({"vision": sum(p.numel() for p in model.vision_model.parameters()), "text": sum(p.numel() for p in model.text_decoder.parameters())}, flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.02, betas=(0.9, 0.98))
    ema, first, checkpoint = Ema(model), 0, Checkpoint("captioner")
    if state := checkpoint.load():
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        heads.load_state_dict(state["heads"])
        ema.values, first = state["ema"], state["step"]
        rng = np.random.default_rng(first)
    log = Log()
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor(step, STEPS)
        pictures, rows, boxes = crops.batch(data, BATCH, rng)
        ids, mask = encode(tokenizer, [words.caption(data.view(i, box)) for i, box in zip(rows, boxes)])
        shown = ids[:, :-1].clone()
        shown[:, 1:][torch.from_numpy(rng.random(shown[:, 1:].shape) < HIDDEN)] = tokenizer.token_to_id(MASK)
        kinds = crops.what_is_where(data, rows, boxes, SIDE // 8)
        recoloured = torch.from_numpy(crops.some_recoloured(data, pictures, rows, kinds, RECOLOURED, rng))
        kinds = torch.from_numpy(kinds)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = model.vision_model(pixel_values=crops.pixels(pictures)).last_hidden_state
            logits = model.text_decoder(input_ids=shown, attention_mask=mask[:, :-1], encoder_hidden_states=seen, use_cache=False).logits.float()
            guesses = heads(seen[:, 1:]).float().split(crops.KINDS, dim=-1)
        where = sum(nn.functional.cross_entropy(g.flatten(0, 1), kinds[..., k].flatten()) for k, g in enumerate(guesses))
        said = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].masked_fill((mask[:, 1:] == 0) | recoloured[:, None], crops.NOTHING).flatten())
        loss = said + 0.7 * where
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update(model, step)
        log(step, said=said.item(), where=where.item())
        if (step + 1) % 500 == 0:
            checkpoint.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.values, step=step + 1, tokenizer=tokenizer.to_str(), heads=heads.state_dict())


class Vision(nn.Module):
    def __init__(self, model: BlipForConditionalGeneration):
        super().__init__()
        self.model = model.vision_model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state


class TextDecoder(nn.Module):
    """The text decoder with its self-attention's cache as plain tensors: key, value of each layer."""

    def __init__(self, model: BlipForConditionalGeneration):
        super().__init__()
        self.model, self.layers = model.text_decoder, model.config.text_config.num_hidden_layers

    def forward(self, input_ids, encoder_hidden_states, *past):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(self.layers):
            cache.self_attention_cache.update(past[2 * layer], past[2 * layer + 1], layer)
        mask = torch.ones(input_ids.shape[0], past[0].shape[2] + input_ids.shape[1], dtype=torch.int64)
        out = self.model(input_ids=input_ids, attention_mask=mask, encoder_hidden_states=encoder_hidden_states, past_key_values=cache, use_cache=True)
        present = [t for layer in cache.self_attention_cache.layers for t in (layer.keys, layer.values)]
        return (out.logits, *present)


@torch.no_grad()
def check_steps(model: BlipForConditionalGeneration, path: Path, batch: int) -> None:
    """Decodes word by word with the exported decoder's cache; stops if the model's one pass over the whole text says otherwise."""
    text, session = model.config.text_config, export.session(path)
    ids, seen = torch.randint(6, text.vocab_size, (batch, 9)), torch.randn(batch, 65, text.encoder_hidden_size)
    want = model.text_decoder(input_ids=ids, encoder_hidden_states=seen, use_cache=False).logits.numpy()
    names = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    past = [np.zeros((batch, text.num_attention_heads, 0, text.hidden_size // text.num_attention_heads), np.float32)] * len(names)
    for at in range(ids.shape[1]):
        logits, *past = session.run(None, {"input_ids": ids[:, at : at + 1].numpy(), "encoder_hidden_states": seen.numpy()} | dict(zip(names, past)))
        if not np.allclose(logits[:, 0], want[:, at], atol=1e-4):
            raise SystemExit(f"{path}: word {at} differs from the pass over the whole text by {np.abs(logits[:, 0] - want[:, at]).max()}")


def load() -> tuple[BlipForConditionalGeneration, Tokenizer]:
    state = Checkpoint("captioner").load()
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    model = make(tokenizer)
    model.load_state_dict(state["ema"])
    print("captioner after", state["step"], "steps")
    return model.eval(), tokenizer


def export_all() -> None:
    model, tokenizer = load()
    text = model.config.text_config
    n, heads, wide = 2, text.num_attention_heads, text.hidden_size // text.num_attention_heads
    export.export(Vision(model), FOLDER / "onnx/vision_model.onnx", {"pixel_values": torch.randn(n, 3, SIDE, SIDE)}, ["last_hidden_state"], {"pixel_values": {0: "batch"}, "last_hidden_state": {0: "batch"}})
    names = [f"{i}.{kind}" for i in range(text.num_hidden_layers) for kind in ("key", "value")]

    def inputs(batch: int, tokens: int, past: int) -> dict[str, torch.Tensor]:
        values = {"input_ids": torch.randint(6, text.vocab_size, (batch, tokens)), "encoder_hidden_states": torch.randn(batch, 65, text.encoder_hidden_size)}
        return values | {f"past_key_values.{name}": torch.randn(batch, heads, past, wide) for name in names}

    dynamic = {"input_ids": {0: "batch", 1: "tokens"}, "encoder_hidden_states": {0: "batch"}, "logits": {0: "batch", 1: "tokens"}}
    dynamic |= {f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names} | {f"present.{name}": {0: "batch", 2: "total"} for name in names}
    path = FOLDER / "onnx/text_decoder_model.onnx"
    export.export(TextDecoder(model), path, inputs(2, 3, 5), ["logits", *(f"present.{name}" for name in names)], dynamic)
    for batch, tokens, past in [(1, 1, 0), (3, 1, 4), (8, 2, 7), (1, 5, 0)]:
        export.check(TextDecoder(model), path, inputs(batch, tokens, past))
        check_steps(model, path, batch)
    for batch in (1, 3, 8):
        export.check(Vision(model), FOLDER / "onnx/vision_model.onnx", {"pixel_values": torch.randn(batch, 3, SIDE, SIDE)})
    config = model.config.to_dict() | {"architectures": ["BlipForConditionalGeneration"]}
    write_json(FOLDER / "config.json", config)
    write_json(FOLDER / "generation_config.json", {k: getattr(text, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"max_new_tokens": 32})
    write_json(FOLDER / "preprocessor_config.json", {"image_processor_type": "BlipImageProcessor", **crops.PREPROCESSOR, "do_convert_rgb": True})
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    write_json(FOLDER / "tokenizer_config.json", {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64, "bos_token": START, "sep_token": SEP, "pad_token": PAD, "unk_token": UNKNOWN, "cls_token": CLS, "mask_token": MASK,
    })


class Captioner:
    """The exported model, decoding greedily as the captioner service does."""

    def __init__(self):
        self.vision, self.decoder = export.session(FOLDER / "onnx/vision_model.onnx"), export.session(FOLDER / "onnx/text_decoder_model.onnx")
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self.past = [i for i in self.decoder.get_inputs() if i.name.startswith("past")]

    def __call__(self, pictures: np.ndarray, longest: int = 32) -> list[str]:
        seen = self.vision.run(None, {"pixel_values": crops.pixels(pictures).numpy()})[0]
        n, end = len(pictures), self.tokenizer.token_to_id(SEP)
        past = [np.zeros((n, p.shape[1], 0, p.shape[3]), np.float32) for p in self.past]
        ids, said, ended = np.full((n, 1), self.tokenizer.token_to_id(START)), [[] for _ in range(n)], np.zeros(n, bool)
        for made in range(longest):
            logits, *past = self.decoder.run(None, {"input_ids": ids, "encoder_hidden_states": seen} | {p.name: v for p, v in zip(self.past, past)})
            if made < SHORTEST:
                logits[:, :, end] = -np.inf
            ids = logits[:, -1:].argmax(-1)
            ended |= ids[:, 0] == end
            for row in np.flatnonzero(~ended):
                said[row].append(int(ids[row, 0]))
            if ended.all():
                break
        return [self.tokenizer.decode(s) for s in said]


def evaluate(count: int = 2000) -> dict[str, float]:
    """Share of captions with all colour, pattern and shape words right (the sizes may differ), on scenes that training never saw."""
    captioner, rng = Captioner(), np.random.default_rng(9)
    data = drawn(TEST_SEED, count, withheld=True)
    right: dict[str, list[bool]] = {}
    wrong = []
    for kind in ("whole", "crop"):
        for start in range(0, count, 50):
            pairs = [crops.sample(data, i, rng, whole=float(kind == "whole"), blur=0.0) for i in range(start, min(start + 50, count))]
            for (_, box), said, i in zip(pairs, captioner(np.stack([p for p, _ in pairs])), range(start, count)):
                view = data.view(i, box)
                want = words.caption(view)
                same = parse(said) == parse(want)
                withheld = any(c.is_withheld() for c in words.concepts_of(view))
                right.setdefault(kind + (", withheld combinations" if withheld else ""), []).append(same)
                if not same:
                    wrong.append((kind, want, said))
    for w in wrong[:20]:
        print(*w, sep=" | ")
    figures = {k: float(np.mean(v)) for k, v in right.items()}
    for k, v in figures.items():
        print(f"captioner, {k}: {100 * v:.1f} % of {len(right[k])}")
    return figures


_PATTERN = "|".join(PATTERNS)
_BACKGROUND = re.compile(rf"\ba background of (\w+) ({_PATTERN})|\ban? (\w+) background\b")
_THING = re.compile(rf"\ban? (?:small |large )?(\w+) ({'|'.join(SHAPES)}|shape)(?: with ({_PATTERN}))?\b")


def parse(caption: str) -> tuple:
    """What a caption says: the background's colour and pattern, and each thing's colour, shape and pattern; not sizes, order or sentence form."""
    background = [(c or plain, p) for c, p, plain in _BACKGROUND.findall(caption)]
    things = _THING.findall(_BACKGROUND.sub("", caption))
    return background, sorted(things)


if __name__ == "__main__":
    command_line(__doc__, train=train, export=export_all, evaluate=evaluate)
