"""Fold a LoRA adapter into its base model, tensor by tensor, and show that the result is the same model."""
