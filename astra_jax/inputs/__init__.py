"""What models read: images, and batches of token ids."""
