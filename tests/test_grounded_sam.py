"""GroundingDINO and SAM, the real classes at tiny sizes: shapes and frames of reference."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
    SwinConfig,
)
from transformers.models.sam.configuration_sam import (
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from expunge import ExpungeError
from expunge.erasing.grounded_sam import GroundedSAM


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ship", "white", "."]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    detector = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=SwinConfig(
                image_size=64,
                embed_dim=8,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 2, 2],
                window_size=2,
                out_features=["stage2", "stage3", "stage4"],
            ),
            text_config=BertConfig(
                vocab_size=len(words),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            ),
            d_model=32,
            num_queries=6,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    )
    segmenter = SamModel(
        SamConfig(
            vision_config=SamVisionConfig(
                hidden_size=16,
                output_channels=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=64,
                patch_size=16,
                global_attn_indexes=[0],
                num_pos_feats=8,
                mlp_dim=16,
            ),
            prompt_encoder_config=SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16),
            mask_decoder_config=SamMaskDecoderConfig(
                hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
            ),
        )
    )
    return GroundedSAM(tokenizer, detector.eval(), segmenter.eval(), threshold=0.0, side=64)


def test_masks_have_the_size_of_the_images(tiny):
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    found = tiny(images, "white ship")
    assert found.shape == (2, 24, 32)
    assert found.dtype == torch.bool
    boxes = tiny.boxes(images[0], "white ship")
    assert boxes.shape == (6, 4)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()


def test_nothing_found_is_an_empty_mask(tiny):
    import dataclasses

    strict = dataclasses.replace(tiny, threshold=1.0)
    assert not strict(torch.rand(1, 3, 24, 32), "ship").any()


def test_a_mask_lies_where_its_box_is(tiny):
    """A segmenter that fills its box: the padding to a square must not shift it."""
    import dataclasses

    def fill(pixel_values, input_boxes, multimask_output):
        assert pixel_values.shape == (1, 3, 64, 64)
        masks = torch.full((1, input_boxes.shape[1], 1, 64, 64), -1.0)
        for i, (left, top, right, bottom) in enumerate(input_boxes[0].round().long().tolist()):
            masks[0, i, 0, top:bottom, left:right] = 1
        return SimpleNamespace(pred_masks=masks)

    fill.config = tiny.segmenter.config
    filling = dataclasses.replace(tiny, segmenter=fill)
    mask = filling._mask(torch.rand(3, 32, 64), torch.tensor([[0.25, 0.5, 0.75, 1.0]]))
    wanted = torch.zeros(32, 64, dtype=torch.bool)
    wanted[16:, 16:48] = True
    assert (mask == wanted).float().mean() > 0.95


def test_missing_weights_are_said_in_one_sentence(tmp_path):
    with pytest.raises(ExpungeError, match="grounded-sam needs .*nowhere.*masks 'attention' need"):
        GroundedSAM.load(detector=str(tmp_path / "nowhere"))
