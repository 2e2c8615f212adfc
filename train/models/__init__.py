"""What is trained: models from folders or parts, adapters, codebook sizes, public checkpoints converted."""
