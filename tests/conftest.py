"""Tiny pipelines of the real classes, built offline."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import expunge

torch.set_num_threads(1)

WORDS = (
    "airplane aircraft sky ship bird cat dog frog horse truck photo picture drawing the of one art"
    " style person clothes wearing with ground street jet plane"
).split()


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters, and whole words built from them by merges, as in CLIP's own vocabulary."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = {t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters)])}
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            vocab.setdefault(parts[0], len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def tiny_pipeline(
    seed: int = 0, width: int = 32, channels: tuple[int, int] = (8, 16), groups: int = 4, **scheduler
) -> StableDiffusionPipeline:
    """Stable Diffusion's classes with random weights, small enough for a test."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=3.0,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=groups,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | scheduler
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The cache folder of the tests."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["EXPUNGE_CACHE"] = str(path)
    return path


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def model(pipe):
    return expunge.load(pipe)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model as a diffusers folder."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def worded():
    """Tiny but for its text encoder, which is trained and tells words apart: the emoji model's."""
    return with_words((8, 16))


@pytest.fixture(scope="session")
def wide():
    """As `worded`, with room for a hundred directions in its values."""
    return with_words((32, 64))


def with_words(channels):
    folder = Path(expunge.__file__).parent / "emoji" / "pipeline"
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()
    pipe = tiny_pipeline(width=text_encoder.config.hidden_size, channels=channels)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    pipe.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
    return expunge.load(pipe)


@pytest.fixture
def problem():
    return expunge.Problem(erase=(expunge.Concept("airplane", "sky"),), retain=("ship", "bird"))


def weights(pipe) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a pipeline, to compare with later."""
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "vae", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model of each family, as a diffusers folder; sizes that its configuration does not hold."""
    from tiny import PIPELINES  # which imports this module

    made = {}
    for name, make in PIPELINES.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        make().save_pretrained(made[name])
        (made[name] / "expunge.json").write_text('{"sample_size": 8, "num_inference_steps": 2}')
    return made


@pytest.fixture
def uce(folder):
    """A tiny model, and an edit of it by UCE."""
    model = expunge.load(folder)
    problem = expunge.Problem((expunge.Concept("airplane", "sky"),), ("ship", "bird"))
    return model, expunge.erase(model, problem)


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """A tiny Stable Diffusion as a single file, as from the first code, in half precision."""
    from tiny import single_file

    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    single_file(tiny_pipeline().to(torch.float16), path)
    return path


@pytest.fixture
def on_hub(folder, tmp_path, monkeypatch):
    """A hub that has the tiny model as owner/name, at the border of its library; the fetched files."""
    there, fetched = shutil.copytree(folder, tmp_path / "there"), tmp_path / "fetched"
    file = there / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".fp16.safetensors"))

    def snapshot(name, *, allow_patterns, ignore_patterns):
        assert name == "owner/name"
        every = [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()]
        kept = filter_repo_objects(every, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for path in kept:
            (fetched / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / path, fetched / path)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return there, fetched
