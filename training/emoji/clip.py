"""The small CLIP: a text tower and a picture tower, trained together on scenes and captions.

The loss is the pairwise sigmoid loss (every caption against every picture of the batch), in which pairs that show the
same labels count neither way, plus what each tower can tell of the scene: its labels, styles and background. The
text tower is frozen afterwards and conditions the denoiser; the picture tower gives picture-text scores.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from training.emoji.loop import device, fast_arithmetic, parse, train
from training.emoji.scenes import BACKGROUNDS, SceneMaker, Scenes, stream
from training.emoji.world import World, load_drawings, place_options, read_world

SHARED = 256  # width of the space in which pictures and captions meet
ON_GPU = {"batch": 1024, "rate": 1e-3, "workers": 6, "watch": 10}


def build_text(width: int, layers: int, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=77,
            projection_dim=SHARED,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_picture() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            projection_dim=SHARED,
        )
    )


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(n, longest) ids. The tower is causal, so padding beyond the longest caption changes nothing before it."""
    return tokenizer(captions, padding="longest", truncation=True, max_length=77, return_tensors="pt").input_ids


class SmallCLIP(nn.Module):
    def __init__(self, text: CLIPTextModel, picture: CLIPVisionModel | None, world: World):
        super().__init__()
        width, facts = text.config.hidden_size, len(world.labels) + len(world.styles) + len(BACKGROUNDS)
        self.text, self.picture = text, picture
        self.text_projection = nn.Linear(width, SHARED, bias=False)
        self.text_facts = nn.Linear(width, facts)
        if picture:
            self.picture_projection = nn.Linear(picture.config.hidden_size, SHARED, bias=False)
            self.picture_facts = nn.Linear(picture.config.hidden_size, facts)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-8.0))

    def loss(self, ids: torch.Tensor, scenes: Scenes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        labels = scenes.labels.to(ids.device)
        background = F.one_hot(scenes.background, len(BACKGROUNDS)).float().to(ids.device)
        facts = torch.cat([labels, scenes.styles.to(ids.device), background], 1)
        text = self.text(input_ids=ids).pooler_output
        loss = telling = self.telling(self.text_facts(text), facts)
        notes = {"telling": telling.detach()}
        if self.picture is None:
            return loss, notes
        picture = self.picture(pixel_values=scenes.pictures.to(ids.device) * 2 - 1).pooler_output
        seen = self.telling(self.picture_facts(picture), facts)
        a = F.normalize(self.text_projection(text), dim=1)
        b = F.normalize(self.picture_projection(picture), dim=1)
        logits = a @ b.T * self.scale.exp() + self.bias
        own = torch.eye(len(a), device=ids.device)
        same = (labels @ labels.T > 0).float() * (1 - own)
        pairs = F.binary_cross_entropy_with_logits(logits, own, weight=1 - same, reduction="sum") / len(a)
        correct = (logits - 1e4 * same).argmax(1) == torch.arange(len(a), device=ids.device)
        notes |= {"seen": seen.detach(), "pairs": pairs.detach(), "top1": correct.float().mean()}
        return telling + seen + pairs, notes

    @staticmethod
    def telling(logits: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        weight = 1 + 4 * facts
        return F.binary_cross_entropy_with_logits(logits, facts, weight=weight, reduction="sum") / len(facts) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    place_options(parser)
    parser.add_argument("--minutes", type=float, default=11)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--workers", type=int, default=0, help="processes that think up scenes and tokenise captions")
    parser.add_argument("--watch", type=int, default=1, help="look at the loss every so many steps")
    options = parse(parser, ON_GPU)
    torch.manual_seed(0)
    fast_arithmetic()
    world = read_world(options.world)
    maker = SceneMaker(world, load_drawings(world, options.work).to(device()), seed=2)
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    clip = SmallCLIP(build_text(options.width, options.layers, tokenizer), build_picture(), world).to(device())

    batches = stream(maker, options.batch, partial(tokens_of, tokenizer), options.workers)

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scenes = next(batches)
        assert scenes.ids is not None
        return clip.loss(scenes.ids, scenes)

    optimiser = torch.optim.AdamW(clip.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    weights = train(
        "clip", clip, loss_of, options.work, optimiser,
        minutes=options.minutes, average=0.995, watch=options.watch,
    )  # fmt: skip
    clip.load_state_dict(weights)
    clip.text.save_pretrained(options.work / "text_encoder")
    assert clip.picture is not None
    clip.picture.save_pretrained(options.work / "clip")
    save_file(
        {
            "text_projection": clip.text_projection.weight.detach().contiguous(),
            "picture_projection": clip.picture_projection.weight.detach().contiguous(),
            "scale": clip.scale.detach(),
            "bias": clip.bias.detach(),
        },
        options.work / "clip" / "projections.safetensors",
    )


if __name__ == "__main__":
    main()
