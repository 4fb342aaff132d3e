"""Megatron checkpoints: read them with torch alone, hand them to Hugging Face, prove it."""
