"""LoRA files: read in any naming, fused into weights, and written from an edit's changes."""

from expunge.checkpoints.lora.factors import Lora
from expunge.checkpoints.lora.read import LoraInfo, fuse_lora, read_lora, read_lora_info

__all__ = ["Lora", "LoraInfo", "fuse_lora", "read_lora", "read_lora_info"]
