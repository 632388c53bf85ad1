"""Train a small BLIP-2 and a small CLIP, of transformers' own classes, on the small world.

    python -m emilie_min.insert.train_words blip2 weights/toy-blip2                   # 20 minutes of a core
    python -m emilie_min.insert.train_words clip weights/toy-clip-captions --eyes weights/toy-blip2          # 7 more
    python -m emilie_min.insert.train_words clip weights/toy-clip --weights weights/toy-clip-captions --instructions 1

The second CLIP has seen instructions as well as captions; 10 minutes. With `--weights` each goes on, as the third does.

BLIP-2 learns to caption scenes and insets. CLIP has two losses: softmax both ways between the pictures and captions of
a batch, and a balanced sigmoid loss on claims (`words`): since everything that is true of a scene is known, every text
is right or wrong of every picture. A batch of CLIP's is of threes: a scene, what an instruction makes of it, and what
another instruction would have made.

A scaffold, which is not kept, asks each patch of the vision transformer what it belongs to: of that it can learn from
the first step on. CLIP starts from BLIP-2's eyes (`--eyes`), which are all but the same network.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..toy import words, world

FIRST_SEED, UNSEEN = 4 * 10**9, 60_000_000  # training's first seed, and evaluation's
SIDE, PATCH, WIDTH, QUERIES, POSITIONS = world.SIZE, 8, 96, 8, 48
PAD, UNK, BOS, EOS, IMAGE = range(5)  # EOS must not be 2: CLIP takes the highest id for a text's end where it is
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
SHAPES, COLOURS, BACKGROUNDS = list(world.SHAPES), list(world.COLOURS), list(world.BACKGROUNDS)
PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
THREES, CAPTIONS = 24, 48  # of a batch of CLIP's, and pictures of one of BLIP-2's
DECAY, WARM_UP, FLOOR = 0.995, 200, 0.02  # of the average of weights; steps; the learning rate's last share

Batch = Callable[[int], dict[str, Tensor]]  # a step's number -> losses


# ---- words, networks and processors, in the hub's file format


def tokenizer(end: bool):
    """The world's words; end: of CLIP's texts, which close with </s>, as a language model's prompt must not."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate((*SPECIAL, *world.CAPTION_VOCABULARY))}
    made = Tokenizer(models.WordLevel(known, "<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special, single = [("<s>", BOS), ("</s>", EOS)], "<s> $A </s>" if end else "<s> $A"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, model_max_length=POSITIONS)


IDS = {"vocab_size": len(SPECIAL) + len(world.CAPTION_VOCABULARY)}
IDS |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def new_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    body = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = {**body, **IDS, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
    vision = {**body, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def new_blip2() -> nn.Module:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    body = {"hidden_size": WIDTH, "num_attention_heads": 4}
    vision = {**body, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH}
    vision["initializer_range"] = 0.02  # its default, 1e-10, is for weights that are loaded
    former = {**body, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "cross_attention_frequency": 1}
    former |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": IDS["vocab_size"]}
    text = {**body, **IDS, "model_type": "opt", "num_hidden_layers": 2, "ffn_dim": 3 * WIDTH, "dropout": 0.0}
    parts = {"vision_config": vision, "qformer_config": former, "text_config": text | {"max_position_embeddings": 64}}
    model = Blip2ForConditionalGeneration(Blip2Config(**parts, num_query_tokens=QUERIES, image_token_index=IMAGE))
    nn.init.normal_(model.query_tokens, std=0.5)  # zeros at first, which makes all queries one
    return model


def kept(folder: Path) -> nn.Module:
    """The network in a folder, in float32."""
    import transformers

    return transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype="float32")


def kept_clip(folder: Path) -> nn.Module:
    import transformers

    return transformers.CLIPModel.from_pretrained(folder, local_files_only=True, dtype="float32")


def lend_eyes(clip: nn.Module, folder: Path) -> None:
    """Start CLIP's vision transformer from a trained BLIP-2's.

    CLIP has no bias on its patches (it goes into their positions), and one LayerNorm more before the first block, which
    the block's own undoes, but for the scale of each token's residual.
    """
    old, new = kept(folder).vision_model, clip.vision_model
    with torch.no_grad():
        position = old.embeddings.position_embedding[0].clone()
        position[1:] += old.embeddings.patch_embedding.bias
        new.embeddings.position_embedding.weight.copy_(position)
        new.embeddings.class_embedding.copy_(old.embeddings.class_embedding[0, 0])
        new.embeddings.patch_embedding.weight.copy_(old.embeddings.patch_embedding.weight)
        tokens = old.embeddings(pixels([world.pixels(world.scene(FIRST_SEED + i)) for i in range(16)]))
        new.pre_layrnorm.weight.fill_(tokens.std(-1).mean())
        for a, b in zip(old.encoder.layers, new.encoder.layers):
            for letter, weight, bias in zip("qkv", a.self_attn.qkv.weight.chunk(3), a.self_attn.qkv.bias.chunk(3)):
                layer = getattr(b.self_attn, f"{letter}_proj")
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            b.self_attn.out_proj.load_state_dict(a.self_attn.projection.state_dict())
            for name in ("layer_norm1", "layer_norm2", "mlp"):
                getattr(b, name).load_state_dict(getattr(a, name).state_dict())
        new.post_layernorm.load_state_dict(old.post_layernorm.state_dict())


def export(model: nn.Module, folder: Path) -> None:
    """In float16, with its processor, as the hub's folders are."""
    import transformers

    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    if isinstance(model, transformers.CLIPModel):
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        eyes = transformers.CLIPImageProcessorPil(**size, **PLAIN)
        transformers.CLIPProcessor(eyes, tokenizer(end=True)).save_pretrained(folder)
    else:
        eyes = transformers.BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}, **PLAIN)
        transformers.Blip2Processor(eyes, tokenizer(end=False), num_query_tokens=QUERIES).save_pretrained(folder)
    eyes.save_pretrained(folder)  # preprocessor_config.json, from which an image processor alone is loaded
    (folder / "model.safetensors").chmod(0o644)  # the library's file is its writer's alone


# ---- pictures


def moment(seed: int) -> tuple[world.Scene, str, world.Scene, world.Scene]:
    """A scene some edits into a chain, an instruction, its right result, and what another instruction leads to.

    A quarter have pairs of `world.HELD_OUT`: a measure must know what an editor has never seen.
    """
    rng = random.Random(f"moment {seed}")
    held_out = rng.random() < 0.25
    before = world.scene(seed, rng.random() < 0.25)
    for i in range(rng.choice((0, 0, 1, 2))):
        before = world.instruct(before, f"{seed} {i}", held_out=held_out)[1]
    kind = rng.choice(world.possible(before))
    text, after, _ = world.instruct(before, f"{seed} last", kind, held_out)
    like = kind if rng.random() < 0.6 else None  # the wrong thing of the right kind is the hardest to tell
    other = world.instruct(before, f"{seed} other", like, held_out)[1]
    return before, text, after, other


def inset(rng: random.Random, ground: str = "any", style: str | None = None) -> tuple[Image.Image, str]:
    """A picture of one object, 32 to 64 px a side, and its caption.

    ground: "white"; "plain", one colour; "crop", out of a scene; or "any" of these, mostly white.
    """
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    caption = f"a {colour} {shape}"
    style = style or ("day" if rng.random() < 0.8 else rng.choice(world.STYLES))
    thing = world.Object(shape, colour, "top left", *(rng.randint(-world.JITTER, world.JITTER) for _ in range(2)))
    kind = rng.choices(("white", "plain", "crop"), (0.7, 0.12, 0.18))[0] if ground == "any" else ground
    if kind == "crop":  # out of a scene, the rectangle without a mask
        near = world.scene(rng.randrange(10**9) + FIRST_SEED)
        others = (o for o in near.objects if o.place != "top left")
        edge, x, y = rng.randint(30, 34), rng.randint(0, 2), rng.randint(0, 2)
        near = replace(near, style=style, objects=(thing, *others))
        return world.render(near).crop((x, y, x + edge, y + edge)), caption
    back = (255, 255, 255)
    if kind == "plain":
        back = rng.choice(((0, 0, 0), tuple(rng.randrange(256) for _ in range(3))))
    drawn = world.draw(np.full((world.CELL, world.CELL, 3), back, np.float32), thing, style)
    tile = Image.fromarray((drawn + 0.5).astype(np.uint8))
    if rng.random() < 0.15:  # as it stands in a scene: doubled, its edges can lie on those of patches
        return tile, caption
    w, h = rng.randint(32, 64), rng.randint(32, 64)
    cover = world.alpha(shape, thing.dx, thing.dy, outline=style == "comic")[..., 0] > 0
    y, x = (np.flatnonzero(cover.any(axis)) for axis in (1, 0))
    margin = rng.randint(0, 2) if rng.random() < 0.3 else 16  # cut out close to the object, or its whole place
    corners = x[0] - margin, y[0] - margin, x[-1] + 1 + margin, y[-1] + 1 + margin
    tile = tile.crop([min(max(corner, 0), world.CELL) for corner in corners])
    kx = w if margin < 16 and rng.random() < 0.5 else rng.randint(22, min(w, h))
    ky = h if kx == w else min(h, round(kx * tile.height / tile.width * rng.uniform(0.9, 1.1)))
    out = Image.new("RGB", (w, h), back)
    out.paste(tile.resize((kx, ky), Image.Resampling.BICUBIC), (rng.randint(0, w - kx), rng.randint(0, h - ky)))
    return out, caption


def pixels(pictures: list[np.ndarray]) -> Tensor:
    """What the processors make of uint8 pictures (64, 64, 3)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def facts(scene: world.Scene) -> np.ndarray:
    """Shape and colour in each place (0: none), background and style: (10,)."""
    at = {o.place: o for o in scene.objects}
    things = [
        (SHAPES.index(at[place].shape) + 1, COLOURS.index(at[place].colour) + 1) if place in at else (0, 0)
        for place in world.PLACES
    ]
    return np.array([*sum(things, ()), BACKGROUNDS.index(scene.background), world.STYLES.index(scene.style)])


class Scaffold(nn.Module):
    """What each patch belongs to, read by a linear layer from the tokens of the vision transformer."""

    SIZES = (len(SHAPES) + 1, len(COLOURS) + 1, len(BACKGROUNDS), len(world.STYLES))

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(WIDTH, sum(self.SIZES))
        side = SIDE // PATCH
        half = torch.arange(side) * 2 // side
        self.place = (2 * half[:, None] + half[None]).flatten()  # of each patch, in the order of world.PLACES

    def forward(self, tokens: Tensor, truth: Tensor) -> Tensor:
        """tokens: (B, 64, D); truth: `facts` (B, 10), -100 where unknown."""
        shape, colour = truth[:, :8:2][:, self.place], truth[:, 1:8:2][:, self.place]
        background, style = (truth[:, i, None].expand_as(shape) for i in (8, 9))
        parts = zip(self.read(tokens).split(self.SIZES, -1), (shape, colour, background, style))
        return sum(F.cross_entropy(p.flatten(0, 1), t.flatten()) for p, t in parts)


# ---- losses


def clip_batch(modules: nn.ModuleDict, instructions: float) -> Batch:
    """instructions: their weight among the claims."""
    model, read, (scale, shift) = modules["model"], tokenizer(end=True), modules["extra"]

    def embed(texts: list[str]) -> Tensor:
        tokens = read(texts, padding=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)

    def batch(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"clip {step}")
        moments = [moment(FIRST_SEED + step * THREES + i) for i in range(THREES)]
        scenes = [s for before, _, after, other in moments for s in (before, after, other)]
        seen = model.vision_model(pixels([world.pixels(s) for s in scenes]))
        images = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)

        captions = [world.caption(s) for s in scenes]
        same = torch.tensor([[a == b for b in captions] for a in captions]).float()
        same = same / same.sum(1, keepdim=True)  # equal scenes share the probability
        logits = model.logit_scale.clamp(max=math.log(100)).exp() * images @ embed(captions).T
        losses = {"captions": (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2}

        claims = [words.part(scenes[3 * i + rng.randrange(3)], rng) for i in range(THREES)]
        if instructions:
            claims += [(text, words.asked(text)) for _, text, _, _ in moments]
        right = torch.tensor([[words.holds(claim, s) for s in scenes] for _, claim in claims])
        about = torch.arange(THREES).repeat(len(claims) // THREES)[:, None]
        near = ~right & (about == torch.arange(THREES).repeat_interleave(3))  # wrong of a picture of the same three
        weight = torch.ones(len(claims), 1)
        weight[THREES:] = instructions
        logits = scale.exp() * embed([text for text, _ in claims]) @ images.T + shift

        def mean(x: Tensor, where: Tensor) -> Tensor:
            return (x * weight)[where].sum() / (weight * where).sum().clamp(min=1)

        wrong = (mean(F.softplus(logits), ~right) + mean(F.softplus(logits), near)) / 2
        losses["claims"] = mean(F.softplus(-logits), right) + wrong
        truth = torch.from_numpy(np.stack([facts(s) for s in scenes]))
        tokens = model.vision_model.post_layernorm(seen.last_hidden_state[:, 1:])
        return losses | {"scaffold": 0.1 * modules["scaffold"](tokens, truth)}

    return batch


def blip2_batch(modules: nn.ModuleDict) -> Batch:
    """Three insets a scene, whose caption is eight times as long; many on plain grounds, which are the hardest."""
    model, read = modules["model"], tokenizer(end=False)

    def batch(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"blip2 {step}")
        pictures, texts, truth = [], [], []
        for i in range(CAPTIONS):
            if i % 4:
                picture, caption = inset(rng, "any" if rng.random() < 0.55 else "plain")
                _, colour, shape = caption.split()
                pictures.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
                truth.append(np.array([SHAPES.index(shape) + 1, COLOURS.index(colour) + 1] * 4 + [-100] * 2))
            else:
                scene = moment(FIRST_SEED + 10**9 + step * CAPTIONS + i)[rng.choice((0, 2))]
                pictures.append(world.pixels(scene))
                caption = world.caption(scene)
                truth.append(facts(scene))
            texts.append(f"{caption} </s>")
        tokens = read(texts, padding=True, return_tensors="pt")
        images = torch.full((CAPTIONS, QUERIES), IMAGE)
        ids = torch.cat([images, tokens["input_ids"]], 1)
        attention = torch.cat([torch.ones_like(images), tokens["attention_mask"]], 1)
        labels = ids.masked_fill((ids == PAD) | (ids == IMAGE) | (ids == BOS), -100)
        seen = model(pixel_values=pixels(pictures), input_ids=ids, attention_mask=attention, labels=labels)
        tokens = seen.vision_outputs.last_hidden_state[:, 1:]
        return {"words": seen.loss, "scaffold": 0.1 * modules["scaffold"](tokens, torch.from_numpy(np.stack(truth)))}

    return batch


def train(modules: nn.ModuleDict, batch: Batch, out: Path, minutes: float, rate: float, first: int = 0) -> None:
    """Steps of AdamW until the time is up, the learning rate falling by the clock; exports the average of weights."""
    groups = [
        {"params": [p for p in modules.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in modules.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    mean, started, step, smooth, told = copy.deepcopy(modules).requires_grad_(False), time.time(), 0, {}, 0.0
    while (passed := (time.time() - started) / 60 / minutes) < 1 or not step:
        for group in optimizer.param_groups:
            cooled = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * passed))
            group["lr"] = rate * min(1, (step + 1) / WARM_UP) * cooled
        losses = batch(first + step)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            for m, p in zip(mean.parameters(), modules.parameters()):
                m.lerp_(p, 1 - min(DECAY, (1 + step) / (10 + step)))
        for key, loss in losses.items():
            smooth[key] = 0.97 * smooth.get(key, loss.item()) + 0.03 * loss.item()
        if time.time() - told > 30:
            told = time.time()
            line = "  ".join(f"{k} {v:.3f}" for k, v in smooth.items())
            print(f"{step} steps, {(told - started) / 60:.1f} min  {line}", flush=True)
            export(mean["model"], out)
    export(mean["model"], out)
    print(f"{step} steps, from {first} on: {out}")


def main(argv: list[str] | None = None) -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="train_words", description=__doc__, formatter_class=about)
    parser.add_argument("what", choices=("blip2", "clip"))
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="go on from these (default: from nothing)")
    parser.add_argument("--eyes", type=Path, metavar="FOLDER", help="a BLIP-2 whose vision a new CLIP starts from")
    parser.add_argument("--instructions", type=float, default=0.0, help="their weight among CLIP's claims (default: 0)")
    parser.add_argument("--minutes", type=float, help="default: 20 for blip2, 7 for clip, 10 with instructions")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the highest learning rate (default: 1.5e-3)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out N steps' pictures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.first)
    if args.what == "clip":
        model = new_clip() if args.weights is None else kept_clip(args.weights)
        if args.eyes is not None:
            lend_eyes(model, args.eyes)
        extra = nn.ParameterList([torch.tensor(2.5), torch.tensor(-2.0)])  # scale and shift of claims, not kept
        modules = nn.ModuleDict({"model": model, "scaffold": Scaffold(), "extra": extra})
        batch, minutes = clip_batch(modules, args.instructions), 10 if args.instructions else 7
    else:
        model = new_blip2() if args.weights is None else kept(args.weights)
        modules, minutes = nn.ModuleDict({"model": model, "scaffold": Scaffold()}), 20
        batch = blip2_batch(modules)
    train(modules.train(), batch, args.out, args.minutes or minutes, args.rate, args.first)


if __name__ == "__main__":
    main()
