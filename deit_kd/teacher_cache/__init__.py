"""A teacher's logits and features of the training images, written once for many runs."""
